"""Data and buffers that change behind the loop, and gradients too small to move: each beside what looks like it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import safeloop as sl


def codes(audit: Any) -> list[str]:
    return [fault.code for fault in audit.faults]


def net(last: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, last))


# ---- data that is changed in place


def epochs(watched: Any, prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], batches: Any = None) -> list[str]:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    if batches is None:
        batches = [(5 * torch.rand(6, 4), torch.rand(6, 1)) for _ in range(4)]
    with watched(model, optimizer) as audit:
        for _ in range(4):
            for x, y in batches() if callable(batches) else batches:
                x, y = prepare(x, y)
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                audit.step()
    return codes(audit)


MEAN, STD = torch.full((4,), 0.2), torch.full((4,), 1.5)


def shifted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x -= MEAN
    x /= STD
    return x, y


CHANGES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "chained": lambda x, y: (x.div_(5).sub_(0.5), y),
    "statements with constants that are tensors": shifted,
    "a view goes in": lambda x, y: (x.mul_(0.5).view(3, 2, 4).flatten(0, 1), y),
    "the target": lambda x, y: (x, y.mul_(10.0)),
}


@pytest.mark.parametrize("prepare", CHANGES.values(), ids=CHANGES)
def test_batches_that_are_changed_in_place_in_every_epoch_are_told(watched: Any, prepare: Any) -> None:
    assert epochs(watched, prepare) == ["SL866"]


def test_the_only_batch_that_is_changed_in_place_is_told(watched: Any) -> None:
    batches = [(5 * torch.rand(6, 4), torch.rand(6, 1))]
    assert epochs(watched, lambda x, y: (x.div_(5).sub_(0.5), y), batches) == ["SL866"]


def test_a_trainer_tells_the_line_that_changes_its_data() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            image = batch["image"]
            image.sub_(0.3)
            return F.cross_entropy(self.model(image), batch["label"])

    torch.manual_seed(0)
    data = [{"image": torch.rand(6, 4), "label": torch.randint(0, 3, (6,))} for _ in range(3)]
    trainer = Run(
        model=net(3),
        data=data * 4,
        optimizers={"type": "SGD", "lr": 0.01},
        run={"max_steps": 12, "device": "cpu"},
        log={"sinks": []},
    )
    with pytest.raises(sl.FaultError, match=r"image\.sub_"):
        trainer.fit()


def collated() -> list[tuple[Tensor, Tensor]]:
    return [(torch.stack([torch.ones(4) * i for i in range(6)]), torch.zeros(6, 1)) for _ in range(4)]


class Filled:
    """Buffers that are filled anew for each batch, by torch or by numpy."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.buffers = [(torch.rand(6, 4), torch.rand(6, 1)) for _ in range(2)]

    def __call__(self) -> Any:
        for i in range(4):
            x, y = self.buffers[i % 2]
            if self.how == "numpy":
                x.numpy()[:] = 1.0 + i
            else:
                x.copy_(torch.rand(6, 4))
            yield x, y


