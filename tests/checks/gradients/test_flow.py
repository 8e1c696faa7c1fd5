"""Ways in which a part of a model loses its gradient: each is found, and the line that lost it is in the fault."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A body whose gradient gets lost in `lose`, and a head that keeps its own."""

    def __init__(self, lose: Callable[[nn.Module, Tensor], Tensor], body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head, self.lose = body, nn.Linear(width, 1), lose
        self.scale = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lose(self.body, x))


def by_detach(body: nn.Module, x: Tensor) -> Tensor:
    return body(x).relu().detach()  # guilty


def by_detach_in_place(body: nn.Module, x: Tensor) -> Tensor:
    h = body(x) * 2
    h.detach_()  # guilty
    return h.tanh()


def by_data(body: nn.Module, x: Tensor) -> Tensor:
    h = body(x)
    return h.data * 0.5  # guilty


def by_numpy(body: nn.Module, x: Tensor) -> Tensor:
    h = body(x).detach().numpy()  # guilty
    return torch.from_numpy(np.tanh(h))


def by_numpy_of_data(body: nn.Module, x: Tensor) -> Tensor:
    h = np.asarray(body(x).data)  # guilty
    return torch.as_tensor(np.clip(h, -1, 1))


def by_numbers(body: nn.Module, x: Tensor) -> Tensor:
    rows = [[v.item() for v in row] for row in body(x)]  # guilty
    return torch.tensor(rows)


def by_a_list(body: nn.Module, x: Tensor) -> Tensor:
    values = body(x).tolist()  # guilty
    return torch.tensor(values) + 1


def by_a_new_tensor(body: nn.Module, x: Tensor) -> Tensor:
    h = body(x)
    with torch.no_grad():
        return torch.stack([row.clone() for row in h])  # guilty


def by_argmax(body: nn.Module, x: Tensor) -> Tensor:
    best = body(x).argmax(1)  # guilty
    return F.one_hot(best, 8).float()


def by_a_comparison(body: nn.Module, x: Tensor) -> Tensor:
    gate = body(x) > 0  # guilty
    return gate.float()


def by_long(body: nn.Module, x: Tensor) -> Tensor:
    levels = (body(x) * 4).long()  # guilty
    return levels / 4


def by_int(body: nn.Module, x: Tensor) -> Tensor:
    return body(x).sigmoid().to(torch.int32).float() + x.new_ones(16, 8)  # guilty


def by_top_k_indices(body: nn.Module, x: Tensor) -> Tensor:
    _, order = body(x).topk(8, 1)  # guilty
    return order.float()


