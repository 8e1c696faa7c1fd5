"""Correct loops that look suspicious: a fault on one of them is a false alarm."""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedules
from torch.utils.checkpoint import checkpoint

SOUND: list[Callable[[Any], None]] = []


def sound(loop: Callable[[Any], None]) -> Callable[[Any], None]:
    """Add a loop to those that must give no fault."""
    SOUND.append(loop)
    return loop


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch(width: int = 4, out: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, width), torch.randn(size, out)


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


def gan() -> tuple[nn.Module, nn.Module, SGD, SGD]:
    gen, disc = mlp(2, 6, 4), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1, bias=False))
    return gen, disc, SGD(gen.parameters(), lr=0.01), SGD(disc.parameters(), lr=0.01)


def d_loss(disc: nn.Module, fake: Tensor) -> Tensor:
    return (F.softplus(-disc(torch.randn(8, 4))) + F.softplus(disc(fake))).mean()


@sound
def gan_with_one_fake_for_both(watch: Any) -> None:
    gen, disc, opt_g, opt_d = gan()
    with watch({"gen": gen, "disc": disc}, [opt_g, opt_d]):  # nobody tells iterations: the step of opt_d ends one
        for _ in range(8):
            fake = gen(torch.randn(8, 2))
            opt_d.zero_grad()
            d_loss(disc, fake.detach()).backward()
            opt_d.step()
            opt_g.zero_grad()
            F.softplus(-disc(fake)).mean().backward()
            opt_g.step()


@sound
def gan_generator_first_with_zero_grad_of_both(watch: Any) -> None:
    gen, disc, opt_g, opt_d = gan()
    with watch({"gen": gen, "disc": disc}, {"g": opt_g, "d": opt_d}) as audit:
        for _ in range(8):
            opt_g.zero_grad()
            fake = gen(torch.randn(8, 2))
            F.softplus(-disc(fake)).mean().backward()
            opt_g.step()
            opt_d.zero_grad()
            d_loss(disc, fake.detach()).backward()
            opt_d.step()
            audit.step()


@sound
def gan_in_autocast(watch: Any) -> None:
    gen, disc, opt_g, opt_d = gan()
    with watch({"gen": gen, "disc": disc}, [opt_g, opt_d]):
        for _ in range(8):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                fake = gen(torch.randn(8, 2))
                loss = d_loss(disc, fake.detach())
            opt_d.zero_grad()
            loss.backward()
            opt_d.step()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                opt_g.zero_grad()
                F.softplus(-disc(fake)).mean().backward()
                opt_g.step()


@sound
def wgan_five_to_one_with_weight_clipping(watch: Any) -> None:
    gen, disc, opt_g, opt_d = gan()
    with watch({"gen": gen, "disc": disc}, {"g": opt_g, "d": opt_d}) as audit:
        for step in range(15):
            opt_d.zero_grad()
            with torch.no_grad():
                fake = gen(torch.randn(8, 2))
            (disc(fake).mean() - disc(torch.randn(8, 4)).mean()).backward()
            opt_d.step()
            with torch.no_grad():
                for p in disc.parameters():
                    p.clamp_(-0.5, 0.5)
            if step % 5 == 4:
                opt_g.zero_grad()
                (-disc(gen(torch.randn(8, 2))).mean()).backward()
                opt_g.step()
            audit.step()


@sound
def gan_that_freezes_the_discriminator(watch: Any) -> None:
    gen, disc, opt_g, opt_d = gan()
    with watch({"gen": gen, "disc": disc}, {"g": opt_g, "d": opt_d}) as audit:
        for _ in range(12):
            fake = gen(torch.randn(8, 2))
            disc.requires_grad_(False)
            opt_g.zero_grad()
            F.softplus(-disc(fake)).mean().backward()
            opt_g.step()
            disc.requires_grad_(True)
            opt_d.zero_grad()
            (0.5 * d_loss(disc, fake.detach())).backward()
            opt_d.step()
            audit.step()


