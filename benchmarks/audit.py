"""What the audit costs after its first 20 steps, in a Trainer and around a loop of one's own, beside an A/A control.

`standard` is compared with `off`; for replay capture, `standard` with the same without what it keeps of each turn.

python benchmarks/audit.py [--rounds 40] [--models mlp cnn gpt] [--device cuda]
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import Attention, Positions, Ratio, ratio, start

import safeloop as sl
from safeloop.step import run_step

FIRST = 25
"""Steps before the clock runs: the first 20 lie outside the budget."""


class Classifier(sl.Trainer):
    """One cross-entropy."""

    def loss(self, batch: Any) -> Tensor:
        """Of the last dimension."""
        x, y = batch
        out = self.model(x)
        return F.cross_entropy(out.flatten(0, -2), y.flatten())


def mlp() -> tuple[nn.Module, list[Any], int]:
    """64-64-10, batches of 32; and the steps of a round."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, [(torch.randn(32, 64), torch.randint(10, (32,))) for _ in range(16)], 200


def cnn() -> tuple[nn.Module, list[Any], int]:
    """Two convolutions on 8 x 8 images, batches of 64."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    return model, [(torch.randn(64, 1, 8, 8), torch.randint(10, (64,))) for _ in range(16)], 20


def gpt() -> tuple[nn.Module, list[Any], int]:
    """Four blocks of width 128 on 64 tokens, batches of 16."""
    blocks = [Attention(128, 4) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(96, 128), Positions(64, 128), *blocks, nn.LayerNorm(128), nn.Linear(128, 96))
    return model, [(torch.randint(96, (16, 64)), torch.randint(96, (16, 64))) for _ in range(8)], 2


Make = Callable[[], tuple[nn.Module, list[Any], int]]
"""The model, its batches, and the steps of a round."""
MODELS: dict[str, Make] = {"mlp": mlp, "cnn": cnn, "gpt": gpt}


def on_device(make: Make, device: torch.device) -> Make:
    """The same on a device."""

    def made() -> tuple[nn.Module, list[Any], int]:
        model, batches, per_round = make()
        return model.to(device), [(x.to(device), y.to(device)) for x, y in batches], per_round

    return made


def now(device: torch.device) -> float:
    """Seconds: of this process, as others may use the machine; of the clock where a device works beside it."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def trainer_steps(make: Make, level: str) -> Iterator[None]:
    """Steps of a Trainer, one for each `next`."""
    torch.manual_seed(0)
    model, batches, _ = make()
    run = Classifier(
        model=model,
        data=batches,
        optimizers={"type": "AdamW", "lr": 1e-4},
        run={"max_steps": 10**9, "device": str(batches[0][0].device)},
        audit={"level": level},
        log={"sinks": []},
    )._assembled()
    return (None for step in itertools.count() if run_step(run.program, run.stream, step))


def capture_steps(make: Make, level: str) -> Iterator[None]:
    """Steps of an audited Trainer; at `off`, nothing is kept for a replay."""
    if level != "off":
        return trainer_steps(make, level)
    with mock.patch("safeloop.assembly.TurnReplayer", return_value=None):
        return trainer_steps(make, "standard")


def loop_steps(make: Make, level: Any) -> Iterator[None]:
    """Iterations of a loop of one's own inside `safeloop.audit`, one for each `next`."""
    torch.manual_seed(0)
    model, batches, _ = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    with sl.audit(model=model, optimizers=optimizer, level=level, on_fault="collect") as audit:
        for x, y in itertools.cycle(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
            audit.step()
            yield


def compare(
    steps: Callable[[Make, str], Iterator[None]], make: Make, rounds: int, device: torch.device
) -> tuple[Ratio, Ratio, float, float]:
    """Ratios to `off` of `off` again and of `standard`; microseconds of a step at `off`, and those it costs more."""
    per_round = make()[2]
    running = {"off": steps(make, "off"), "again": steps(make, "off"), "standard": steps(make, "standard")}
    for stepping in running.values():
        for _ in range(FIRST):
            next(stepping)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name in random.sample(list(running), len(running)):
            begin = now(device)
            for _ in range(per_round):
                next(running[name])
            times[name].append((now(device) - begin) / per_round)
    extra = sorted(a - b for a, b in zip(times["standard"], times["off"], strict=True))[rounds // 2]
    base = sorted(times["off"])[rounds // 2]
    return ratio(times, "again", "off"), ratio(times, "standard", "off"), 1e6 * base, 1e6 * extra


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    start()
    print(f"{'against what is left':24}  {'the same (A/A)':18}  {'with it':18}  us a step")
    kinds = {"Trainer": trainer_steps, "loop of one's own": loop_steps, "replay capture": capture_steps}
    for kind, steps in kinds.items():
        for name in args.models:
            again, standard, base, extra = compare(
                steps, on_device(MODELS[name], args.device), args.rounds, args.device
            )
            print(
                f"{kind:18}{name:6}",
                f"{again!s:18}",
                f"{standard!s:18}",
                f"{base:.0f} {extra:+.1f}",
                sep="  ",
                flush=True,
            )


if __name__ == "__main__":
    main()
