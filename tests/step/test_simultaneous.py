"""One forward, every term confined to what it trains, all updates at the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}
SGD = {"type": "SGD", "lr": 0.1, "momentum": 0.5}
OPTIMIZERS = {"critic": {**SGD, "params": ["critic.*"]}, "generator": {**SGD, "params": "rest"}}
LOSSES = {"critic": {"trains": ["critic.*"]}, "generator": {"trains": ["generator.*"], "weight": 2.0}}


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def make_nets() -> Nets:
    torch.manual_seed(0)
    return Nets()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 2, generator=generator), torch.randn(16, 3, generator=generator)) for _ in range(4)]


class Gan(sl.Trainer):
    def losses(self, batch: Any) -> dict[str, Tensor]:
        real, noise = batch
        score = self.model.critic(self.model.generator(noise))
        critic = F.softplus(-self.model.critic(real)).mean() + F.softplus(score).mean()
        return {"critic": critic, "generator": F.softplus(-score).mean()}


def train(nets: nn.Module, cls: type[sl.Trainer] = Gan, **sections: Any) -> sl.RunResult:
    sections = {"optimizers": OPTIMIZERS, "losses": LOSSES, "run": {"max_steps": 8}, "log": OFF, **sections}
    return cls(model=nets, data=data(), simultaneous=True, **sections).fit()


def test_it_has_the_bits_of_separate_gradients_at_the_same_weights() -> None:
    nets = make_nets()
    plain = copy.deepcopy(nets)
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5, fused=True) for net in (plain.critic, plain.generator)
    ]
    for real, noise in data() * 2:
        score = plain.critic(plain.generator(noise))
        critic = F.softplus(-plain.critic(real)).mean() + F.softplus(score).mean()
        generator = 2.0 * F.softplus(-score).mean()
        for net, term in ((plain.critic, critic), (plain.generator, generator)):
            gradients = torch.autograd.grad(term, list(net.parameters()), retain_graph=True)
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    train(nets)
    for name, tensor in nets.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_the_plan_says_what_reaches_what() -> None:
    trainer = Gan(
        model=make_nets(),
        data=data(),
        simultaneous=True,
        optimizers=OPTIMIZERS,
        losses=LOSSES,
        run={"max_steps": 1},
        log=OFF,
    )
    assert "critic -> critic.*; 2 generator -> generator.*" in str(trainer.plan())


def test_a_term_that_does_not_say_what_it_trains_is_refused() -> None:
    with pytest.raises(sl.FaultError, match=r"losses\.generator\.trains"):
        train(make_nets(), losses={"critic": LOSSES["critic"]})


def test_a_term_that_reaches_nothing_it_trains_is_refused() -> None:
    class Cut(Gan):
        def losses(self, batch: Any) -> dict[str, Tensor]:
            _, noise = batch
            score = self.model.critic(self.model.generator(noise).detach())
            return {"critic": score.mean(), "generator": -score.mean()}

    with pytest.raises(sl.FaultError) as caught:
        train(make_nets(), Cut)
    assert caught.value.fault.code == "SL412"


def test_a_reentrant_checkpoint_is_refused() -> None:
    class Saves(Gan):
        def losses(self, batch: Any) -> dict[str, Tensor]:
            _, noise = batch
            fake = checkpoint(self.model.generator, noise.requires_grad_(), use_reentrant=True)
            score = self.model.critic(fake)
            return {"critic": score.mean(), "generator": -score.mean()}

    with pytest.raises(sl.FaultError, match="re-entrant"):
        train(make_nets(), Saves)