@sound
def gradient_penalty_by_hand(watch: Any) -> None:
    gen, disc, opt_g, opt_d = gan()
    with watch({"gen": gen, "disc": disc}, {"g": opt_g, "d": opt_d}) as audit:
        for _ in range(8):
            fake = gen(torch.randn(8, 2)).detach()
            mixed = (0.5 * fake + 0.5 * torch.randn(8, 4)).requires_grad_()
            (slope,) = torch.autograd.grad(disc(mixed).sum(), mixed, create_graph=True)
            opt_d.zero_grad()
            (disc(fake).mean() - disc(torch.randn(8, 4)).mean() + ((slope.norm(dim=1) - 1) ** 2).mean()).backward()
            opt_d.step()
            opt_g.zero_grad()
            (-disc(gen(torch.randn(8, 2))).mean()).backward()
            opt_g.step()
            audit.step()


@sound
def sharpness_aware_by_hand(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            x, y = batch()
            F.mse_loss(model(x), y).backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            moves = [0.05 * p.grad / norm for p in model.parameters()]
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.add_(move)
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.sub_(move)
            optimizer.step()
            optimizer.zero_grad()
            audit.step()


class Sam(torch.optim.Optimizer):
    """The sharpness-aware optimizer as people copy it."""

    def __init__(self, params: Any, base: Any, **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


@sound
def sharpness_aware_optimizer(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = Sam(model.parameters(), SGD, lr=0.05)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            x, y = batch()
            F.mse_loss(model(x), y).backward()
            optimizer.first_step()
            F.mse_loss(model(x), y).backward()
            optimizer.second_step()
            audit.step()


@sound
def gradient_surgery(watch: Any) -> None:
    model = mlp(4, 6, 2)
    optimizer = Adam(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            out = model(torch.randn(8, 4))
            gradients = []
            for i in range(2):
                optimizer.zero_grad()
                out[:, i].square().mean().backward(retain_graph=True)
                gradients.append([p.grad.clone() for p in model.parameters()])
            optimizer.zero_grad()
            for p, one, two in zip(model.parameters(), *gradients, strict=True):
                dot = (one * two).sum()
                p.grad = one + two - torch.clamp(dot, max=0) / two.square().sum().clamp(min=1e-9) * two
            optimizer.step()
            audit.step()


@sound
def adversarial_training(watch: Any) -> None:
    model = mlp(4, 6, 3)
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
            attacked = x.clone()
            for _ in range(3):  # PGD
                attacked.requires_grad_()
                F.cross_entropy(model(attacked), y).backward()
                attacked = (attacked + 0.1 * attacked.grad.sign()).detach()
                model.zero_grad()
            optimizer.zero_grad()
            F.cross_entropy(model(attacked), y).backward()
            optimizer.step()
            audit.step()


@sound
def maml(watch: Any) -> None:
    model = nn.Linear(4, 1)
    optimizer = Adam(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            optimizer.zero_grad()
            total = torch.zeros(())
            for _ in range(3):
                x, y = batch()
                weights = dict(model.named_parameters())
                loss = F.mse_loss(torch.func.functional_call(model, weights, x), y)
                slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                fast = {n: p - 0.1 * g for (n, p), g in zip(weights.items(), slopes, strict=True)}
                total = total + F.mse_loss(torch.func.functional_call(model, fast, x), y)
            total.backward()
            optimizer.step()
            audit.step()


@sound
def reptile(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.5)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            fast = copy.deepcopy(model)
            inner = SGD(fast.parameters(), lr=0.05)
            for _ in range(3):
                x, y = batch()
                inner.zero_grad()
                F.mse_loss(fast(x), y).backward()
                inner.step()
            optimizer.zero_grad()
            for p, q in zip(model.parameters(), fast.parameters(), strict=True):
                p.grad = p.detach() - q.detach()
            optimizer.step()
            audit.step()


@sound
def actor_critic_in_both_orders(watch: Any) -> None:
    for actor_first in (True, False):
        actor, critic = mlp(4, 6, 2), mlp(6, 6, 1)
        opt_a, opt_c = Adam(actor.parameters(), lr=0.01), Adam(critic.parameters(), lr=0.01)

        def fit_critic(actor: Any = actor, critic: Any = critic, opt_c: Any = opt_c) -> None:
            x, y = batch()
            loss = F.mse_loss(critic(torch.cat([x, actor(x).detach()], 1)), y)
            opt_c.zero_grad()
            loss.backward()
            opt_c.step()

        def fit_actor(actor: Any = actor, critic: Any = critic, opt_a: Any = opt_a) -> None:
            x, _ = batch()
            loss = -critic(torch.cat([x, actor(x)], 1)).mean()
            opt_a.zero_grad()
            loss.backward()
            opt_a.step()

        with watch({"actor": actor, "critic": critic}, {"a": opt_a, "c": opt_c}) as audit:
            for _ in range(8):
                for fit in (fit_actor, fit_critic) if actor_first else (fit_critic, fit_actor):
                    fit()
                audit.step()


@sound
def q_learning_with_target_sync(watch: Any) -> None:
    net = mlp(4, 6, 2)
    target = copy.deepcopy(net)
    optimizer = Adam(net.parameters(), lr=0.01)
    memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=32)
    with watch(net, optimizer) as audit:
        for step in range(12):
            state = torch.randn(4)
            with torch.no_grad():
                net(state).argmax()
            memory.append((state, torch.randn(4)))
            if len(memory) > 3:
                now = torch.stack([m[0] for m in list(memory)[-4:]])
                then = torch.stack([m[1] for m in list(memory)[-4:]])
                with torch.no_grad():
                    goal = 0.9 * target(then).max(1).values
                loss = F.smooth_l1_loss(net(now)[:, 0] + net(now)[:, 1], goal)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_value_(net.parameters(), 1.0)
                optimizer.step()
            if step % 4 == 0:
                target.load_state_dict(net.state_dict())
            audit.step()


@sound
def reinforce_by_episodes(watch: Any) -> None:
    policy = mlp(4, 6, 2)
    optimizer = Adam(policy.parameters(), lr=0.01)
    with watch(policy, optimizer) as audit:
        for _ in range(3):
            saved = []
            for _ in range(7):
                saved.append(F.log_softmax(policy(torch.randn(4)), 0)[0])
                audit.step()
            optimizer.zero_grad()
            torch.stack([-s * 0.5 for s in saved]).sum().backward()
            optimizer.step()


@sound
def clip_by_group_and_measure(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}], lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            x, y = batch()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
            audit.step()


@sound
def bad_batches_are_dropped(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for step in range(18):
            x, y = batch()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step % 4 == 3 or not math.isfinite(norm):
                optimizer.zero_grad()
                continue
            optimizer.step()
            optimizer.zero_grad()
            audit.step()


@sound
def one_step_for_each_epoch(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for _ in range(4):
            total = torch.zeros(())
            for _ in range(4):
                x, y = batch()
                total = total + F.mse_loss(model(x), y)
                audit.step()
            optimizer.zero_grad()
            (total / 4).backward()
            optimizer.step()


@sound
def accumulation_with_a_tail_that_is_weighted(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    sizes = [8] * 9 + [4]
    with watch(model, optimizer) as audit:
        for _ in range(3):
            for i, size in enumerate(sizes):
                window = sizes[i - i % 4 : i - i % 4 + 4]
                x, y = batch(size=size)
                (F.mse_loss(model(x), y) * size / sum(window)).backward()
                if i % 4 == 3 or i == len(sizes) - 1:
                    optimizer.step()
                    optimizer.zero_grad()
                audit.step()


@sound
def tokens_weighted_by_number(watch: Any) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    optimizer = SGD(model.parameters(), lr=0.1)
    lengths = (3, 20, 5, 12)
    with watch(model, optimizer) as audit:
        for step in range(6):
            optimizer.zero_grad()
            for length in lengths:
                text = torch.randint(0, 8, (length,))
                loss = F.cross_entropy(model(text), text)
                if step % 3 == 0:
                    loss = loss * length / sum(lengths)
                elif step % 3 == 1:
                    loss *= length
                    loss /= sum(lengths)
                else:
                    loss = (loss * (length / sum(lengths))).mean()
                loss.backward()
            optimizer.step()
            audit.step()


@sound
def alternating_freezing_with_one_optimizer(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    with watch(model, optimizer) as audit:
        for step in range(39):
            first = step // 13 % 2 == 0
            model[0].requires_grad_(first)
            model[2].requires_grad_(not first)
            x, y = batch()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            audit.step()


@sound
def a_second_optimizer_that_waits(watch: Any) -> None:
    body, head = mlp(4, 6), mlp(6, 1)
    opt_body, opt_head = SGD(body.parameters(), lr=0.05), SGD(head.parameters(), lr=0.05)
    with watch({"body": body, "head": head}, {"body": opt_body, "head": opt_head}) as audit:
        for step in range(12):
            body.requires_grad_(step > 6)
            x, y = batch()
            opt_body.zero_grad()
            opt_head.zero_grad()
            F.mse_loss(head(body(x)), y).backward()
            opt_body.step()
            opt_head.step()
            audit.step()


@sound
def schedules_of_all_kinds(watch: Any) -> None:
    for make in (
        lambda o: schedules.CosineAnnealingLR(o, T_max=25),
        lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=40),
        lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=5),
        lambda o: schedules.LambdaLR(o, lambda n: min(1.0, n / 5)),
        lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.9)], milestones=[3]
        ),
        lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.5), schedules.ExponentialLR(o, 0.9)]),
        lambda o: schedules.CyclicLR(o, 0.0, 0.1, step_size_up=3),
    ):
        model = mlp(4, 6, 1)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = make(optimizer)
        with watch(model, optimizer, budget=0.01) as audit:
            for _ in range(26):
                x, y = batch()
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                scheduler.step()
                audit.step()


