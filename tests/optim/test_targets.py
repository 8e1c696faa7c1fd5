"""Optimizers that the config names by their class, and Muon beside AdamW, against plain loops: the same bits."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}


class Signs(torch.optim.Optimizer):
    """An optimizer of somebody else's: follows the sign of the gradient."""

    def __init__(self, params: Any, lr: float = 0.1, *, decay: float = 0.0) -> None:
        if lr < 0:
            raise ValueError(f"invalid lr {lr}")
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(parameter.grad.sign(), alpha=group["lr"])


class TwoPasses(torch.optim.SGD):
    """As sharpness-aware minimisation has it: no step without a closure."""

    def step(self, closure: Any) -> None:
        closure()


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package that the user has installed and allowed."""
    module = types.ModuleType("somebodys_optimizers")
    module.Signs, module.TwoPasses, module.Linear = Signs, TwoPasses, nn.Linear
    for cls in (Signs, TwoPasses):
        monkeypatch.setattr(cls, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(n)]


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def train(optimizers: Any, **sections: Any) -> nn.Sequential:
    net = make_net()
    sections = {"run": {"max_steps": 12}, "allow_modules": ["somebodys_optimizers"], **sections}
    Classify(model=net, data=batches(), optimizers=optimizers, log=OFF, **sections).fit()
    return net


def plain(net: nn.Sequential, optimizers: list[torch.optim.Optimizer], clip: Any = None, after: Any = None) -> None:
    for x, y in batches() * 2:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
        if after is not None:
            after.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, ours), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.usefixtures("others")
def test_a_third_partys_optimizer_has_the_bits_of_the_plain_loop() -> None:
    theirs = make_net()
    biases = [p for name, p in theirs.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in theirs.named_parameters() if not name.endswith("bias")]
    optimizer = Signs([{"params": biases, "decay": 0.0}, {"params": weights}], lr=0.01, decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    plain(theirs, [optimizer], clip=0.5, after=schedule)
    spec = {
        "target": "somebodys_optimizers:Signs",
        "args": {"lr": 0.01, "decay": 0.1},
        "groups": [{"params": ["*.bias"], "args": {"decay": 0.0}}],
        "max_norm": 0.5,
        "scheduler": {"type": "ExponentialLR", "gamma": 0.9},
    }
    assert_same(train(spec), theirs)
    assert_same(train({"only": spec}), theirs)


@pytest.mark.usefixtures("others")
def test_a_third_partys_optimizer_beside_one_of_torchs_has_the_bits_of_the_plain_loop() -> None:
    theirs = make_net()
    plain(theirs, [Signs(theirs[0].parameters(), 0.01), torch.optim.SGD(theirs[2].parameters(), 0.1, fused=True)])
    optimizers = {
        "body": {"target": "somebodys_optimizers:Signs", "args": {"lr": 0.01}, "params": ["0.*"]},
        "head": {"type": "SGD", "lr": 0.1, "params": "rest"},
    }
    assert_same(train(optimizers), theirs)


@pytest.mark.parametrize("as_target", [False, True])
def test_muon_for_matrices_beside_adamw_has_the_bits_of_the_plain_loop(as_target: bool) -> None:
    theirs = make_net()
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    rest = [p for p in theirs.parameters() if p.dim() != 2]
    plain(theirs, [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3, fused=True)])
    muon = {"target": "torch.optim:Muon", "args": {"lr": 0.02}} if as_target else {"type": "Muon", "lr": 0.02}
    optimizers = {
        "matrices": {**muon, "params": ["*.weight"]},
        "others": {"type": "AdamW", "lr": 1e-3, "params": "rest"},
    }
    assert_same(train(optimizers), theirs)


def test_the_resolved_config_makes_the_same_optimizer_again(others: types.ModuleType, tmp_path: Path) -> None:
    spec = {
        "target": "somebodys_optimizers:Signs",
        "args": {"lr": 0.5},
        "groups": [{"params": ["a"], "args": {"lr": 1}}],
    }
    allow = ["somebodys_optimizers"]
    given = ["model", "data", "trainer"]
    first = sl.config.load(sections={"run": {"max_steps": 1}, "optimizers": spec}, allow_modules=allow, given=given)
    sections = first.config.resolved()
    again = sl.config.load(sections=sections, allow_modules=allow, given=given, environment={})
    assert again.config == first.config
    assert again.config.optimizers["main"].groups[0].arguments() == {"lr": 1}
    path = tmp_path / "config.yaml"
    path.write_text("run: {max_steps: 1}\noptimizers: {target: 'somebodys_optimizers:Signs', args: {lr: 0.5}}\n")
    changed = ["optimizers.args.lr=0.25"]
    over = sl.config.load(path, overrides=changed, allow_modules=allow, given=given, environment={})
    assert over.config.optimizers["main"].args == {"lr": 0.25}


T = "somebodys_optimizers"


@pytest.mark.parametrize(
    ("spec", "code", "path"),
    [
        ({"target": "os:abort"}, "SL110", "optimizers.main.target"),
        ({"target": f"{T}:Sings"}, "SL111", "optimizers.main.target"),
        ({"target": f"{T}:Linear"}, "SL112", "optimizers.main.target"),
        ({"target": f"{T}:Signs", "args": {"lrr": 0.1}}, "SL113", "optimizers.main.args.lrr"),
        ({"target": f"{T}:Signs", "lr": 0.1}, "SL101", "optimizers.main.lr"),
        ({"target": f"{T}:Signs", "args": [0.1]}, "SL103", "optimizers.main.args"),
        ({"target": f"{T}:Signs", "args": {"params": ["a"]}}, "SL113", "optimizers.main.args.params"),
        ({"target": f"{T}:TwoPasses", "args": {"lr": 0.1}}, "SL114", "optimizers.main.target"),
        ({"target": f"{T}:Signs", "max_norm": 1.0, "clip_value": 1.0}, "SL120", "optimizers.main.clip_value"),
        ({"lr": 0.1, "momentum": 0.9}, "SL103", "optimizers.lr"),
    ],
)
@pytest.mark.usefixtures("others")
def test_what_cannot_be_meant_is_refused(spec: dict[str, Any], code: str, path: str) -> None:
    with pytest.raises(sl.FaultError, match=code) as caught:
        train(spec)
    assert path in caught.value.fault.where


@pytest.mark.usefixtures("others")
def test_what_the_class_itself_refuses_is_shown_at_its_place() -> None:
    with pytest.raises(sl.FaultError, match="SL114") as caught:
        train({"target": f"{T}:Signs", "args": {"lr": -1.0}})
    assert "invalid lr -1.0" in str(caught.value)
    assert f"target {T}:Signs" in caught.value.fault.fix
