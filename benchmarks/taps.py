"""What gradient geometry costs: the fused backward with taps, against the fused one alone and a backward per term.

python benchmarks/taps.py [--rounds 30] [--terms 2 4 8] [--models mlp convnet transformer]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from workloads import MODELS, Contender, Work, measure, peak_bytes, ratio, start, verdict

from safeloop.autograd.cut import shared_cut
from safeloop.autograd.taps import backward_with_taps

BARS = {4: 1.15, 8: 1.25}
CUT_BAR_MS = 0.1


def fused(terms: list[Tensor], seeds: list[Tensor]) -> None:
    """One engine pass for all terms: what geometry is measured against."""
    torch.autograd.backward(terms, seeds)


def naive(terms: list[Tensor], seeds: list[Tensor]) -> None:
    """A pass for each term, the graph kept throughout."""
    for term, seed in zip(terms, seeds, strict=True):
        term.backward(seed, retain_graph=True)


def compare(work: Work, rounds: int) -> str:
    """Ratios to the fused backward; the forward is not timed."""
    seeds = [torch.full((), 1.0 / (k + 1)) for k in range(len(work.targets))]
    contenders = {
        "fused": Contender(work.terms, lambda terms: fused(terms, seeds)),
        "again": Contender(work.terms, lambda terms: fused(terms, seeds)),
        "taps": Contender(work.terms, lambda terms: backward_with_taps(terms, seeds)),
        "naive": Contender(work.terms, lambda terms: naive(terms, seeds)),
    }
    times = measure(contenders, rounds)
    tapped = ratio(times, "taps", "fused")
    bar = BARS.get(len(seeds))
    peaks = [peak_bytes(work.terms, contenders[name].run) / 2**20 for name in ("fused", "taps", "naive")]
    return "  ".join(
        [
            str(ratio(times, "again", "fused")),
            str(tapped),
            f"{f'<= {bar}: {verdict(tapped, bar)}' if bar else '':20}",
            str(ratio(times, "naive", "fused")),
            " / ".join(f"{peak:.2f}" for peak in peaks),
            "yes" if is_bitwise_equal(work, seeds) else "NO",
        ]
    )


def is_bitwise_equal(work: Work, seeds: list[Tensor]) -> bool:
    """Whether the gradients with taps are those without."""
    fused(work.terms(), seeds)
    expected = [parameter.grad for parameter in work.model.parameters()]
    backward_with_taps(work.terms(), seeds)
    return all(map(torch.equal, expected, [parameter.grad for parameter in work.model.parameters()]))


def cut_ms(depth: int, num_terms: int = 4) -> float:
    """Milliseconds to find the cut under four heads on a trunk of so many nodes: the median of 50."""
    z = torch.ones(2, 8, requires_grad=True)
    for _ in range(depth):
        z = z.sin()
    heads = [nn.Linear(8, 2) for _ in range(num_terms)]
    terms = [head(z).square().mean() for head in heads]
    taken = []
    for _ in range(50):
        begin = time.perf_counter()
        shared_cut(terms)
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[25] * 1e3


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--terms", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    start()
    print(
        f"{'backward / fused':16}  {'fused again (A/A)':18}  {'taps':18}  {'bar':20}  {'naive retain':18}  "
        "peak MiB fused / taps / naive  bitwise equal"
    )
    for name in args.models:
        for num_terms in args.terms:
            print(f"{name:11} K={num_terms:<3}", compare(MODELS[name](num_terms), args.rounds), sep="  ", flush=True)
    print(f"\nfinding the cut of 4 terms (bar {CUT_BAR_MS} ms at 10,000 nodes)")
    for depth in (100, 1_000, 10_000):
        print(f"{depth:6} nodes  {cut_ms(depth):.3f} ms")


if __name__ == "__main__":
    main()
