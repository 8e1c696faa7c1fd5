"""What an epoch leaves, clips of the wrong network, switches that thaw too much: each beside what looks like it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW


def net(last: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, last))


def loss_of(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.randn(6, 4)), torch.randn(6, 1))


def codes(audit: Any) -> list[str]:
    return [fault.code for fault in audit.faults]


# ---- the last micro-batches of an epoch


@pytest.mark.parametrize(("length", "window"), [(10, 4), (14, 4), (13, 3)])
def test_micro_batches_that_every_epoch_leaves_are_told(watched: Any, length: int, window: int) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with watched(model, optimizer) as audit:
        for _ in range(3):
            optimizer.zero_grad()
            for i in range(length):
                (loss_of(model) / window).backward()
                if i % window == window - 1:
                    optimizer.step()
                    optimizer.zero_grad()
                audit.step()
    assert codes(audit) == ["SL655"]


def test_micro_batches_left_by_a_loop_that_zeroes_through_the_model(watched: Any) -> None:
    class Fitting:
        def __init__(self) -> None:
            self.net = net()
            self.optimizer = SGD(self.net.parameters(), lr=0.05, momentum=0.9)

        def epoch(self, audit: Any) -> None:
            self.net.zero_grad()
            pending = 0
            for _ in range(11):
                loss_of(self.net).mul(0.25).backward()
                pending += 1
                if pending == 4:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    pending = 0
                audit.step()

    fitting = Fitting()
    with watched(fitting.net, fitting.optimizer) as audit:
        for _ in range(2):
            fitting.epoch(audit)
    assert codes(audit) == ["SL655"]


def test_micro_batches_left_by_a_loop_that_zeroes_by_hand(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    with watched(model, optimizer) as audit:
        for _ in range(2):
            for p in model.parameters():
                p.grad = None
            for i in range(11):
                (loss_of(model) / 3).backward()
                if i % 3 == 2:
                    optimizer.step()
                    optimizer.zero_grad()
                audit.step()
    assert codes(audit) == ["SL655"]


def test_a_window_that_is_dropped_for_a_bad_batch_is_well(watched: Any) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with watched(model, optimizer) as audit:
        optimizer.zero_grad()
        pending = 0
        for i in range(30):
            x = torch.randn(6, 4)
            if i == 10:
                x[0] = float("nan")
            loss = model(x).square().mean()
            if not torch.isfinite(loss):
                optimizer.zero_grad()  # the whole window goes
                pending = 0
                continue
            (loss / 4).backward()
            pending += 1
            if pending == 4:
                optimizer.step()
                optimizer.zero_grad()
                pending = 0
            audit.step()
    assert codes(audit) == []


def test_one_helper_that_zeroes_after_steps_and_for_bad_batches_is_well(watched: Any) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def restart() -> int:
        optimizer.zero_grad()
        return 0

    with watched(model, optimizer) as audit:
        pending = restart()
        for i in range(30):
            if i == 14:
                pending = restart()
                continue
            (loss_of(model) / 4).backward()
            pending += 1
            if pending == 4:
                optimizer.step()
                pending = restart()
            audit.step()
    assert codes(audit) == []


def test_what_the_last_epoch_leaves_at_an_early_stop_is_well(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    with watched(model, optimizer) as audit:
        for _ in range(2):
            optimizer.zero_grad()
            for i in range(8):
                (loss_of(model) / 4).backward()
                if i % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
                audit.step()
        for _ in range(2):
            (loss_of(model) / 4).backward()
        optimizer.zero_grad()
    assert codes(audit) == []


# ---- clips of parameters that nobody trains


def trained_beside(watched: Any, clip: Any, steps: int = 8, **nets: nn.Module) -> list[str]:
    """A critic that follows its target, with a clip between backward and step."""
    critic = net()
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizer = SGD(critic.parameters(), lr=0.05)
    with watched({"critic": critic, "target": target, **nets}, optimizer) as audit:
        for step in range(steps):
            x = torch.randn(6, 4)
            with torch.no_grad():
                goal = torch.randn(6, 1) + 0.9 * target(x)
            optimizer.zero_grad()
            F.smooth_l1_loss(critic(x), goal).backward()
            clip(critic, target, step)
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                    slow.lerp_(fast, 0.05)
            audit.step()
    return codes(audit)


def test_a_clip_of_the_target_network_is_told(watched: Any) -> None:
    assert trained_beside(watched, lambda critic, target, _: clip_grad_norm_(target.parameters(), 10.0)) == ["SL640"]


def test_a_clip_of_a_copy_that_nobody_has_named_is_told(watched: Any) -> None:
    model = net(3)
    averaged = copy.deepcopy(model)
    optimizer = Adam(model.parameters(), lr=1e-2)
    with watched(model, optimizer) as audit:
        for _ in range(6):
            loss = F.cross_entropy(model(torch.randn(6, 4)), torch.randint(0, 3, (6,)))
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(list(averaged.parameters()), max_norm=1.0)
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(averaged.parameters(), model.parameters(), strict=True):
                    slow.mul_(0.99).add_(fast, alpha=0.01)
            audit.step()
    assert codes(audit) == ["SL640"]
    assert "0.weight" in str(audit.faults[0])


@pytest.mark.parametrize(
    "clip",
    [
        lambda critic, target, _: [clip_grad_norm_(m.parameters(), 1.0) for m in (target, critic)],
        lambda critic, target, _: [clip_grad_norm_(m.parameters(), 1.0) for m in (critic, target)],
        lambda critic, target, _: clip_grad_norm_([*critic.parameters(), *target.parameters()], 1.0),
        lambda critic, target, _: clip_grad_norm_(target.parameters(), float("inf")),
        lambda critic, target, step: clip_grad_norm_((target if step < 2 else critic).parameters(), 1.0),
        lambda critic, target, _: (
            [p.grad.clamp_(-1, 1) for p in critic.parameters()] and clip_grad_norm_(target.parameters(), 1.0)
        ),
    ],
    ids=["target first", "target last", "together", "a measure", "one line", "by hand"],
)
def test_a_clip_of_the_target_beside_that_of_the_critic_is_well(watched: Any, clip: Any) -> None:
    assert trained_beside(watched, clip) == []


def test_a_delayed_actor_that_is_clipped_always_is_well(watched: Any) -> None:
    critic, actor = net(), net(4)
    optimizers = {"critic": SGD(critic.parameters(), lr=0.05), "actor": SGD(actor.parameters(), lr=0.05)}
    with watched({"critic": critic, "actor": actor}, optimizers) as audit:
        for step in range(16):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            x = torch.randn(6, 4)
            F.mse_loss(critic(x), x.sum(1, keepdim=True)).backward()
            if step >= 8 and step % 2:
                (-critic(actor(x)).mean()).backward(inputs=list(actor.parameters()))
            clip_grad_norm_(actor.parameters(), 1.0)
            optimizers["critic"].step()
            if step >= 8 and step % 2:
                optimizers["actor"].step()
            audit.step()
    assert codes(audit) == []


# ---- switches that thaw what was frozen


class Judge(nn.Module):
    """A trained score on features that are not to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2))
        self.score = nn.Linear(8, 1)
        self.features.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.features(x))


