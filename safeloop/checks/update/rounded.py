"""Updates that are smaller than the last digit of a weight of half precision."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeloop.autograd.sites import Site
from safeloop.checks.check import Check
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_HALVES = (torch.bfloat16, torch.float16)
_SHARE = 0.9
"""Of the entries with a gradient, so many keep every bit."""
_ENOUGH = 8
"""Such steps in a row."""
_SAMPLE = 1024
"""Entries of a parameter that are compared."""


@dataclass
class _Sample:
    name: str
    parameter: Tensor
    values: Tensor
    """before the step"""
    counts: Tensor
    """whether an entry is not zero and has a gradient: zero has digits for any update"""

    def lost(self) -> Tensor:
        """How many entries have a gradient, and how many of them kept every bit: `[2]`."""
        kept = self.counts & (_sampled(self.parameter) == self.values)
        return torch.stack([self.counts.sum(), kept.sum()]).cpu()


class UpdatesRoundAway(Check):
    """Weights in bfloat16 or float16 take updates so small that nearly all of them round to nothing.

    ## What it does
    Compares, bit by bit, up to 1024 entries of each parameter of half precision before and after the step of one of
    torch's optimizers, on the iterations that are looked at in depth. Speaks after 8 steps in a row in which 90 % or
    more of the entries with a gradient kept their value. Steps of a warm-up, whose rate still rises, and those of a
    rate that has fallen below half its largest, do not count; where nothing changes at all it is SL657.

    ## Why it is bad
    bfloat16 holds 3 digits: a weight of 0.1 moves in steps of 0.0005. Adam moves by about the learning rate, so at 5e-5
    nothing happens, at any step: small changes do not add up. The few weights near zero train alone.

    ## Bad
    ```python
    model = nn.Linear(64, 16).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 64, dtype=torch.bfloat16)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(64, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(torch.randn(8, 64))
            out.float().square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Keep the weights in float32 and compute under `torch.autocast`, or use an optimizer with stochastic rounding or a
    float32 copy of the weights.

    ## Source
    Zamirai et al., Revisiting BFloat16 Training (2020).
    """

    code = "SL674"
    title = "updates round away"
    severity = "warning"

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._before: dict[str, list[_Sample]] = {}
        self._rates: dict[str, tuple[float, float]] = {}
        """owner -> its last and its largest rate"""
        self._row: Counter[str] = Counter()

    def before(self, owner: str, optimizer: Optimizer) -> None:
        """A step is about to run."""
        self._before.pop(owner, None)
        if self._row[owner] < _ENOUGH and _rounds(optimizer) and self._is_steady(owner, optimizer):
            self._before[owner] = list(self._samples(owner, optimizer))

    def _is_steady(self, owner: str, optimizer: Any) -> bool:
        rate = max((float(group["lr"]) for group in optimizer.param_groups if "lr" in group), default=0.0)
        last, top = self._rates.get(owner, (0.0, 0.0))
        self._rates[owner] = rate, max(rate, top)
        return 0.5 * top <= rate <= last

    def _samples(self, owner: str, optimizer: Any) -> Iterator[_Sample]:
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"] if group.get("lr") else ():
                if p.dtype in _HALVES and p.grad is not None and p.grad.layout is p.layout is torch.strided:
                    values = _sampled(p).clone()
                    counts = (_sampled(p.grad) != 0) & (values != 0)
                    yield _Sample(self._names.get(id(p), f"{owner}[{index}]"), p, values, counts)

    def after(self, owner: str, optimizer: Any, site: Site | None) -> Iterator[Fault]:
        """The step has run."""
        samples = self._before.pop(owner, [])
        lost = {}
        have = kept = 0.0
        for one in samples:
            known, same = one.lost().tolist()
            weight = one.parameter.numel() / max(1, one.values.numel())
            have, kept = have + weight * known, kept + weight * same
            lost[one.name] = same / known if known else 0.0
        if not have:
            return
        self._row[owner] = self._row[owner] + (kept < have) if kept >= _SHARE * have else 0
        if self._row[owner] == _ENOUGH:
            kinds = " and ".join(sorted({str(one.parameter.dtype).removeprefix("torch.") for one in samples}))
            yield self._fault_of(owner, kept / have, lost, kinds, site)

    def _fault_of(self, owner: str, share: float, lost: dict[str, float], kinds: str, site: Site | None) -> Fault:
        worst = sorted((name for name, part in lost.items() if part >= _SHARE), key=lambda name: -lost[name])
        return self.fault(
            f"in {_ENOUGH} steps of `{owner}`, {math.floor(1000 * share) / 10:g} % of the entries with a gradient kept "
            f"every bit, at lr {self._rates[owner][0]:.3g} in {kinds}: {listed(worst)}",
            where=at(site, f"step of `{owner}`"),
            why=f"the updates are smaller than half the last digit of a {kinds} weight and round away, each time anew: "
            "they never add up",
            fix="keep the weights in float32 and compute under autocast, or use an optimizer with stochastic rounding "
            "or float32 copies of the weights",
            names=worst,
        )


def _rounds(optimizer: Optimizer) -> bool:
    """Whether the step is torch's own, which rounds to the nearest number."""
    return str(type(optimizer).step.__module__).startswith("torch.optim.")


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