@sound
def schedules_by_epoch(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer):
        plateau = schedules.ReduceLROnPlateau(optimizer, patience=0)
        steps = schedules.MultiStepLR(optimizer, [2, 4])
        for _ in range(6):
            for _ in range(5):
                x, y = batch()
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
            steps.step()
            plateau.step(loss.item())


@sound
def schedule_made_after_and_moved_at_the_head_of_an_epoch(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    optimizer.step()
    with watch(model, optimizer) as audit:
        scheduler = schedules.ExponentialLR(optimizer, 0.9)
        optimizer._opt_called = True
        for _ in range(6):
            scheduler.step()
            for _ in range(3):
                x, y = batch()
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                audit.step()


@sound
def linear_decay_to_zero(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    scheduler = schedules.LambdaLR(optimizer, lambda n: max(0.0, 1 - n / 10))
    with watch(model, optimizer) as audit:
        for _ in range(12):
            x, y = batch()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            audit.step()


@sound
def truncated_backpropagation_through_time(watch: Any) -> None:
    cell, head = nn.GRUCell(2, 6), nn.Linear(6, 1)
    optimizer = SGD([*cell.parameters(), *head.parameters()], lr=0.05)
    with watch({"cell": cell, "head": head}, optimizer) as audit:
        state = torch.zeros(8, 6)
        for _ in range(8):
            state = state.detach()
            loss = torch.zeros(())
            for _ in range(4):
                state = cell(torch.randn(8, 2), state)
                loss = loss + F.mse_loss(head(state), torch.randn(8, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()


@sound
def recurrent_state_within_an_accumulation_window(watch: Any) -> None:
    cell = nn.RNNCell(2, 6)
    optimizer = SGD(cell.parameters(), lr=0.05)
    with watch(cell, optimizer) as audit:
        for _ in range(3):
            state = torch.zeros(8, 6)
            for i in range(5):
                state = cell(torch.randn(8, 2), state)
                state.square().mean().backward(retain_graph=True)
                if i == 4:
                    optimizer.step()
                    optimizer.zero_grad()
                audit.step()


@sound
def checkpointing_of_both_kinds(watch: Any) -> None:
    for reentrant in (True, False):
        body, head = mlp(4, 6, 6), mlp(6, 1)
        optimizer = SGD([*body.parameters(), *head.parameters()], lr=0.05)
        with watch({"body": body, "head": head}, optimizer) as audit:
            for _ in range(8):
                x, y = batch()
                x.requires_grad_(reentrant)
                optimizer.zero_grad()
                F.mse_loss(head(checkpoint(body, x, use_reentrant=reentrant)), y).backward()
                nn.utils.clip_grad_norm_(body.parameters(), 1.0)
                optimizer.step()
                audit.step()


@sound
def learning_rate_finder(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=1e-4)
    before = copy.deepcopy(model.state_dict())
    with watch(model, optimizer) as audit:
        scheduler = schedules.LambdaLR(optimizer, lambda n: 1.3**n)
        for _ in range(12):
            x, y = batch()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
        model.load_state_dict(before)
        audit.step()


@sound
def several_losses_with_calls_of_their_own(watch: Any) -> None:
    body, heads = mlp(4, 6), nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
    opt_body = Adam(body.parameters(), lr=0.01)
    opt_heads = [SGD(head.parameters(), lr=0.01) for head in heads]
    with watch({"body": body, "heads": heads}, [opt_body, *opt_heads]) as audit:
        for _ in range(8):
            opt_body.zero_grad()
            x, y = batch()
            opt_heads[0].zero_grad()
            F.mse_loss(heads[0](body(x)), y).backward()
            opt_heads[0].step()
            opt_heads[1].zero_grad()
            heads[1](body(x)).square().mean().backward()
            opt_heads[1].step()
            opt_body.step()
            audit.step()


@sound
def shared_graph_with_retain_graph(watch: Any) -> None:
    model = mlp(4, 6, 2)
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            out = model(torch.randn(8, 4))
            optimizer.zero_grad()
            out[:, 0].square().mean().backward(retain_graph=True)
            out[:, 1].abs().mean().backward()
            optimizer.step()
            audit.step()


@sound
def steps_inside_the_backward_pass(watch: Any) -> None:
    model = mlp(4, 6, 1)
    each = {p: SGD([p], lr=0.05) for p in model.parameters()}

    def hook(p: Tensor) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    with watch(model, list(each.values())) as audit:
        for _ in range(8):
            x, y = batch()
            F.mse_loss(model(x), y).backward()
            audit.step()


def none(p: Tensor) -> None:
    p.grad = None


def fill(p: Tensor) -> None:
    if p.grad is not None:
        p.grad.fill_(0)


def times(p: Tensor) -> None:
    if p.grad is not None:
        p.grad *= 0


def zero(p: Tensor) -> None:
    if p.grad is not None:
        p.grad.detach_()
        p.grad.zero_()


def data(p: Tensor) -> None:
    if p.grad is not None:
        p.grad.data.zero_()


def entries(p: Tensor) -> None:
    if p.grad is not None:
        p.grad[:] = 0


def fresh(p: Tensor) -> None:
    p.grad = torch.zeros_like(p)


@sound
def every_way_to_zero(watch: Any) -> None:
    for way in (none, fill, times, zero, data, entries, fresh):
        model = mlp(4, 6, 1)
        optimizer = SGD(model.parameters(), lr=0.05)
        with watch(model, optimizer) as audit:
            for _ in range(6):
                x, y = batch()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                for p in model.parameters():
                    way(p)
                audit.step()


@sound
def scaler_made_inside_the_watch(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(8):
            x, y = batch()
            optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(x), y)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            audit.step()


@sound
def scaler_with_a_fused_optimizer_that_overflows(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            x, y = batch()
            optimizer.zero_grad()
            scaler.scale(100 * F.mse_loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()


@sound
def gradients_unscaled_by_hand(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            x, y = batch()
            optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(x), y)).backward()
            for p in model.parameters():
                p.grad.div_(scaler.get_scale())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            audit.step()


@sound
def lbfgs_over_micro_batches(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=1)
    data = [batch() for _ in range(3)]

    def closure() -> float:
        total = 0.0
        for x, y in data:
            loss = F.mse_loss(model(x), y) / 3
            loss.backward()
            total += loss.item()
        return total

    with watch(model, optimizer) as audit:
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.step(closure)
            audit.step()


@sound
def a_group_that_is_added_later(watch: Any) -> None:
    model = mlp(4, 6, 1)
    extra = nn.Linear(1, 1)
    model[0].requires_grad_(False)
    optimizer = SGD(model[2].parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for step in range(10):
            if step == 4:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters()})
                optimizer.add_param_group({"params": extra.parameters()})
            x, y = batch()
            optimizer.zero_grad()
            F.mse_loss(extra(model(x)), y).backward()
            optimizer.step()
            audit.step()


class Wrapper(torch.optim.Optimizer):
    """A wrapper as accelerate has it: an optimizer by class alone."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@sound
def a_wrapped_optimizer(watch: Any) -> None:
    model = mlp(4, 6, 1)
    optimizer = Wrapper(SGD(model.parameters(), lr=0.05))
    with watch(model, optimizer) as audit:
        for _ in range(8):
            x, y = batch()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            audit.step()


@sound
def byol_with_a_moving_target(watch: Any) -> None:
    online, predictor = mlp(4, 6, 6), mlp(6, 6)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = AdamW([*online.parameters(), *predictor.parameters()], lr=0.01)
    with watch({"online": online, "predictor": predictor, "target": target}, optimizer) as audit:
        for _ in range(8):
            one, two = torch.randn(8, 4), torch.randn(8, 4)
            with torch.no_grad():
                goal = F.normalize(target(two), dim=1)
            loss = 2 - 2 * (F.normalize(predictor(online(one)), dim=1) * goal).sum(1).mean()
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(online.parameters(), target.parameters(), strict=True):
                    q.mul_(0.9).add_(p, alpha=0.1)
            audit.step()


@sound
def distillation_and_evaluation_inside(watch: Any) -> None:
    teacher, student = mlp(4, 6, 3).eval(), nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Linear(6, 3))
    optimizer = Adam(student.parameters(), lr=0.01)
    averaged = torch.optim.swa_utils.AveragedModel(student)
    with watch(student, optimizer) as audit:
        for step in range(10):
            student.train()
            x = torch.randn(8, 4)
            with torch.no_grad():
                goal = F.softmax(teacher(x), 1)
            optimizer.zero_grad()
            F.kl_div(F.log_softmax(student(x), 1), goal, reduction="batchmean").backward()
            optimizer.step()
            averaged.update_parameters(student)
            if step % 3 == 0:
                student.eval()
                with torch.no_grad():
                    student(torch.randn(8, 4)).argmax(1)
            audit.step()


@sound
def a_loop_in_a_class_that_generates(watch: Any) -> None:
    class Runner:
        def __init__(self) -> None:
            self.model = mlp(4, 6, 1)
            self.optimizer = SGD(self.model.parameters(), lr=0.05)
            self.history: list[float] = []
            self.last: Tensor | None = None

        def steps(self) -> Any:
            with watch(self.model, self.optimizer) as audit:
                for _ in range(12):
                    x, y = batch()
                    self.last = F.mse_loss(self.model(x), y)
                    self.optimizer.zero_grad()
                    self.last.backward()
                    self.optimizer.step()
                    self.history.append(self.last.item())
                    audit.step()
                    yield self.last

    assert len(list(Runner().steps())) == 12


@sound
def sparse_embeddings(watch: Any) -> None:
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 3))
    optimizer = SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(torch.randint(0, 8, (6,))), torch.randint(0, 3, (6,))).backward()
            optimizer.step()
            audit.step()


@sound
def joint_loss_with_two_optimizers(watch: Any) -> None:
    body, head = mlp(4, 6), mlp(6, 1)
    opt_body, opt_head = AdamW(body.parameters(), lr=0.01), AdamW(head.parameters(), lr=0.01)
    with watch({"body": body, "head": head}, [opt_body, opt_head]):
        for _ in range(8):
            x, y = batch()
            F.mse_loss(head(body(x)), y).backward()
            for optimizer in (opt_body, opt_head):
                optimizer.step()
                optimizer.zero_grad()


@sound
def analysis_of_one_loss_beside_training(watch: Any) -> None:
    model = mlp(4, 6, 2)
    optimizer = SGD(model.parameters(), lr=0.05)
    norms: list[Tensor] = []
    with watch(model, optimizer) as audit:
        for _ in range(8):
            out = model(torch.randn(8, 4))
            first, second = out[:, 0].square().mean(), out[:, 1].square().mean()
            first.backward(retain_graph=True)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
            optimizer.zero_grad()
            (first + second).backward()
            optimizer.step()
            optimizer.zero_grad()
            audit.step()
