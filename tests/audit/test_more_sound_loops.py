"""More correct loops that look suspicious, of kinds that are rarer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR, AveragedModel

SOUND: list[Callable[[Any], None]] = []


def sound(loop: Callable[[Any], None]) -> Callable[[Any], None]:
    """Add a loop to those that must give no fault."""
    SOUND.append(loop)
    return loop


def net(last: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, last))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))


@pytest.mark.parametrize("loop", SOUND, ids=lambda loop: loop.__name__)
def test_a_sound_loop_gives_no_fault(loop: Callable[[Any], None], watched: Any) -> None:
    audits: list[Any] = []

    class Watch:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = watched(*args, **kwargs)

        def __enter__(self) -> Any:
            audits.append(self.inner.__enter__())
            return audits[-1]

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    torch.manual_seed(0)
    loop(Watch)
    assert audits
    faults = [fault for audit in audits for fault in audit.faults]
    assert faults == [], "\n".join(map(str, faults))


@sound
def averaged_weights_with_their_own_schedule(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    averaged, late = AveragedModel(model), SWALR(optimizer, swa_lr=0.01)
    scheduler = schedules.CosineAnnealingLR(optimizer, T_max=6)
    with watch(model, optimizer):
        for epoch in range(10):
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
            if epoch > 5:
                averaged.update_parameters(model)
                late.step()
            else:
                scheduler.step()


@sound
def a_long_run_whose_later_iterations_are_not_looked_at(watch: Any) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.05)
    scheduler = schedules.LinearLR(optimizer, 1.0, 0.1, total_iters=100)
    with watch(model, optimizer) as audit:
        for step in range(120):
            (loss_of(model) / 2).backward()
            if step % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            audit.step()


@sound
def a_step_told_once_an_epoch(watch: Any) -> None:
    model = nn.LSTM(4, 3, batch_first=True)
    optimizer = Adam(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(4):
            state = None
            for _ in range(5):
                out, state = model(torch.randn(2, 5, 4), state)
                state = tuple(s.detach() for s in state)
                optimizer.zero_grad()
                out.square().mean().backward()
                optimizer.step()
            audit.step()


@sound
def discriminator_that_starts_late(watch: Any) -> None:
    coder, disc = net(4), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    opt_c, opt_d = Adam(coder.parameters(), lr=0.01), Adam(disc.parameters(), lr=0.01)
    with watch({"coder": coder, "disc": disc}, {"c": opt_c, "d": opt_d}) as audit:
        for step in range(12):
            x = torch.randn(8, 4)
            out = coder(x)
            opt_c.zero_grad()
            loss = F.mse_loss(out, x)
            if step >= 5:
                loss = loss + 0.1 * F.softplus(-disc(out)).mean()
            loss.backward()
            opt_c.step()
            opt_d.zero_grad()
            if step >= 5:
                (F.softplus(-disc(x)) + F.softplus(disc(out.detach()))).mean().backward()
            opt_d.step()
            audit.step()


@sound
def deep_supervision_and_two_passes(watch: Any) -> None:
    blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    optimizer = SGD(blocks.parameters(), lr=0.01)
    with watch(blocks, optimizer) as audit:
        for _ in range(8):
            x, losses = torch.randn(8, 4), []
            for block in blocks:
                x = torch.tanh(block(x))
                losses.append(x.square().mean())
            optimizer.zero_grad()
            for i, loss in enumerate(losses):
                loss.backward(retain_graph=i < 2)
            optimizer.step()
            audit.step()


@sound
def greedy_training_of_one_layer_after_another(watch: Any) -> None:
    blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    each = [SGD(block.parameters(), lr=0.01) for block in blocks]
    with watch(blocks, each):
        for _ in range(8):
            x = torch.randn(8, 4)
            for block, optimizer in zip(blocks, each, strict=True):
                x = torch.tanh(block(x.detach()))
                optimizer.zero_grad()
                (x - 0.3).square().mean().backward()
                optimizer.step()


@sound
def ema_of_the_loss_and_early_stopping(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    best, kept, running = float("inf"), None, 0.0
    with watch(model, optimizer):
        for _ in range(30):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            running = 0.9 * running + 0.1 * loss.detach()
            if running < best:
                best, kept = float(running), copy.deepcopy(model.state_dict())
            if running > 100:
                break
    assert kept is not None


@sound
def gradients_kept_for_a_fisher_estimate(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    fisher = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    with watch(model, optimizer) as audit:
        for _ in range(3):
            for _ in range(4):
                model.zero_grad()
                loss_of(model).backward()
                for n, p in model.named_parameters():
                    fisher[n] += p.grad.detach() ** 2
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            audit.step()


@sound
def gradients_seen_by_hooks_alone(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    seen: list[float] = []
    for p in model.parameters():
        p.register_hook(lambda g: seen.append(g.norm().item()))
    with watch(model, optimizer) as audit:
        for _ in range(6):
            loss_of(model).backward()
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            audit.step()


@sound
def second_order_step_with_create_graph(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad()
            loss = loss_of(model)
            slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            (loss + 0.01 * sum(g.square().sum() for g in slopes)).backward()
            optimizer.step()
            audit.step()


@sound
def warm_restart_of_the_optimizer_state(watch: Any) -> None:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for step in range(10):
            if step == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                model.load_state_dict(copy.deepcopy(model.state_dict()))
            optimizer.zero_grad(set_to_none=False)
            loss_of(model).backward()
            optimizer.step()
            audit.step()


@sound
def backward_of_several_roots(watch: Any) -> None:
    model = net(2)
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            out = model(torch.randn(8, 4))
            optimizer.zero_grad()
            torch.autograd.backward([out[:, 0].mean(), out[:, 1].square().mean()], [torch.tensor(0.3), None])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            audit.step()


@sound
def cyclic_consistency_with_two_generators(watch: Any) -> None:
    a, b = net(4), net(4)
    disc = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    opt_g, opt_d = Adam([*a.parameters(), *b.parameters()], lr=0.01), Adam(disc.parameters(), lr=0.01)
    rates = [schedules.LambdaLR(o, lambda n: 1 - n / 20) for o in (opt_g, opt_d)]
    with watch({"a": a, "b": b, "disc": disc}, [opt_g, opt_d]) as audit:
        for _ in range(12):
            x = torch.randn(8, 4)
            disc.requires_grad_(False)
            opt_g.zero_grad()
            fake = a(x)
            (F.l1_loss(b(fake), x) + (disc(fake) - 1).square().mean()).backward()
            opt_g.step()
            disc.requires_grad_(True)
            opt_d.zero_grad()
            (0.5 * (disc(fake.detach()).square().mean() + (disc(x) - 1).square().mean())).backward()
            opt_d.step()
            for rate in rates:
                rate.step()
            audit.step()


@sound
def one_window_of_autocast_over_micro_batches(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for _ in range(3):
                    (model(torch.randn(8, 4)).float().square().mean() / 3).backward()
                    audit.step()
            optimizer.step()
            optimizer.zero_grad()


@sound
def manual_updates_beside_an_optimizer(watch: Any) -> None:
    model = net()
    optimizer = SGD(model[0].parameters(), lr=0.05)
    with watch(model, optimizer, accept={"SL201": ["2.*"]}) as audit:
        for _ in range(8):
            model.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            with torch.no_grad():
                for p in model[2].parameters():
                    p -= 0.05 * p.grad
            audit.step()


@sound
def a_head_that_is_stepped_more_often_than_its_body(watch: Any) -> None:
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    opt_body, opt_head = SGD(body.parameters(), lr=0.01), SGD(head.parameters(), lr=0.05)
    with watch({"body": body, "head": head}, {"body": opt_body, "head": opt_head}) as audit:
        for _ in range(8):
            opt_body.zero_grad()
            opt_head.zero_grad()
            loss_of(nn.Sequential(body, head)).backward()
            opt_head.step()
            opt_head.zero_grad()
            head(body(torch.randn(8, 4))).square().mean().backward()
            opt_head.step()
            opt_body.step()
            audit.step()


@sound
def a_scaler_that_nobody_names_with_two_losses(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer, scaler=()) as audit:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for _ in range(6):
            out = model(torch.randn(8, 4))
            optimizer.zero_grad()
            scaler.scale(out[:, 0].square().mean()).backward(retain_graph=True)
            scaler.scale(out[:, 1].square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            audit.step()


@sound
def an_optimizer_that_is_made_again(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for step in range(12):
            if step == 6:  # the watched one rests from here on
                optimizer = SGD(model.parameters(), lr=0.001)
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            audit.step()


@sound
def losses_on_alternating_tasks(watch: Any) -> None:
    body, heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
    optimizer = AdamW([*body.parameters(), *heads.parameters()], lr=0.01)
    with watch({"body": body, "heads": heads}, optimizer) as audit:
        for step in range(12):
            optimizer.zero_grad()
            loss_of(nn.Sequential(body, heads[step % 2])).backward()
            optimizer.step()
            audit.step()


@sound
def a_search_for_the_scale_from_far_above(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=1e-3)
    with watch(model, optimizer) as audit:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32)
        for _ in range(24):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(torch.randn(8, 4))
            scaler.scale(out.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()


@sound
def an_optimizer_whose_step_calls_that_of_its_base(watch: Any) -> None:
    class Normed(AdamW):
        def step(self, closure: Any = None) -> Any:
            out = super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.clamp_(-3, 3)
            return out

    model = net()
    optimizer = Normed(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert audit._step == 8


@sound
def a_critic_cleared_of_what_the_policy_loss_left(watch: Any) -> None:
    policy, critic = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)), nn.Bilinear(5, 2, 1)
    policy_optimizer, critic_optimizer = Adam(policy.parameters(), lr=1e-3), Adam(critic.parameters(), lr=1e-3)
    optimizers = {"policy": policy_optimizer, "critic": critic_optimizer}
    with watch({"policy": policy, "critic": critic}, optimizers) as audit:
        for _ in range(12):
            state, action = torch.randn(16, 5), torch.randn(16, 2)
            policy_loss = -critic(state, policy(state)).mean()
            critic_loss = F.mse_loss(critic(state, action), state[:, :1])
            policy_optimizer.zero_grad()
            policy_loss.backward()
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()
            policy_optimizer.step()
            audit.step()
