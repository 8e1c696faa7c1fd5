"""What confinement saves: a GAN generator step with the critic frozen, against a full backward through both.

python benchmarks/confine.py [--rounds 40] [--gans dense convolutional]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from workloads import GANS, Contender, Gan, Ratio, measure, peak_bytes, ratio, start, verdict

BAR = 0.8
NAMES = ("full", "full again (A/A)", "frozen", "inputs=")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """`requires_grad` off for the parameters that had it on, and on again afterwards."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def clear(gan: Gan) -> None:
    """No gradient left from before."""
    gan.generator.zero_grad(set_to_none=True)
    gan.critic.zero_grad(set_to_none=True)


def loss(gan: Gan, how: str) -> Tensor:
    """The forward of a generator step."""
    if how != "frozen":
        return gan.loss()
    with frozen(gan.critic):
        return gan.loss()


def backward(gan: Gan, how: str, made: Tensor) -> None:
    """Its backward: `inputs=` names the generator's parameters, the others differentiate what requires grad."""
    torch.autograd.backward(made, inputs=list(gan.generator.parameters()) if how == "inputs=" else None)


def backward_contender(gan: Gan, how: str) -> Contender:
    """Times the backward alone."""

    def prepare() -> Tensor:
        clear(gan)
        return loss(gan, how)

    return Contender(prepare, lambda made: backward(gan, how, made))


def step_contender(gan: Gan, how: str) -> Contender:
    """Times freezing, forward and backward."""
    return Contender(lambda: clear(gan), lambda _: backward(gan, how, loss(gan, how)))


def gradients(gan: Gan, how: str) -> tuple[list[Tensor | None], int]:
    """The generator's gradients, and how many of the critic's parameters got one."""
    clear(gan)
    backward(gan, how, loss(gan, how))
    own = [parameter.grad for parameter in gan.generator.parameters()]
    return own, sum(parameter.grad is not None for parameter in gan.critic.parameters())


def report(name: str, gan: Gan, rounds: int) -> None:
    """Print a line for each way to confine."""
    alone = measure({how: backward_contender(gan, how) for how in NAMES}, rounds)
    whole = measure({how: step_contender(gan, how) for how in NAMES}, rounds)
    expected, _ = gradients(gan, "full")
    for how in NAMES:
        of_backward: Ratio = ratio(alone, how, "full")
        peak = peak_bytes(lambda: clear(gan), step_contender(gan, how).run) / 2**20
        own, num_foreign = gradients(gan, how)
        is_equal = all(
            a is not None and b is not None and torch.equal(a, b) for a, b in zip(own, expected, strict=True)
        )
        judged = f"<= {BAR}: {verdict(of_backward, BAR)}" if how in ("frozen", "inputs=") else ""
        print(
            f"{name:14} {how:16}  {of_backward}  {judged:20}  {ratio(whole, how, 'full')}  {peak:8.2f}  "
            f"{num_foreign:13}  {'yes' if is_equal else 'NO'}",
            flush=True,
        )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--gans", nargs="+", choices=GANS, default=list(GANS))
    args = parser.parse_args()
    start()
    print(
        f"{'against full':31}  {'backward':18}  {'bar':20}  {'forward + backward':18}  peak MiB  "
        "foreign grads  own grads bitwise equal"
    )
    for name in args.gans:
        report(name, GANS[name](), args.rounds)


if __name__ == "__main__":
    main()
