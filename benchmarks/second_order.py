"""What R1 costs: sharing the loss's forward, with one of its own, every 16 steps, and by torch.func.

python benchmarks/second_order.py [--rounds 40] [--gans dense convolutional]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import GANS, Contender, Gan, measure, peak_bytes, ratio, start, verdict

from safeloop.penalties.gradients import Field
from safeloop.penalties.r1 import R1

EVERY = 16
BARS = {"shared forward": 2.6, f"every {EVERY} steps": 1.12}
GAMMA = 10.0


def loss_of(scores: Tensor) -> Tensor:
    """The discriminator's loss on real samples."""
    return F.softplus(-scores).mean()


def base(critic: nn.Module, x: Tensor) -> None:
    """Forward and backward of the loss alone."""
    loss_of(critic(x)).backward()


def shared(critic: nn.Module, x: Tensor) -> None:
    """R1 on the forward that the loss needs anyway, both in one backward pass: what safeloop does."""
    at = x.detach().requires_grad_()
    scores = critic(at)
    penalty = R1().value(Field(scores, at))
    torch.autograd.backward([loss_of(scores), penalty], [torch.ones(()), torch.full((), GAMMA)])


def apart(critic: nn.Module, x: Tensor) -> None:
    """R1 with a forward of its own, as `self.penalty(critic, at=x)` has it."""
    loss, at = loss_of(critic(x)), x.detach().requires_grad_()
    penalty = R1().value(Field(critic(at), at))
    torch.autograd.backward([loss, penalty], [torch.ones(()), torch.full((), GAMMA)])


def func_vjp(critic: nn.Module, x: Tensor) -> None:
    """The same with `torch.func.vjp`, which gives the scores of its forward too."""
    scores, pull = torch.func.vjp(critic, x)
    (slopes,) = pull(torch.ones_like(scores))
    (loss_of(scores) + GAMMA * slopes.flatten(1).square().sum(1).mean() / 2).backward()


def func_grad(critic: nn.Module, x: Tensor) -> None:
    """The same with `torch.func.vmap(torch.func.grad(...))`, a gradient for each sample."""

    def score(sample: Tensor) -> Tensor:
        return critic(sample.unsqueeze(0)).sum()

    slopes = torch.func.vmap(torch.func.grad(score))(x)
    (loss_of(critic(x)) + GAMMA * slopes.flatten(1).square().sum(1).mean() / 2).backward()


Step = Callable[[nn.Module, Tensor], None]
STEPS: dict[str, Step] = {
    "loss alone": base,
    "loss alone (A/A)": base,
    "shared forward": shared,
    "own forward": apart,
    "torch.func.vjp": func_vjp,
    "vmap(grad)": func_grad,
}


def lazy(critic: nn.Module, x: Tensor) -> None:
    """Sixteen steps, one of them with R1."""
    shared(critic, x)
    for _ in range(EVERY - 1):
        base(critic, x)


def never(critic: nn.Module, x: Tensor) -> None:
    """Sixteen steps without."""
    for _ in range(EVERY):
        base(critic, x)


def contender(gan: Gan, x: Tensor, step: Step) -> Contender:
    """Times forward and backward, from gradients that are none."""
    return Contender(lambda: gan.critic.zero_grad(set_to_none=True), lambda _: step(gan.critic, x))


def gradients(gan: Gan, x: Tensor, step: Step) -> Tensor:
    """All gradients of the critic in one vector."""
    gan.critic.zero_grad(set_to_none=True)
    step(gan.critic, x)
    return torch.cat([p.grad.flatten() for p in gan.critic.parameters() if p.grad is not None])


def r1_cases(name: str, gan: Gan, rounds: int) -> None:
    """Print a line for each way to compute R1."""
    x = gan.generator(gan.noise).detach()
    times = measure({one: contender(gan, x, step) for one, step in STEPS.items()}, rounds)
    few = max(4, rounds // 2)
    long = {"never": never, "never again": never, f"every {EVERY} steps": lazy}
    times_lazy = measure({one: contender(gan, x, step) for one, step in long.items()}, few)
    wanted = gradients(gan, x, apart)
    for one, step in STEPS.items():
        found = ratio(times, one, "loss alone")
        bar = f"<= {BARS[one]}: {verdict(found, BARS[one])}" if one in BARS else ""
        peak = peak_bytes(lambda: gan.critic.zero_grad(set_to_none=True), contender(gan, x, step).run) / 2**20
        apart_by = "" if step is base else f"{float((gradients(gan, x, step) - wanted).norm() / wanted.norm()):.1e}"
        print(f"{name:14} {one:18}  {found}  {bar:20}  {peak:8.2f}  {apart_by}", flush=True)
    for one in ("never again", f"every {EVERY} steps"):
        found = ratio(times_lazy, one, "never")
        bar = f"<= {BARS[one]}: {verdict(found, BARS[one])}" if one in BARS else ""
        print(f"{name:14} {one:18}  {found}  {bar}", flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--gans", nargs="+", choices=GANS, default=list(GANS))
    args = parser.parse_args()
    start()
    print(f"{'R1 against the loss alone':33}  {'step':18}  {'bar':20}  peak MiB  gradient apart")
    for name in args.gans:
        r1_cases(name, GANS[name](), args.rounds)


if __name__ == "__main__":
    main()
