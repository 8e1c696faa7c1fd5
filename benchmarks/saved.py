"""What it costs to watch saved tensors: a step under the guard, by level, against the same step without.

python benchmarks/saved.py [--rounds 30] [--models mlp convnet transformer]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
from workloads import MODELS, Contender, Work, measure, ratio, start, verdict

from safeloop.autograd.parameter_ledger import ParameterLedger
from safeloop.autograd.saved import SavedTensorGuard

BARS = {"version": 1.2, "checksum": 1.9, "checksum and ledger": 2.1}
NAMES = ("plain", "plain again (A/A)", *BARS)


def contender(work: Work, how: str) -> Contender:
    """Times forward and backward; the guard is made and taken off inside of the time."""
    parameters = dict(work.model.named_parameters())

    def run(_: object) -> None:
        guard = SavedTensorGuard(parameters, "version" if how == "version" else "checksum") if how in BARS else None
        ledger = ParameterLedger(parameters) if "ledger" in how else None
        with guard or nullcontext():
            loss = sum(work.terms(), start=torch.zeros(()))
        if ledger is not None:
            ledger.close_forward()
            ledger.changed()
        loss.backward()
        if guard is not None:
            assert guard.verify() == ()

    return Contender(lambda: None, run)


def num_saved(work: Work) -> int:
    """How many tensors a forward saves."""
    count = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work.terms()
    return count


def gradients(work: Work, run: Callable[[object], object]) -> list[torch.Tensor]:
    """The gradients that a step leaves."""
    torch.manual_seed(0)
    run(None)
    return [parameter.grad.clone() for parameter in work.model.parameters() if parameter.grad is not None]


def report(name: str, rounds: int) -> None:
    """Print a line for each way to watch."""
    work = MODELS[name](1)
    contenders = {how: contender(work, how) for how in NAMES}
    expected = gradients(work, contenders["plain"].run)
    times = measure(contenders, rounds)
    for how in NAMES:
        measured = ratio(times, how, "plain")
        judged = f"<= {BARS[how]}: {verdict(measured, BARS[how])}" if how in BARS else ""
        is_equal = all(map(torch.equal, gradients(work, contenders[how].run), expected))
        per_step = sorted(times[how])[len(times[how]) // 2] * 1e3
        print(
            f"{name:12} {how:20}  {measured}  {judged:22}  {per_step:8.2f}  {num_saved(work):5}  "
            f"{'yes' if is_equal else 'NO'}",
            flush=True,
        )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    start()
    print(f"{'against plain':33}  {'forward + backward':18}  {'bar':22}  ms a step  saved  gradients bitwise equal")
    for name in args.models:
        report(name, args.rounds)


if __name__ == "__main__":
    main()
