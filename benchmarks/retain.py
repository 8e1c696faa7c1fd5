"""The memory peak of separate backward passes, by what is retained and what is let go.

python benchmarks/retain.py [--rounds 1]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from workloads import peak_bytes, start

from safeloop.autograd.retain import retain_flags

BAR = 0.70
Terms = dict[int, Tensor]


class Shape(NamedTuple):
    """A trunk and three heads of unequal depth."""

    width: int
    batch: int
    trunk: int
    heads: tuple[int, ...]


SHAPES = {
    "weights and activations alike, deep heads": Shape(width=768, batch=640, trunk=1, heads=(6, 4, 2)),
    "weights and activations alike": Shape(width=1024, batch=768, trunk=1, heads=(4, 2, 1)),
    "weight-heavy": Shape(width=1024, batch=256, trunk=1, heads=(4, 2, 1)),
    "activation-heavy": Shape(width=256, batch=4096, trunk=2, heads=(4, 2, 1)),
}


def retain_all(terms: Terms, order: Sequence[int]) -> None:
    """`retain_graph=True` everywhere, as most loops have it."""
    for k in order:
        terms[k].backward(retain_graph=True)


def all_but_last(terms: Terms, order: Sequence[int]) -> None:
    """`retain_graph=True` on all but the last pass; the terms stay referenced."""
    for k in order:
        terms[k].backward(retain_graph=k != order[-1])


def exact(terms: Terms, order: Sequence[int]) -> None:
    """Exact flags, and each term let go after its pass."""
    for k, flag in zip(order, retain_flags([terms[k] for k in sorted(terms)], order), strict=True):
        terms.pop(k).backward(retain_graph=flag)


def fused(terms: Terms, order: Sequence[int]) -> None:
    """One pass for all: what the loop does where no update lies between."""
    roots = [terms.pop(k) for k in order]
    torch.autograd.backward(roots)


POLICIES: dict[str, Callable[[Terms, Sequence[int]], None]] = {
    "retain all": retain_all,
    "all but last": all_but_last,
    "exact, let go": exact,
    "fused": fused,
}


def stack(width: int, depth: int) -> nn.Sequential:
    """So many layers of one width."""
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])


def peaks(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """MiB for each policy: one figure for each order, the highest of `rounds`."""
    trunk, heads = stack(shape.width, shape.trunk), [stack(shape.width, depth) for depth in shape.heads]
    x = torch.randn(shape.batch, shape.width)

    def terms() -> Terms:
        for module in (trunk, *heads):
            module.zero_grad(set_to_none=True)
        z = trunk(x)
        return {k: head(z).square().mean() for k, head in enumerate(heads)}

    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    for order in itertools.permutations(range(len(heads))):
        for name, policy in POLICIES.items():
            highest = max(
                peak_bytes(terms, lambda made, policy=policy, order=order: policy(made, order)) for _ in range(rounds)
            )
            found[name].append(highest / 2**20)
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    start()
    for name, shape in SHAPES.items():
        found = peaks(shape, args.rounds)
        base = found["retain all"]
        print(f"{name}: {shape}; {len(base)} orders of the passes")
        print(f"{'':14} {'best MiB':>9} {'worst':>7}   {'/ retain all, same order: best':>31} {'worst':>6}")
        for policy, figures in found.items():
            ratios = [a / b for a, b in zip(figures, base, strict=True)]
            print(f"{policy:14} {min(figures):9.1f} {max(figures):7.1f}   {min(ratios):31.2f} {max(ratios):6.2f}")
        print(flush=True)
    print(f"bar: exact flags with the best order <= {BAR} of retain all, on a shape with as much to free as to make")


if __name__ == "__main__":
    main()
