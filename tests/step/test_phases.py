"""Phases: own forwards, fresh batches, own optimizers, and gradients that never leak."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}
ADAM = {"type": "Adam", "lr": 1e-2, "betas": [0.0, 0.9]}


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def make_nets() -> Nets:
    torch.manual_seed(0)
    return Nets()


def real_batches(n: int = 12) -> list[Tensor]:
    return list(torch.randn(n, 16, 2, generator=torch.Generator().manual_seed(1)))


class Gan(sl.Trainer):
    @sl.phase(trains="critic", repeat=3)
    def critic_phase(self, real: Tensor) -> dict[str, Tensor]:
        fake = self.model.generator(torch.randn(len(real), 3))
        loss = F.softplus(-self.model.critic(real)).mean() + F.softplus(self.model.critic(fake)).mean()
        return {"critic": loss}

    @sl.phase(trains="generator")
    def generator_phase(self, real: Tensor) -> dict[str, Tensor]:
        fake = self.model.generator(torch.randn(len(real), 3))
        return {"generator": F.softplus(-self.model.critic(fake)).mean()}


def gan(nets: Nets, **sections: Any) -> Gan:
    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": "rest"}}
    sections = {"run": {"max_steps": 6, "seed": 5}, "log": OFF, **sections}
    return Gan(model=nets, data=real_batches(), optimizers=optimizers, **sections)


def test_a_gan_has_the_bits_of_the_careful_hand_written_loop() -> None:
    nets = make_nets()
    plain = copy.deepcopy(nets)
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.0, 0.9), "fused": True}
    critic, generator = (torch.optim.Adam(net.parameters(), **options) for net in (plain.critic, plain.generator))
    torch.manual_seed(5)
    batches = iter(real_batches() * 9)
    for _ in range(6):
        for _ in range(3):
            real = next(batches)
            critic.zero_grad()
            fake = plain.generator(torch.randn(16, 3)).detach()
            (F.softplus(-plain.critic(real)).mean() + F.softplus(plain.critic(fake)).mean()).backward()
            critic.step()
        next(batches)
        generator.zero_grad()
        F.softplus(-plain.critic(plain.generator(torch.randn(16, 3)))).mean().backward()
        generator.step()
    gan(nets).fit()
    for name, tensor in nets.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_no_gradient_of_one_phase_is_left_in_what_another_trains() -> None:
    seen: list[tuple[str, bool, bool]] = []

    class Watch(Gan):
        @sl.phase(trains="critic")
        def critic_phase(self, real: Tensor) -> dict[str, Tensor]:
            seen.append(("critic", *self._state()))
            return super().critic_phase(real)

        @sl.phase(trains="generator")
        def generator_phase(self, real: Tensor) -> dict[str, Tensor]:
            seen.append(("generator", *self._state()))
            critic_grads = [p.grad.clone() for p in self.model.critic.parameters()]
            self.after = critic_grads
            return super().generator_phase(real)

        def _state(self) -> tuple[bool, bool]:
            nets = self.model
            return all(p.requires_grad for p in nets.critic.parameters()), all(
                p.requires_grad for p in nets.generator.parameters()
            )

    nets = make_nets()
    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": "rest"}}
    trainer = Watch(model=nets, data=real_batches(), optimizers=optimizers, run={"max_steps": 2}, log=OFF)
    trainer.fit()
    assert seen == [("critic", True, False), ("generator", False, True)] * 2
    assert all(p.requires_grad for p in nets.parameters()), "everything thaws again"
    for before, parameter in zip(trainer.after, nets.critic.parameters(), strict=True):
        assert torch.equal(before, parameter.grad), "the generator's loss reached the critic's gradients"


def test_what_the_user_froze_stays_frozen_and_everything_thaws_after_an_exception() -> None:
    nets = make_nets()
    nets.generator[0].requires_grad_(False)

    class Fails(Gan):
        @sl.phase(trains="generator")
        def generator_phase(self, real: Tensor) -> dict[str, Tensor]:
            raise KeyError("user error")

    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": "rest"}}
    trainer = Fails(model=nets, data=real_batches(), optimizers=optimizers, run={"max_steps": 2}, log=OFF)
    with pytest.raises(KeyError, match="user error"):
        trainer.fit()
    assert not nets.generator[0].weight.requires_grad
    assert nets.generator[2].weight.requires_grad
    assert all(p.requires_grad for p in nets.critic.parameters())


def test_a_config_overrides_repeat_and_every() -> None:
    calls: list[str] = []

    class Watch(Gan):
        def critic_phase(self, real: Tensor) -> dict[str, Tensor]:
            calls.append("c")
            return super().critic_phase(real)

        def generator_phase(self, real: Tensor) -> dict[str, Tensor]:
            calls.append("g")
            return super().generator_phase(real)

    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": "rest"}}
    phases = {"critic_phase": {"repeat": 2}, "generator_phase": {"every": 2}}
    run = {"max_steps": 4}
    result = Watch(model=make_nets(), data=real_batches(), optimizers=optimizers, phases=phases, run=run, log=OFF).fit()
    assert "".join(calls) == "ccgccccgcc"
    assert result.steps == 4, "a step is one pass through the plan, whatever the number of optimizers"


def test_the_plan_shows_both_phases() -> None:
    text = str(gan(make_nets()).plan())
    assert "phase critic_phase x3   (a fresh micro-batch each)   trains critic; generator frozen" in text
    assert "phase generator_phase x1   (one micro-batch)   trains generator; critic frozen" in text


def test_a_phase_that_trains_no_optimizer_is_refused_with_the_nearest_name() -> None:
    class Typo(sl.Trainer):
        @sl.phase(trains="critc")
        def fit_critic(self, batch: Tensor) -> dict[str, Tensor]:
            return {"value": self.model(batch).mean()}

    with pytest.raises(sl.FaultError, match="did you mean `critic`") as caught:
        Typo(model=nn.Linear(2, 1), data=real_batches(), optimizers={"critic": ADAM}, run={"max_steps": 1}).fit()
    assert caught.value.fault.code == "SL603"


def test_a_nan_in_one_phase_leaves_what_it_trains_unchanged() -> None:
    nets = make_nets()
    data = real_batches()
    data[3] = torch.full_like(data[3], torch.nan)

    class Uses(Gan):
        @sl.phase(trains="generator")
        def generator_phase(self, real: Tensor) -> dict[str, Tensor]:
            self.before = copy.deepcopy(self.model.generator.state_dict())
            return {"generator": (self.model.generator(torch.randn(16, 3)) - real).square().mean()}

    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": "rest"}}
    trainer = Uses(model=nets, data=data, optimizers=optimizers, run={"max_steps": 4}, log=OFF)
    with pytest.raises(sl.FaultError):
        trainer.fit()
    for name, tensor in nets.generator.state_dict().items():
        assert torch.equal(tensor, trainer.before[name]), name


def test_phases_of_a_config_only_run_share_out_its_losses() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    data = [(x, torch.zeros(16, 1)) for x in real_batches(4)]
    section = {
        "model": model,
        "data": data,
        "optimizers": {"a": {**ADAM, "params": ["0.*"]}, "b": {**ADAM, "params": ["1.*"]}},
        "losses": {
            "mse": {"type": "MSELoss", "inputs": ["output", "batch.1"]},
            "mae": {"type": "L1Loss", "inputs": ["output", "batch.1"]},
        },
        "run": {"max_steps": 2},
        "log": OFF,
    }
    phases = {
        "first": {"trains": ["a"], "losses": ["mse"], "repeat": 2},
        "second": {"trains": ["b"], "losses": ["mae"]},
    }
    trainer = sl.Trainer(**section, phases=phases)
    assert [phase.name for phase in trainer.plan().phases] == ["first", "second"]
    assert set(trainer.fit().losses) == {"train", "mse", "mae"}
    with pytest.raises(sl.FaultError, match="does not say its `losses`"):
        sl.Trainer(**section, phases={"first": {"trains": ["a"]}}).fit()
    with pytest.raises(sl.FaultError, match="`huber`, which is no loss"):
        sl.Trainer(**section, phases={"first": {"trains": ["a", "b"], "losses": ["huber"]}}).fit()


def test_a_phase_of_the_config_that_the_trainer_does_not_have_is_refused() -> None:
    with pytest.raises(sl.FaultError, match="Gan has no phase `critic`") as caught:
        gan(make_nets(), phases={"critic": {"repeat": 2}}).fit()
    assert "critic_phase" in caught.value.fault.fix


def test_a_phase_that_does_not_reach_one_of_its_optimizers_is_refused_before_the_update() -> None:
    class HalfReached(sl.Trainer):
        @sl.phase(trains=["critic", "generator"])
        def fit_both(self, real: Tensor) -> dict[str, Tensor]:
            return {"critic": self.model.critic(real).square().mean()}

    nets = make_nets()
    before = copy.deepcopy(nets.state_dict())
    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": "rest"}}
    with pytest.raises(sl.FaultError, match="no parameter of `generator`") as caught:
        HalfReached(model=nets, data=real_batches(), optimizers=optimizers, run={"max_steps": 1}, log=OFF).fit()
    assert caught.value.fault.code == "SL413"
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets.state_dict().items())
