"""Bugs around the step that leave every gradient as it should be, each beside what looks like it and is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def codes(
    body: Callable[[int, nn.Module], Tensor],
    model: Any = None,
    after: Callable[[nn.Module], None] | None = None,
    steps: int = 24,
    optimizer: Any = None,
) -> list[str]:
    """The codes of a loop whose loss `body` computes."""
    model = net() if model is None else model
    trained = model["online"] if isinstance(model, dict) else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05) if optimizer is None else optimizer
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for step in range(steps):
            optimizer.zero_grad()
            body(step, trained).backward()
            optimizer.step()
            if after is not None:
                after(trained)
            audit.step()
    return [fault.code for fault in audit.faults]


# ---- kept weights that are the live ones


class Keeper:
    """Keeps the best weights of a model, in one of several ways."""

    def __init__(self, how: str) -> None:
        self.how, self.best_weights, self.best_step = how, None, 0

    def look(self, model: nn.Module) -> None:
        self.best_weights = {
            "alias": lambda: model.state_dict(),
            "nested": lambda: {"model": model.state_dict(), "step": 3},
            "deepcopy": lambda: copy.deepcopy(model.state_dict()),
            "clone": lambda: {k: v.clone() for k, v in model.state_dict().items()},
            "parameters": lambda: dict(model.named_parameters()),
        }[self.how]()


@pytest.mark.parametrize(
    ("how", "expected"),
    [("alias", ["SL720"]), ("nested", ["SL720"]), ("deepcopy", []), ("clone", []), ("parameters", [])],
)
def test_the_best_weights_are_kept_by_an_object(how: str, expected: list[str]) -> None:
    class Loop:
        def __init__(self) -> None:
            self.best = Keeper(how)
            self.best_weights: Any = None

        def run(self) -> list[str]:
            def after(model: nn.Module) -> None:
                self.best.look(model)
                self.best_weights = self.best.best_weights

            return codes(lambda step, m: m(torch.randn(8, 4)).square().mean(), after=after)

    assert Loop().run() == expected


def test_a_state_that_is_written_to_a_file_at_once_may_be_an_alias(tmp_path: Any) -> None:
    def run() -> list[str]:
        model, best_state = net(), {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
            for _ in range(24):
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                best_state = model.state_dict()
                torch.save(best_state, tmp_path / "best.pt")
                audit.step()
        return [fault.code for fault in audit.faults]

    assert run() == []


def test_a_trainer_that_keeps_the_first_weights_without_a_copy_is_told() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            if self.step == 0:
                self.initial_state = self.model.state_dict()
            return self.model(batch).square().mean()

    sections: dict[str, Any] = {"optimizers": {"type": "SGD", "lr": 0.01}, "log": {"sinks": []}}
    run = Run(model=net(), data=[torch.randn(8, 4)], run={"max_steps": 24}, **sections)
    assert [(fault.code, fault.names) for fault in run.fit().faults] == [("SL720", ("self.initial_state",))]


# ---- optimizers that move what is not trained


class Theirs(torch.optim.Optimizer):
    """Decoupled weight decay, of everything or of what has a gradient."""

    def __init__(self, parameters: Any, *, skips: bool) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.skips = skips

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None and self.skips:
                    continue
                p.data.mul_(0.99)
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize(("skips", "expected"), [(False, ["SL670"]), (True, [])])
def test_weight_decay_of_what_took_no_part(skips: bool, expected: list[str]) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 8), "even": nn.Linear(8, 1), "odd": nn.Linear(8, 1)})

    def loss(step: int, m: Any) -> Tensor:
        return m["odd" if step % 2 else "even"](m["body"](torch.randn(8, 4)).tanh()).square().mean()

    assert codes(loss, model, optimizer=Theirs(model.parameters(), skips=skips)) == expected


# ---- penalties that no loss contains


def slope(model: nn.Module, *, create_graph: bool = True) -> Tensor:
    x = torch.randn(8, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=create_graph)
    return gradient


def smooth() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def fit(model: nn.Module) -> Tensor:
    return (model(torch.randn(8, 4)) - 1).square().mean()


PENALTIES: dict[str, tuple[Callable[[int, nn.Module], Tensor], list[str]]] = {
    "lost": (lambda step, m: (slope(m).square().mean(), fit(m))[1], ["SL440"]),
    "added": (lambda step, m: fit(m) + slope(m).square().mean(), []),
    "added on every third step": (
        lambda step, m: (lambda p: fit(m) + p if step % 3 == 2 else fit(m))(slope(m).square().mean()),
        [],
    ),
    "weight zero": (lambda step, m: fit(m) + 0.0 * slope(m).square().mean(), []),
    "watched without a graph": (lambda step, m: (slope(m, create_graph=False).norm(), fit(m))[1], []),
    "forces that nobody takes a number of": (lambda step, m: (slope(m), fit(m))[1], []),
}


@pytest.mark.parametrize(("body", "expected"), PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_is_in_the_loss_or_it_is_told(body: Callable[[int, nn.Module], Tensor], expected: list[str]) -> None:
    assert codes(body, smooth()) == expected


def test_a_product_with_the_hessian_uses_the_gradient() -> None:
    def loss(step: int, model: nn.Module) -> Tensor:
        x = torch.randn(8, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), x)
        return fit(model) + 0.0 * curvature.detach().mean()

    assert codes(loss, smooth()) == []


# ---- copies whose statistics are left behind


@pytest.mark.parametrize(
    ("copies", "mode", "expected"),
    [("parameters", "eval", ["SL721"]), ("all", "eval", []), ("parameters", "train", []), ("nothing", "eval", [])],
)
def test_the_statistics_of_a_target_network(copies: str, mode: str, expected: list[str]) -> None:
    online = net()
    target = copy.deepcopy(online).requires_grad_(False).train(mode == "train")

    def loss(step: int, model: nn.Module) -> Tensor:
        x = torch.randn(16, 4) + 2
        with torch.no_grad():
            goal = target(x)
        return F.mse_loss(model(x), goal + 1)

    @torch.no_grad()
    def after(model: nn.Module) -> None:
        if copies != "nothing":
            for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        if copies == "all":
            for slow, fast in zip(target.buffers(), model.buffers(), strict=True):
                slow.copy_(fast)

    assert codes(loss, {"online": online, "target": target}, after) == expected


# ---- metrics that change grad mode


@pytest.mark.parametrize(("switches", "expected"), [(True, ["SL722"]), (False, [])])
def test_metrics_that_switch_grad_mode_on(switches: bool, expected: list[str]) -> None:
    modes: list[bool] = []

    class Run(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            return self.model(batch).square().mean()

        def metrics(self, batch: Any) -> dict[str, Tensor]:
            modes.append(torch.is_grad_enabled())
            if switches:
                torch.set_grad_enabled(True)
            return {"error": self.model(batch).abs().mean()}

    data = [torch.randn(8, 4) for _ in range(3)]
    sections: dict[str, Any] = {"optimizers": {"type": "SGD", "lr": 0.01}, "log": {"sinks": []}}
    result = Run(model=net(), data=data, eval_data=data, run={"max_steps": 3}, **sections).fit()
    assert [fault.code for fault in result.faults] == expected
    assert modes == [False] * 3