def by_no_grad(body: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = body(x)  # guilty
    return h.relu()


@torch.no_grad()
def encode(body: nn.Module, x: Tensor) -> Tensor:
    h = body(x)  # guilty
    return h.tanh()


def by_a_decorator(body: nn.Module, x: Tensor) -> Tensor:
    return encode(body, x) * 2


def by_inference_mode(body: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = body(x)  # guilty
    return h.clone() + 0


def by_set_grad_enabled(body: nn.Module, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(mode=False):
        h = body(x).sigmoid()  # guilty
    return h * 2


def by_float(body: nn.Module, x: Tensor) -> Tensor:
    h = body(x)
    scale = float(h.detach().std())  # guilty
    return x.new_ones(16, 8) * scale


def by_a_python_sum(body: nn.Module, x: Tensor) -> Tensor:
    total = sum(v.item() for v in body(x).mean(0))  # guilty
    return torch.full((16, 8), total)


def by_bool(body: nn.Module, x: Tensor) -> Tensor:
    mask = body(x).bool()  # guilty
    return torch.where(mask, 1.0, 0.5)


def by_sign_of_int(body: nn.Module, x: Tensor) -> Tensor:
    return torch.bucketize(body(x), torch.linspace(-1, 1, 5)).float()  # guilty


def by_writing_into_data(body: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros(16, 8)
    out.data.copy_(body(x))  # guilty
    return out


def by_writing_under_no_grad(body: nn.Module, x: Tensor) -> Tensor:
    out, h = torch.zeros(16, 8), body(x)
    with torch.no_grad():
        out[:] = h  # guilty
    return out


def by_a_checkpoint_without_gradients(body: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(body, x, use_reentrant=True)  # guilty


def by_multinomial(body: nn.Module, x: Tensor) -> Tensor:
    drawn = torch.multinomial(body(x).softmax(1), 8)  # guilty
    return drawn.float()


def by_rewrapping(body: nn.Module, x: Tensor) -> Tensor:
    h = body(x)
    return nn.Parameter(h.data, requires_grad=True) * 1.0  # guilty


def by_sort_indices(body: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(body(x), dim=1)  # guilty
    return order.float() / 8


def by_histogram(body: nn.Module, x: Tensor) -> Tensor:
    counts = torch.histc(body(x).detach(), 8, -1, 1)  # guilty
    return counts.expand(16, 8)


def convolution_by_data(body: nn.Module, x: Tensor) -> Tensor:
    maps = body(IMAGES).flatten(1).data  # guilty
    return maps[:, :8].repeat(4, 1)


def attention_by_argmax(body: nn.Module, x: Tensor) -> Tensor:
    scores = body(x.view(4, 4, 6))
    picked = scores.max(-1).indices  # guilty
    return picked.reshape(16, 1).expand(16, 8).float()


def recurrence_by_no_grad(body: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out, _ = body(x.view(4, 4, 6))  # guilty
    return out.reshape(16, 8)


LINEAR = partial(nn.Linear, 6, 8)
WAYS = [
    *[by_detach, by_detach_in_place, by_data, by_numpy, by_numpy_of_data, by_numbers, by_a_list, by_a_new_tensor],
    *[by_argmax, by_a_comparison, by_long, by_int, by_no_grad, by_a_decorator, by_inference_mode],
    *[by_set_grad_enabled, by_float, by_a_python_sum, by_bool, by_sign_of_int, by_writing_into_data],
    *[by_writing_under_no_grad, by_a_checkpoint_without_gradients, by_multinomial, by_rewrapping, by_sort_indices],
    *[by_histogram, by_top_k_indices],
]
CASES: list[tuple[Any, Any]] = [(way, LINEAR) for way in WAYS]
CASES += [
    (convolution_by_data, partial(nn.Conv2d, 3, 4, 3)),
    (attention_by_argmax, partial(nn.Linear, 6, 8)),
    (recurrence_by_no_grad, partial(nn.GRU, 6, 8, batch_first=True)),
]


def program(lose: Any, body: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = Net(lose, body(), 8)
        return model, lambda i: F.mse_loss(model(X), Y)

    return make


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("lose", "body"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_line_that_loses_a_gradient_is_told(lose: Any, body: Any, audited: Any) -> None:
    faults = audited(program(lose, body), steps=6)
    assert [fault.code for fault in faults] == ["SL502"], faults
    assert "body.weight" in faults[0].what or "body.weight_ih" in faults[0].what
    assert "# guilty" in " ".join(str(faults[0]).split()), str(faults[0])


@pytest.mark.parametrize("lose", [by_data, by_argmax, by_no_grad, by_numbers], ids=lambda way: way.__name__)
def test_a_trainer_tells_the_same(lose: Any, trained: Any) -> None:
    faults = trained(program(lose, LINEAR), steps=6)
    assert [fault.code for fault in faults] == ["SL502"]
    assert "# guilty" in " ".join(str(faults[0]).split())


def test_a_parameter_that_is_never_used_is_told(audited: Any) -> None:
    def make() -> Any:
        model = nn.ModuleDict({"used": nn.Linear(6, 1), "pooler": nn.Linear(6, 6)})
        return model, lambda i: F.mse_loss(model["used"](X), Y)

    faults = audited(make, steps=6)
    assert [fault.code for fault in faults] == ["SL502"]
    assert "does not use them" in faults[0].why
    assert faults[0].names == ("pooler.weight", "pooler.bias")


def test_a_result_that_is_dropped_is_told(audited: Any) -> None:
    def make() -> Any:
        model = nn.ModuleDict({"used": nn.Linear(6, 1), "aux": nn.Linear(6, 1)})

        def step(i: int) -> Tensor:
            model["aux"](X)  # guilty
            return F.mse_loss(model["used"](X), Y)

        return model, step

    faults = audited(make, steps=6)
    assert [fault.code for fault in faults] == ["SL502"]
    assert "nothing that is computed from them reaches a loss" in faults[0].why
    assert "# guilty" in faults[0].where


class Dead(nn.Module):
    def __init__(self, stop: Callable[[Tensor], Tensor], bias: float, body: Any = LINEAR) -> None:
        super().__init__()
        self.body, self.head, self.stop = body(), nn.Linear(8, 1), stop
        nn.init.constant_(self.body.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stop(self.body(x))
        return self.head(h if h.dim() == 2 else h.mean((2, 3)).repeat(2, 2))


STOPS: dict[str, tuple[Callable[[Tensor], Tensor], float, str]] = {
    "relu": (lambda h: h.relu(), -100.0, "inactive"),  # guilty
    "functional relu": (lambda h: F.relu(h), -100.0, "inactive"),  # guilty
    "clamp": (lambda h: h.clamp(-1, 1), 50.0, "saturated"),  # guilty
    "hardtanh": (lambda h: F.hardtanh(h), 50.0, "saturated"),  # guilty
    "relu6": (lambda h: F.relu6(h), 50.0, "saturated"),  # guilty
    "sigmoid": (lambda h: h.sigmoid(), 500.0, "saturated"),  # guilty
    "tanh": (lambda h: h.tanh(), 500.0, "saturated"),  # guilty
    "round": (lambda h: h.round(), 0.0, "rounding"),  # guilty
    "sign": (lambda h: torch.sign(h), 0.0, "sign"),  # guilty
    "floor": (lambda h: torch.floor(h * 3), 0.0, "floor"),  # guilty
    "zero factor": (lambda h: h * 0.0 + torch.ones_like(h), 0.0, "factor"),  # guilty
    "hardsigmoid": (lambda h: F.hardsigmoid(h), -50.0, "saturated"),  # guilty
    "minimum": (lambda h: torch.minimum(h, torch.zeros_like(h)), 100.0, "derivative is zero"),  # guilty
    "where": (lambda h: torch.where(h > 0, torch.zeros_like(h), h), 100.0, "other branch"),  # guilty
    "threshold": (lambda h: F.threshold(h, 1.0, 0.0), -50.0, "threshold"),  # guilty
}


@pytest.mark.parametrize("name", STOPS)
def test_what_stops_a_gradient_is_told(name: str, audited: Any) -> None:
    stop, bias, word = STOPS[name]

    def make() -> Any:
        model = Dead(stop, bias)
        return model, lambda i: F.mse_loss(model(X), Y)

    faults = audited(make)
    assert [fault.code for fault in faults] == ["SL503"], faults
    assert set(faults[0].names) == {"body.weight", "body.bias"}
    assert word in faults[0].why
    assert "# guilty" in faults[0].where


def test_a_dead_convolution_is_told(audited: Any) -> None:
    def make() -> Any:
        model = Dead(nn.ReLU(), -100.0, partial(nn.Conv2d, 3, 4, 3))
        return model, lambda i: F.mse_loss(model(IMAGES)[:4], Y[:4])

    faults = audited(make)
    assert [(fault.code, fault.names) for fault in faults] == [("SL503", ("body.weight", "body.bias"))]


def test_a_last_layer_of_zeros_that_stays_zero_is_told(audited: Any) -> None:
    def make() -> Any:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        nn.init.zeros_(model[2].weight).requires_grad_(False)
        return model, lambda i: F.mse_loss(model(X), Y)

    faults = audited(make)
    assert [(fault.code, fault.names) for fault in faults] == [("SL503", ("0.weight", "0.bias"))]
    assert "factor, is zero" in faults[0].why


def test_a_gradient_that_comes_late_is_no_fault(audited: Any) -> None:
    def make() -> Any:
        model = Dead(nn.ReLU(), -100.0)

        def step(i: int) -> Tensor:
            if i == 6:
                nn.init.zeros_(model.body.bias)
            return F.mse_loss(model(X), Y)

        return model, step

    assert audited(make) == []


@pytest.mark.parametrize(
    "zero",
    [lambda h: (1 // 4) * h, lambda h: h.clamp(max=-1) * 0, lambda h: F.relu(h - 1e6), lambda h: 0.0 * h],
)
def test_a_term_of_zeros_is_told_at_the_end(zero: Callable[[Tensor], Tensor], trained: Any) -> None:
    def make() -> Any:
        model = nn.Linear(6, 1)
        return model, lambda i: {"fit": F.mse_loss(model(X), Y), "smooth": zero(model(X).square().mean())}

    assert [(fault.code, fault.names) for fault in trained(make)] == [("SL424", ("smooth",))]


def test_a_term_whose_weight_is_annealed_from_zero_is_no_fault(trained: Any) -> None:
    def make() -> Any:
        model = nn.Linear(6, 1)
        weight = [0.0] * 6 + [0.1] * 4
        return model, lambda i: {"fit": F.mse_loss(model(X), Y), "kl": weight[i] * model(X).square().mean()}

    assert trained(make, steps=10) == []


def test_a_term_that_is_still_zero_after_the_first_twenty_steps_is_no_fault(trained: Any) -> None:
    def make() -> Any:
        model = nn.Linear(6, 1)
        return model, lambda i: {
            "fit": F.mse_loss(model(X), Y),
            "kl": (0.0 if i < 28 else 1.0) * model(X).square().mean(),
        }

    assert trained(make, steps=30, level="full") == []


def contrast(model: nn.Module, margin: float) -> Tensor:
    """Pairs of which each second one is equal: neither part depends on what the last bias adds to both."""
    same = torch.arange(len(X)) % 2 > 0
    distance = (model(X) - model(torch.where(same[:, None], X, X.flip(0)))).square().sum(1).add(1e-8).sqrt()
    return (same * distance.square() + ~same * F.relu(margin - distance).square()).mean()


def test_a_bias_that_a_difference_cancels_is_no_fault(audited: Any) -> None:
    def make() -> Any:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        return model, lambda i: contrast(model, 4.0 if i % 2 else 0.0)

    assert audited(make) == []


def test_a_bias_of_ones_own_that_is_multiplied_by_zero_is_told(audited: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(6, 1)), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + 0.0 * self.bias  # guilty

    def make() -> Any:
        model = Scaled()
        return model, lambda i: F.mse_loss(model(X), Y)

    assert [(fault.code, fault.names) for fault in audited(make)] == [("SL503", ("bias",))]