def duel(watched: Any, on: Any, off: Any, judge: nn.Module | None = None, generator_first: bool = False) -> list[str]:
    """A generator and a judge that is switched off while the generator is trained."""
    torch.manual_seed(0)
    maker, judge = nn.Linear(3, 4), Judge() if judge is None else judge
    optimizers = {"maker": Adam(maker.parameters(), lr=1e-3), "judge": Adam(judge.parameters(), lr=1e-3)}

    def judged(step: int) -> None:
        on(judge, step)
        optimizers["judge"].zero_grad()
        fake = maker(torch.randn(6, 3)).detach()
        (F.softplus(-judge(torch.randn(6, 4))).mean() + F.softplus(judge(fake)).mean()).backward()
        optimizers["judge"].step()

    def made(step: int) -> None:
        off(judge, step)
        optimizers["maker"].zero_grad()
        F.softplus(-judge(maker(torch.randn(6, 3)))).mean().backward()
        optimizers["maker"].step()

    with watched({"maker": maker, "judge": judge}, optimizers) as audit:
        for step in range(12):
            for phase in (made, judged) if generator_first else (judged, made):
                phase(step)
            audit.step()
    return codes(audit)


@pytest.mark.parametrize("generator_first", [False, True])
def test_a_switch_that_thaws_frozen_features_is_told(watched: Any, generator_first: bool) -> None:
    def on(judge: nn.Module, step: int) -> None:
        judge.requires_grad_(True)

    def off(judge: nn.Module, step: int) -> None:
        judge.requires_grad_(False)

    assert duel(watched, on, off, generator_first=generator_first) == ["SL663"]


def test_an_actor_phase_that_thaws_the_encoder_of_the_critic_is_told(watched: Any) -> None:
    critic, actor = Judge(), net(4)
    both = {"critic": SGD(critic.parameters(), lr=1e-2), "actor": SGD(actor.parameters(), lr=1e-2)}
    with watched(nn.ModuleDict({"critic": critic, "actor": actor}), both) as audit:
        for _ in range(8):
            x = torch.randn(6, 4)
            both["critic"].zero_grad()
            F.mse_loss(critic(x), torch.randn(6, 1)).backward()
            both["critic"].step()
            for p in critic.parameters():
                p.requires_grad = False
            both["actor"].zero_grad()
            (-critic(actor(x)).mean()).backward()
            both["actor"].step()
            for p in critic.parameters():
                p.requires_grad = True
            audit.step()
    assert codes(audit) == ["SL663"]
    assert "p.requires_grad = True" in audit.faults[0].where


def test_switches_that_leave_frozen_features_alone_are_well(watched: Any) -> None:
    def off(judge: Any, step: int) -> None:
        judge.requires_grad_(False)

    def on_again(judge: Any, step: int) -> None:
        judge.requires_grad_(True)
        judge.features.requires_grad_(False)

    assert duel(watched, lambda judge, _: judge.score.requires_grad_(True), off) == []
    assert duel(watched, on_again, off, generator_first=True) == []


def test_features_that_thaw_after_a_while_are_well(watched: Any) -> None:
    def on(judge: Any, step: int) -> None:
        (judge if step >= 4 else judge.score).requires_grad_(True)

    assert duel(watched, on, lambda judge, _: judge.requires_grad_(False)) == []


def test_a_judge_that_is_frozen_as_a_whole_before_the_loop_is_well(watched: Any) -> None:
    judge = Judge().requires_grad_(False)
    switches = [lambda judge, _, flag=flag: judge.requires_grad_(flag) for flag in (True, False)]
    assert duel(watched, *switches, judge=judge, generator_first=True) == []


def test_a_model_that_thaws_once_is_well(watched: Any) -> None:
    model = Judge()
    optimizer = SGD(model.parameters(), lr=1e-2)
    with watched(model, optimizer) as audit:
        for step in range(14):
            if step == 5:
                model.requires_grad_(True)
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            audit.step()
    assert codes(audit) == []