def undone(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.mul(2.0).mul_(0.5), y


HARMLESS: dict[str, tuple[Any, Any]] = {
    "collated afresh": (CHANGES["chained"], collated),
    "filled by copy_": (CHANGES["chained"], Filled("copy")),
    "filled by numpy": (CHANGES["chained"], Filled("numpy")),
    "a new tensor": (lambda x, y: (x / 5 - 0.5, y), None),
    "a copy in place": (lambda x, y: (x.clone().div_(5).sub_(0.5), y), None),
    "a product in place": (undone, None),
    "noise": (lambda x, y: (x.add_(0.01 * torch.randn(6, 4)), y), None),
    "its own mean": (lambda x, y: (x.sub_(x.mean(0)).div_(x.std(0)), y), None),
    "times one": (lambda x, y: (x.mul_(1.0), y), None),
}


@pytest.mark.parametrize(("prepare", "batches"), HARMLESS.values(), ids=HARMLESS)
def test_data_that_does_not_come_again_changed_is_well(watched: Any, prepare: Any, batches: Any) -> None:
    assert epochs(watched, prepare, batches) == []


def test_data_that_is_scaled_back_after_its_use_is_well(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = [torch.rand(6, 4) for _ in range(3)]
    with watched(model, optimizer) as audit:
        for x in batches * 4:
            x.mul_(4.0)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            x.div_(4.0)
            audit.step()
    assert codes(audit) == []


def test_state_that_decays_or_gathers_is_well(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    noise, traces, clients = torch.ones(6, 4), [torch.ones(6, 4), torch.ones(6, 4)], [torch.zeros(6, 4)] * 2
    with watched(model, optimizer) as audit:
        for step in range(16):
            noise.mul_(0.9)
            for trace in traces:
                trace.mul_(0.8)
            client = clients[step % 2]
            client.mul_(0.9).add_(0.1 * torch.randn(6, 4))
            optimizer.zero_grad()
            sum(model(x).square().mean() for x in (noise, *traces, client)).backward()
            optimizer.step()
            audit.step()
    assert codes(audit) == []


# ---- data that a loss written by hand changes


def scaled_and_bounded(out: Tensor, item: dict[str, Tensor]) -> Tensor:
    return (out.squeeze(1) - item["reward"].clamp_(min=-5).mul_(1.5)).square().mean()


def scaled_before(out: Tensor, item: dict[str, Tensor]) -> Tensor:
    rewards = item["reward"]
    rewards /= 10.0
    return F.softplus(rewards - out.squeeze(1)).mean()


def bounded_alone(out: Tensor, item: dict[str, Tensor]) -> Tensor:
    return (out.squeeze(1) - item["reward"].clamp_(-0.5, 0.5)).square().mean()


def a_new_tensor(out: Tensor, item: dict[str, Tensor]) -> Tensor:
    return (out.squeeze(1) - item["reward"].clamp(min=-5).mul_(1.5)).square().mean()


def weights_that_age(out: Tensor, item: dict[str, Tensor]) -> Tensor:
    item["weight"].mul_(0.9)
    return (item["weight"] * (out.squeeze(1) - item["reward"]).square()).mean()


def an_average_of_each(out: Tensor, item: dict[str, Tensor]) -> Tensor:
    item["mean"].mul_(0.9).add_(0.1 * item["reward"])
    return (out.squeeze(1) - item["mean"]).square().mean()


def _replayed(watched: Any, loss_of: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> list[str]:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(2)
    buffer = [{"x": torch.randn(6, 4), "reward": torch.randn(6), "weight": torch.ones(6)} for _ in range(4)]
    buffer = [item | {"mean": torch.ones(6)} for item in buffer]
    with watched(model, optimizer) as audit:
        for _ in range(18):
            item = buffer[int(torch.randint(0, 4, (), generator=order))]
            optimizer.zero_grad()
            loss_of(model(item["x"]), item).backward()
            optimizer.step()
            audit.step()
    return codes(audit)


@pytest.mark.parametrize("loss_of", [scaled_and_bounded, scaled_before])
def test_rewards_of_a_replay_buffer_that_a_loss_changes_are_told(watched: Any, loss_of: Any) -> None:
    assert _replayed(watched, loss_of) == ["SL866"]


@pytest.mark.parametrize("loss_of", [bounded_alone, a_new_tensor, weights_that_age, an_average_of_each])
def test_what_a_loss_may_do_to_its_items_is_well(watched: Any, loss_of: Any) -> None:
    assert _replayed(watched, loss_of) == []


# ---- buffers that move in evaluation


class Codebook(nn.Module):
    """Nearest codes, which follow what is assigned to them."""

    def __init__(self, guard: bool = False, persistent: bool = True) -> None:
        super().__init__()
        self.guard = guard
        self.register_buffer("codes", torch.randn(6, 8), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.cdist(x.detach(), self.codes).argmin(-1)
        found = self.codes[index]
        if self.training or not self.guard:
            with torch.no_grad():
                hot = F.one_hot(index, 6).float()
                self.codes.data.lerp_((hot.T @ x) / hot.sum(0).clamp(min=1)[:, None], 0.1)
        return x + (found - x).detach()


class Centre(nn.Module):
    """Takes a running mean off its input."""

    def __init__(self, guard: bool = False) -> None:
        super().__init__()
        self.guard = guard
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.centre.clone()
        if self.training or not self.guard:
            self.centre.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return out


class Usage(nn.Module):
    """Counts how much each unit is used, for a plot."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("usage", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.usage.mul_(0.99).add_((x > 0).float().mean(0))
        return x


class Ranges(nn.Module):
    """Follows the range of each channel for a fake quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        self.amax.lerp_(x.detach().abs().amax(0), 0.1)
        return x + ((x / self.amax.clone()).round() * self.amax.clone() - x).detach()


class Leaky(nn.Module):
    """A membrane that each sequence begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("membrane", torch.zeros(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.membrane.zero_()
        for _ in range(2):
            self.membrane.mul_(0.5).add_(x.detach())
        return x * self.membrane.clone().sigmoid()


def with_evaluations(watched: Any, inner: nn.Module, evaluate: Any = None, steps: int = 16) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), inner, nn.Linear(8, 1))
    optimizer = Adam(model.parameters(), lr=1e-2)

    def usual(model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            for _ in range(2):
                F.mse_loss(model(torch.randn(6, 4)), torch.randn(6, 1))
        model.train()

    with watched(model, optimizer) as audit:
        for step in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(6, 4)), torch.randn(6, 1)).backward()
            optimizer.step()
            if step % 4 == 3:
                (evaluate or usual)(model)
            audit.step()
    return audit


@pytest.mark.parametrize("inner", [Codebook, Centre])
def test_a_buffer_that_evaluations_move_is_told(watched: Any, inner: Any) -> None:
    audit = with_evaluations(watched, inner())
    assert codes(audit) == ["SL723"]
    assert "`1.c" in audit.faults[0].what
    assert "lerp_" in audit.faults[0].where or "mul_" in audit.faults[0].where


@pytest.mark.parametrize(
    "inner",
    [
        lambda: Codebook(guard=True),
        lambda: Codebook(persistent=False),
        lambda: Centre(guard=True),
        Usage,
        Ranges,
        Leaky,
        lambda: nn.BatchNorm1d(8),
    ],
    ids=["guarded", "not saved", "guarded centre", "for a plot", "ranges", "sequence", "batch norm"],
)
def test_buffers_that_may_move_are_well(watched: Any, inner: Any) -> None:
    assert codes(with_evaluations(watched, inner())) == []


def restored(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    model.eval()
    with torch.no_grad():
        F.mse_loss(model(torch.randn(6, 4)), torch.randn(6, 1))
    model.load_state_dict(before)
    model.train()


def on_a_copy(model: nn.Module) -> None:
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        F.mse_loss(twin(torch.randn(6, 4)), torch.randn(6, 1))


def collecting(model: nn.Module) -> None:
    """As an agent collects what it is trained on: without a loss."""
    model.eval()
    with torch.no_grad():
        model(torch.randn(6, 4))
    model.train()


@pytest.mark.parametrize("evaluate", [restored, on_a_copy, collecting])
def test_evaluations_that_leave_nothing_behind_are_well(watched: Any, evaluate: Any) -> None:
    assert codes(with_evaluations(watched, Centre(), evaluate)) == []


def test_a_codebook_that_is_always_in_eval_mode_is_well(watched: Any) -> None:
    class Fixed(Codebook):
        def train(self, mode: bool = True) -> Fixed:
            return super().train(mode=False)

    assert codes(with_evaluations(watched, Fixed().eval())) == []


# ---- gradients too small to move anything


def deep(std: float | None, activation: Callable[[], nn.Module], depth: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(4 if not i else 24, 24), activation()]
    model = nn.Sequential(*layers, nn.Linear(24, 1))
    for layer in model:
        if isinstance(layer, nn.Linear) and std is not None:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
    return model


def trained(watched: Any, model: nn.Module, lr: float = 1e-3) -> list[str]:
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    with watched(model, optimizer) as audit:
        for step in range(24):
            for group in optimizer.param_groups:
                group["lr"] = lr * (step + 1) / 24
            optimizer.zero_grad()
            (model(torch.randn(16, 4)) - 1).square().mean().backward()
            optimizer.step()
            audit.step()
    return codes(audit)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU, nn.Softsign])
def test_a_deep_net_of_tiny_weights_is_told(watched: Any, activation: Any) -> None:
    assert trained(watched, deep(0.01, activation)) == ["SL504"]


class Branch(nn.Module):
    """A residual branch behind a small scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.full((4,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


class LowRank(nn.Module):
    """A frozen layer with an adapter that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    "model",
    [
        lambda: deep(None, nn.Tanh),
        lambda: deep(None, nn.Tanh, depth=14),
        lambda: nn.Sequential(*[Branch(1e-6) for _ in range(6)], nn.Linear(4, 1)),
        lambda: nn.Sequential(*[Branch(0.0) for _ in range(6)], nn.Linear(4, 1)),
        lambda: nn.Sequential(*[LowRank() for _ in range(4)], nn.Linear(4, 1).requires_grad_(False)),
    ],
    ids=["default", "deeper", "layer scale", "zero", "adapters"],
)
@pytest.mark.parametrize("lr", [1e-2, 1e-7])
def test_deep_nets_with_small_branches_are_well(watched: Any, model: Any, lr: float) -> None:
    torch.manual_seed(0)
    assert trained(watched, model(), lr) == []
