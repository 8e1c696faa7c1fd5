"""Evaluations in the wrong mode, and modes that are left, in the ways in which people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]
VALIDATION = 2 * X + 1
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def loop(model: nn.Module, after: Callable[[nn.Module, int], Any], x: Tensor = X, y: Tensor = Y) -> list[sl.Fault]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            after(model, i)
            audit.step()
    return list(audit.faults)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    return sum(F.mse_loss(model(VALIDATION + k), Y).item() for k in range(3)) / 3


@torch.inference_mode()
def predict(model: nn.Module) -> list[float]:
    return model(VALIDATION).flatten().tolist()


def every_second(model: nn.Module, i: int) -> None:
    if i % 2:
        with torch.no_grad():
            print((model(VALIDATION) - Y).abs().mean().item())


def accuracy(model: nn.Module, i: int) -> Any:
    with torch.no_grad():
        return (model(VALIDATION).sign() == Y.sign()).float().mean()


@pytest.mark.parametrize(
    "after",
    [lambda m, i: evaluate(m), lambda m, i: predict(m), every_second, accuracy],
    ids=["helper", "inference mode", "every second", "accuracy"],
)
def test_an_evaluation_in_train_mode_is_told(after: Any) -> None:
    faults = loop(Net(), after)
    assert [(fault.code, fault.names) for fault in faults] == [("SL702", ("encoder.1",))]


def test_an_evaluation_of_a_convolution_in_train_mode_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))

    def after(model: nn.Module, i: int) -> None:
        with torch.no_grad():
            model(IMAGES + 1).mean().item()

    assert [fault.code for fault in loop(model, after, IMAGES, Y[:8])] == ["SL702"]


def once(read: Callable[[Tensor], Any]) -> Callable[[nn.Module, int], Any]:
    """At the end of the only epoch, several batches."""

    def after(model: nn.Module, i: int) -> None:
        if i == 4:
            with torch.no_grad():
                for k in range(3):
                    read(model(VALIDATION + k))

    return after


def test_one_validation_of_several_batches_is_told() -> None:
    faults = loop(Net(), once(lambda out: F.mse_loss(out, Y).item()))
    assert [(fault.code, fault.names) for fault in faults] == [("SL702", ("encoder.1",))]


def test_statistics_that_are_estimated_again_by_hand_are_no_fault() -> None:
    assert loop(Net(), once(lambda out: None)) == []


def leave(model: nn.Module, i: int) -> None:
    if i == 2:
        model.eval()
        evaluate(model)


def leave_the_encoder(model: Any, i: int) -> None:
    if i == 2:
        model.encoder.eval()
        evaluate(model)


def train_false(model: nn.Module, i: int) -> None:
    model.train(i < 2)


@pytest.mark.parametrize("after", [leave, train_false, leave_the_encoder], ids=lambda after: after.__name__)
def test_a_model_that_is_left_in_eval_mode_is_told(after: Any) -> None:
    faults = [fault for fault in loop(Net(), after) if fault.code != "SL702"]
    assert [fault.code for fault in faults] == ["SL703"]
    assert faults[0].names == ("encoder.1", "encoder.3")


def restored(model: nn.Module, i: int) -> None:
    was = model.training
    model.eval()
    evaluate(model)
    model.train(was)


def norms_frozen_late(model: nn.Module, i: int) -> None:
    if i == 2:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()


def encoder_frozen_late(model: Any, i: int) -> None:
    if i == 2:
        model.encoder.eval().requires_grad_(False)


@pytest.mark.parametrize("after", [restored, norms_frozen_late], ids=lambda after: after.__name__)
def test_a_mode_that_is_meant_is_not_told(after: Any) -> None:
    assert loop(Net(), after) == []


def test_a_part_that_is_frozen_and_put_to_rest_is_not_left_in_eval_mode() -> None:
    assert "SL703" not in {fault.code for fault in loop(Net(), encoder_frozen_late)}


def test_a_generator_at_rest_while_the_critic_trains_is_not_told() -> None:
    model = nn.ModuleDict({"g": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), "d": nn.Sequential(nn.Linear(6, 1))})
    optimizers = [torch.optim.Adam(part.parameters()) for part in model.values()]
    with sl.audit(model=model, optimizers=optimizers, on_fault="collect") as audit:
        for i in range(12):
            train = i % 4 == 0
            model["g"].train(train)
            optimizers[0 if train else 1].zero_grad()
            if train:
                model["d"](model["g"](X)).mean().backward()
            else:
                (model["d"](model["g"](X).detach()).mean() - model["d"](X + 1).mean()).backward()
            optimizers[0 if train else 1].step()
            audit.step()
    assert "SL703" not in {fault.code for fault in audit.faults}


class Dropping(nn.Module):
    def __init__(self, drop: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.p, self.drop = nn.Linear(6, 8), nn.Linear(8, 1), 0.1, drop

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self, self.first(x)))


def attend(x: Tensor, **options: Any) -> Tensor:
    x = x.view(1, 4, 4, 8)
    return F.scaled_dot_product_attention(x, x, x, **options).view(16, 8)


def split(module: Any, h: Tensor) -> Tensor:
    return F.dropout(
        h.relu(),
        p=module.p,
    )


FORGOTTEN = {
    "dropout": lambda m, h: F.dropout(h),
    "with p": lambda m, h: F.dropout(h, m.p),
    "by name": lambda m, h: F.dropout(h, p=m.p),
    "dropout1d": lambda m, h: F.dropout1d(h, 0.2),
    "over lines": split,
    "attention": lambda m, h: attend(h, dropout_p=m.p),
}
MEANT = {
    "follows": lambda m, h: F.dropout(h, m.p, m.training),
    "follows by name": lambda m, h: F.dropout(h, p=m.p, training=m.training),
    "monte carlo": lambda m, h: F.dropout(h, m.p, training=True),
    "monte carlo by position": lambda m, h: F.dropout(h, m.p, True),
    "options": lambda m, h: F.dropout(h, **{"p": m.p, "training": True}),
    "of torch": lambda m, h: torch.dropout(h, m.p, m.training),
    "nothing is dropped": lambda m, h: F.dropout(h, 0.0),
    "attention": lambda m, h: attend(h, dropout_p=m.p if m.training else 0.0),
    "alpha": lambda m, h: F.alpha_dropout(h, m.p, m.training),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_functional_dropout_that_is_forgotten_is_told(name: str) -> None:
    faults = loop(Dropping(FORGOTTEN[name]), restored)
    assert [(fault.code, fault.names) for fault in faults] == [("SL704", ("(root)",))]


@pytest.mark.parametrize("name", MEANT)
def test_a_functional_dropout_that_is_meant_is_not_told(name: str) -> None:
    assert loop(Dropping(MEANT[name]), restored) == []


def frozen(model: nn.Module) -> nn.Module:
    model.encoder.requires_grad_(False)
    return model


class Deep(nn.Module):
    """a backbone whose blocks hold the normalisation"""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


def test_the_statistics_of_a_frozen_part_are_told() -> None:
    assert [fault.code for fault in loop(frozen(Net()), lambda m, i: None)] == ["SL706"]
    deep = Deep()
    deep.backbone.requires_grad_(False)
    faults = loop(deep, lambda m, i: m.train(), IMAGES, Y[:8])
    assert [(fault.code, fault.names) for fault in faults] == [
        ("SL706", ("backbone.0.1",)),
        ("SL706", ("backbone.1.1",)),
    ]


def test_the_statistics_of_a_part_that_is_not_frozen_as_a_whole_are_not_told() -> None:
    model = Net()
    model.encoder[1].requires_grad_(False)
    assert loop(model, lambda m, i: None) == []
    model = frozen(Net())
    model.encoder.eval()
    assert loop(model, lambda m, i: None) == []


@pytest.mark.parametrize("kind", ["eval", "train(False)", "part"])
def test_a_loss_function_that_leaves_a_mode_is_told(kind: str, trained: Any) -> None:
    def make() -> Any:
        model = Net()

        def step(i: int) -> Tensor:
            loss = F.mse_loss(model(X), Y)
            if kind == "eval":
                model.eval()
            elif kind == "part":
                model.encoder[3].eval()
            else:
                model.train(False)
            return loss

        return model, step

    assert {(fault.code, fault.severity) for fault in trained(make, steps=1)} == {("SL705", "warning")}


def test_a_loss_function_that_restores_the_mode_is_not_told(trained: Any) -> None:
    def make() -> Any:
        model = Net()

        def step(i: int) -> Tensor:
            loss = F.mse_loss(model(X), Y)
            restored(model, i)
            return loss

        return model, step

    assert trained(make, steps=2) == []


def test_a_module_with_an_attribute_named_dropout_of_any_kind_is_no_obstacle(trained: Any) -> None:
    def make() -> Any:
        model = Net()
        model.dropout = nn.Dropout(0.1)
        model.encoder.register_buffer("dropout", torch.zeros(3))
        return model, lambda i: F.mse_loss(model(X), Y)

    assert trained(make, steps=2) == []


def test_grad_mode_that_is_left_off_is_told_and_restored(trained: Any) -> None:
    def make() -> Any:
        model = Net()

        def step(i: int) -> Tensor:
            loss = F.mse_loss(model(X), Y)
            torch.set_grad_enabled(False)
            return loss

        return model, step

    assert [fault.code for fault in trained(make, steps=1)] == ["SL707"]
    assert torch.is_grad_enabled()
