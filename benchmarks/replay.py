"""What it costs a healthy step to keep what a replay needs, and what a replay costs when a step fails.

python benchmarks/replay.py [--rounds 60] [--works mlp convnet]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import Contender, Ratio, ResidualConv, measure, ratio, start, verdict

import safeloop as sl
from safeloop import assembly as assembling
from safeloop.audit.diagnosis import diagnose
from safeloop.audit.observer import FIRST_STEPS
from safeloop.audit.replay import TurnReplayer
from safeloop.step import StepReport, run_step
from safeloop.step.randomness import RandomKeeper
from safeloop.step.report import Frame
from safeloop.step.turn import Turn

BAR = 1.02
NAMES = ("without", "without again (A/A)", "with capture")
WORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), (32, 16), 200),
    "convnet": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), *[ResidualConv(16) for _ in range(3)], nn.Flatten(), nn.LazyLinear(4)
        ),
        (16, 3, 16, 16),
        5,
    ),
}


class Classify(sl.Trainer):
    """One loss."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy."""
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def ready(work: str, *, captures: bool) -> Any:
    """A Trainer that is set up, past the steps that are looked at in depth."""
    make, shape, _ = WORKS[work]
    torch.manual_seed(0)
    data = [(torch.randn(shape), torch.randint(4, shape[:1])) for _ in range(8)]
    assembling.TurnReplayer = TurnReplayer if captures else lambda *_, **__: None  # type: ignore[assignment, misc]
    run: Any = Classify(
        model=make(), data=data, optimizers={"type": "AdamW", "lr": 1e-4}, run={"max_steps": 1}, log={"sinks": []}
    )
    run._assembled()
    assembling.TurnReplayer = TurnReplayer  # type: ignore[misc]
    steps(run, FIRST_STEPS + 5)
    return run


def steps(run: Any, count: int) -> None:
    """So many steps, nothing logged."""
    program, stream = run._assembly.program, run._assembly.stream
    for _ in range(count):
        run_step(program, stream, run.step)
        run.step += 1


def capture_microseconds(num: int = 20_000) -> float:
    """One call of what keeps the random state, in a run whose turns draw from torch's generator."""
    keeper = RandomKeeper([torch.device("cpu")])
    state = keeper.keep(0)
    torch.rand(1)
    keeper.ran(state)
    for step in range(100):
        keeper.keep(step)
    started = time.process_time()
    for step in range(num):
        keeper.keep(step)
    return (time.process_time() - started) / num * 1e6


def replay_ratio(work: str, rounds: int) -> Ratio:
    """A replay under the locator against a step."""
    run = ready(work, captures=True)
    rerun = run._assembly.program.rerun("train")
    turn = Turn(rerun, (run._assembly.stream.peek(),), RandomKeeper([torch.device("cpu")]).keep(0))
    frame = Frame(StepReport(run.step))
    contenders = {
        "step": Contender(lambda: None, lambda _: steps(run, 1)),
        "replay": Contender(lambda: None, lambda _: diagnose(run.model, turn, run.step, frame.terms)),
    }
    return ratio(measure(contenders, rounds), "replay", "step")


def report(work: str, rounds: int) -> None:
    """Print the lines of one workload."""
    count = WORKS[work][2]
    runs = {name: ready(work, captures=name == NAMES[2]) for name in NAMES}
    contenders = {
        name: Contender(lambda: None, lambda _, run=run: steps(run, count))  # type: ignore[misc]
        for name, run in runs.items()
    }
    times = measure(contenders, rounds)
    step = sorted(times["without"])[rounds // 2] / count * 1e6
    print(f"{work}: a step takes {step:.0f} us")
    for name in NAMES[1:]:
        measured = ratio(times, name, "without")
        judged = f"<= {BAR}: {verdict(measured, BAR)}" if name == NAMES[2] else ""
        print(f"  {name:22} {measured}  {judged}", flush=True)
    print(f"  {'replay / step':22} {replay_ratio(work, max(rounds // 4, 10))}", flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    args = parser.parse_args()
    start()
    print(f"the random state, kept once: {capture_microseconds():.1f} us of CPU")
    for work in args.works:
        report(work, args.rounds)


if __name__ == "__main__":
    main()
