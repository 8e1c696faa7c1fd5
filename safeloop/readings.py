"""Turns step reports into logged numbers: what piles up between two logs stays on the device and moves once."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safeloop.optim.clipping import ClipByNorm, Clipping
from safeloop.optim.owner import Owner
from safeloop.step.report import Reading, StepReport

MAX_MODULES = 24
"""Above this many modules, their gradient norms are logged by top-level child."""


@dataclass(slots=True)
class _Tally:
    """One owner between two logs."""

    norm: Reading = 0.0
    largest: Reading = 0.0
    clipped: Reading = 0.0


@dataclass(slots=True)
class Readings:
    """What the steps since the last log measured.

    Args:
        owners: by name.
        weights: loss term -> weight.
        kinds: which gradient norms are logged: `total`, `owner`, `module`.
    """

    owners: Mapping[str, Owner]
    weights: Mapping[str, float]
    kinds: Sequence[str] = ("total", "owner", "module")
    skipped_total: int = 0
    _tallies: dict[str, _Tally] = field(default_factory=dict)
    _inactive: dict[str, float] = field(default_factory=dict)
    _exact: dict[str, Tensor] = field(default_factory=dict)
    _balanced: dict[str, float] = field(default_factory=dict)
    _steps: int = 0
    _samples: int = 0
    _seconds: float = 0.0
    _started: float = 0.0
    _first_sample: int = 0

    @property
    def num_steps(self) -> int:
        """Steps since the last log."""
        return self._steps

    def resume(self, num_samples: int) -> None:
        """Start the clock, at so many samples drawn; it stands still while the loop writes or evaluates."""
        self._started, self._first_sample = time.perf_counter(), num_samples

    def pause(self, num_samples: int) -> None:
        """Stop the clock, at so many samples drawn."""
        self._seconds += time.perf_counter() - self._started
        self._samples += num_samples - self._first_sample

    def add(self, report: StepReport) -> None:
        """Take in one step; nothing is moved from the device."""
        self._steps += 1
        self.skipped_total += report.num_skipped
        self._exact |= report.exact_norms
        self._balanced |= report.balanced
        for name, part in report.inactive.items():
            self._inactive[name] = self._inactive.get(name, 0.0) + part
        for name, norm in report.norms.items():
            tally = self._tallies.setdefault(name, _Tally())
            tally.norm = norm
            tally.largest = _larger(tally.largest, norm)
            tally.clipped = tally.clipped + report.clipped.get(name, 0.0)

    def take(self, report: StepReport) -> dict[str, float]:
        """The numbers of this interval by tag, and a fresh start; one transfer from the device.

        `report` is that of the last step.
        """
        readings: dict[str, Reading] = {f"loss/{name}": value for name, value in report.terms.items()}
        for name, tally in self._tallies.items():
            readings |= {f"grad/{name}/pre_clip": tally.norm, f"grad/{name}/max_since_last": tally.largest}
            if self.owners[name].clipping is not None:
                readings[f"grad/{name}/clip_fraction"] = tally.clipped / max(1, self._steps)
        readings |= {f"grad/{name}/post_clip": norm for name, norm in report.clipped_norms.items()}
        readings |= {f"watch/{name}": one.square.sqrt() for name, one in report.watched.items()}
        readings |= _geometry(report) | {f"loss_grad_exact/{name}": norm for name, norm in self._exact.items()}
        modules, norms = _module_norms(report) if "module" in self.kinds else ([], None)
        numbers, module_numbers = _to_host(readings, norms)
        scalars = self._losses(numbers, report) | self._gradients(numbers) | self._rates() | self._pace()
        scalars |= {
            tag: value for tag, value in numbers.items() if tag.startswith(("loss_grad", "loss_cos/", "watch/"))
        }
        scalars |= {f"module/grad_norm/{name}": value for name, value in zip(modules, module_numbers, strict=True)}
        scalars |= {f"safety/inactive/{name}": part / self._steps for name, part in self._inactive.items()}
        scalars |= {f"loss_weight/{name}": weight for name, weight in self._balanced.items()}
        scalars["safety/skipped_total"] = float(self.skipped_total)
        self._tallies, self._inactive, self._exact = {}, {}, {}
        self._steps, self._samples, self._seconds = 0, 0, 0.0
        return scalars

    def _losses(self, numbers: Mapping[str, float], report: StepReport) -> dict[str, float]:
        terms = {f"loss/{name}": numbers[f"loss/{name}"] for name in report.terms}
        return {"loss/train": sum(self.weights.get(n, 1.0) * numbers[f"loss/{n}"] for n in report.terms)} | terms

    def _gradients(self, numbers: Mapping[str, float]) -> dict[str, float]:
        scalars: dict[str, float] = {}
        before, after = 0.0, 0.0
        is_after_known = True
        for name in self._tallies:
            norm = numbers[f"grad/{name}/pre_clip"]
            clipped = numbers.get(f"grad/{name}/post_clip", _after(self.owners[name].clipping, norm))
            is_after_known = is_after_known and clipped is not None
            before, after = math.hypot(before, norm), math.hypot(after, clipped or 0.0)
            if "owner" in self.kinds:
                scalars |= {tag: value for tag, value in numbers.items() if tag.startswith(f"grad/{name}/")}
                scalars |= {} if clipped is None else {f"grad/{name}/post_clip": clipped}
                scalars[f"grad/{name}/log10_pre_clip"] = _log10(norm)
        if "total" in self.kinds and self._tallies:
            scalars["grad/total/pre_clip"] = before
            scalars |= {"grad/total/post_clip": after} if is_after_known else {}
            scalars["grad/total/log10_pre_clip"] = _log10(before)
        return scalars

    def _rates(self) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for name, owner in self.owners.items():
            rates = [float(group["lr"]) for group in owner.optimizer.param_groups if "lr" in group]
            tags = [f"optim/lr/{name}"] if len(set(rates)) == 1 else [f"optim/lr/{name}/{i}" for i in range(len(rates))]
            scalars |= dict(zip(tags, rates, strict=False))
        return scalars

    def _pace(self) -> dict[str, float]:
        seconds = max(self._seconds, 1e-9)
        return {"perf/samples_per_s": self._samples / seconds, "perf/step_ms": 1e3 * seconds / max(1, self._steps)}


def _larger(a: Reading, b: Reading) -> Reading:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a, device=getattr(b, "device", None)), torch.as_tensor(b))
    return max(a, b)


def _after(clipping: Clipping | None, norm: float) -> float | None:
    """The norm after clipping, where it follows from the one before; else it is what the step measured."""
    if clipping is None:
        return norm
    return norm * min(1.0, clipping.limit / (norm + 1e-6)) if isinstance(clipping, ClipByNorm) else None


def _log10(norm: float) -> float:
    return math.log10(norm) if norm > 0 else -math.inf


def _to_host(readings: Mapping[str, Reading], norms: Tensor | None) -> tuple[dict[str, float], list[float]]:
    tensors = [value.reshape(1).float() for value in readings.values() if isinstance(value, Tensor)]
    tensors += [] if norms is None else [norms.float().to(tensors[0].device if tensors else norms.device)]
    moved = iter(torch.cat(tensors).tolist() if tensors else [])
    numbers = {tag: next(moved) if isinstance(value, Tensor) else value for tag, value in readings.items()}
    return numbers, list(moved)


def _geometry(report: StepReport) -> dict[str, Reading]:
    """Norms and cosines of the terms' gradients at their shared cut."""
    readings: dict[str, Reading] = {}
    for geometry in report.geometry:
        names = geometry.names
        readings |= {f"loss_grad/{name}": norm for name, norm in zip(names, geometry.norms, strict=True)}
        readings |= {f"loss_cos/{names[i]}~{names[j]}": geometry.cosines[i, j] for i, j in geometry.pairs}
    return readings


def _module_norms(report: StepReport) -> tuple[list[str], Tensor | None]:
    """Names of the modules that have gradients and the norm of each, `[number of modules]`."""
    names = [name for owner in report.present.values() for name in owner]
    if not names:
        return [], None
    modules = [name.rpartition(".")[0] or "(root)" for name in names]
    if len(set(modules)) > MAX_MODULES:
        modules = [name.partition(".")[0] for name in names]
    order = {module: index for index, module in enumerate(dict.fromkeys(modules))}
    each = torch.cat([norms.float() for norms in report.each_norm.values()])
    index = torch.tensor([order[module] for module in modules], device=each.device)
    zeros = torch.zeros(len(order), dtype=torch.float32, device=each.device)  # whatever the default dtype is
    return list(order), zeros.index_add_(0, index, each.square()).sqrt()
