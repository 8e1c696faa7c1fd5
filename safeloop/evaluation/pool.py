"""Running sums of metrics: per-sample values pooled exactly, single numbers weighted, objects computed at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safeloop.checks.data.source import EmptyData
from safeloop.checks.evaluation.metrics import BadMetric
from safeloop.faults import FaultError


@dataclass(slots=True)
class _Mean:
    num_dims: int
    total: Tensor
    """0-d, float64 (float32 on MPS), on the device of the values"""
    weight: int


class Pool:
    """The metrics of the batches so far. `where` stands in faults for the place where they are computed."""

    def __init__(self, where: str = "") -> None:
        self._where = where
        self._means: dict[str, _Mean] = {}
        self._objects: dict[str, Any] = {}
        self._names: tuple[str, ...] = ()
        self._num_batches = 0

    def add(self, values: Any, count: Callable[[], int]) -> None:
        """Take what `metrics` returned for a batch; `count` gives its samples, asked only for single numbers."""
        if not isinstance(values, Mapping) or not values:
            shown = "an empty mapping" if isinstance(values, Mapping) else f"a {_kind(values)}"
            fix = 'return a dict of named values: {"accuracy": output.argmax(1) == labels}'
            raise self._bad(f"`metrics` returned {shown}", fix)
        self._check_names(values)
        weight: int | None = None
        for name, value in values.items():
            if _is_stateful(value):
                self._keep(name, value)
                continue
            tensor = self._as_tensor(name, value).detach()
            if tensor.ndim == 0 and weight is None:
                weight = int(count())
            self._sum(name, tensor, weight or 0)
        self._num_batches += 1

    def results(self) -> dict[str, float]:
        """The metrics over all batches, moved from the device once."""
        if not self._num_batches:
            fix = "check the path and the filter of the evaluation data"
            raise EmptyData.error("the evaluation data gave no batch", where=self._where, fix=fix)
        totals = _to_host({name: mean.total for name, mean in self._means.items()})
        results: dict[str, float] = {}
        for name in self._names:
            if name in self._objects:
                results.update(self._computed(name, self._objects[name].compute()))
            elif self._means[name].weight == 0:
                fix = f"leave `{name}` out, or look for the mask or the `count` that leaves nothing"
                raise self._bad(f"metric `{name}` has no element in any of the {self._num_batches} batches", fix)
            else:
                results[name] = totals[name] / self._means[name].weight
        return results

    def reset(self) -> None:
        """Reset the metric objects, for the next evaluation."""
        for metric in self._objects.values():
            metric.reset()

    def _check_names(self, values: Mapping[Any, Any]) -> None:
        for name in values:
            if not isinstance(name, str):
                raise self._bad(f"the name of a metric is {name!r}, a {_kind(name)}", "name metrics with strings")
        if not self._num_batches:
            self._names = tuple(values)
        elif values.keys() != set(self._names):
            missing = [f"`{name}` is missing" for name in self._names if name not in values]
            new = [f"`{name}` is new" for name in values if name not in self._names]
            fix = "return the same names for every batch, and an empty tensor, value[mask], where there is nothing"
            raise self._bad(f"the metrics are not those of the batches before: {', '.join(missing + new)}", fix)

    def _keep(self, name: str, metric: Any) -> None:
        before = self._objects.setdefault(name, metric)
        if before is not metric or name in self._means:
            shown = "a number or tensor" if name in self._means else f"another {_kind(before)}"
            fix = f"make it once, in __init__, update() it in `metrics`, and return it as `{name}`"
            raise self._bad(f"metric `{name}` is a {_kind(metric)}, and was {shown} on the batches before", fix)

    def _sum(self, name: str, tensor: Tensor, weight: int) -> None:
        wide = torch.float32 if tensor.device.type == "mps" else torch.float64
        if tensor.ndim:
            weight, total = tensor.numel(), tensor.sum(dtype=wide)
        else:  # of a batch without samples nothing counts, not even NaN
            total = tensor.to(wide) * weight if weight else tensor.new_zeros((), dtype=wide)
        mean = self._means.get(name)
        if name in self._objects or (mean is not None and mean.num_dims != tensor.ndim):
            before = f"had {mean.num_dims}" if mean else f"was a {_kind(self._objects[name])}"
            now = f"{tensor.ndim} dimensions (shape {tuple(tensor.shape)})"
            what = f"metric `{name}` has {now}, and {before} on the batches before"
            fix = f"return `{name}` per sample for every batch; squeeze(1), since squeeze() drops a batch of one too"
            raise self._bad(what, fix)
        if mean is None:
            self._means[name] = _Mean(tensor.ndim, total, weight)
        else:
            mean.total = mean.total + total
            mean.weight += weight

    def _as_tensor(self, name: str, value: Any) -> Tensor:
        tensor = _tensor_or_none(value)
        if tensor is not None and not tensor.is_complex():
            return tensor
        shown = "a complex number" if tensor is not None else f"a {_kind(value)}"
        fix = "return a tensor [N], a value per sample, or a number, or an object with update/compute/reset"
        raise self._bad(f"metric `{name}` is {shown}", fix)

    def _computed(self, name: str, value: Any) -> dict[str, float]:
        if isinstance(value, Mapping):
            return {tag: v for key, part in value.items() for tag, v in self._computed(f"{name}/{key}", part).items()}
        tensor = self._as_tensor(name, value)
        if tensor.numel() != 1:
            fix = "let it give one number (torchmetrics: average='macro') or a dict of numbers"
            raise self._bad(f"compute() of metric `{name}` gave a tensor of shape {tuple(tensor.shape)}", fix)
        return {name: float(tensor)}

    def _bad(self, what: str, fix: str) -> FaultError:
        where = f"evaluation batch {self._num_batches}" + (f", {self._where}" if self._where else "")
        return BadMetric.error(what, where=where, fix=fix)


def _is_stateful(value: Any) -> bool:
    names = ("update", "compute", "reset")
    return not isinstance(value, Tensor) and all(callable(getattr(value, name, None)) for name in names)


def _tensor_or_none(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, int, float)):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return torch.as_tensor(np.asarray(value), device="cpu")
    return None


def _kind(value: Any) -> str:
    return f"`{type(value).__module__}.{type(value).__qualname__}`".replace("`builtins.", "`")


def _to_host(totals: dict[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, with one transfer per device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, total in totals.items():
        by_device.setdefault(total.device, []).append(name)
    values: dict[str, float] = {}
    for names in by_device.values():
        values.update(zip(names, torch.stack([totals[name] for name in names]).tolist(), strict=True))
    return values
