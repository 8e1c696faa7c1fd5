"""The device of a run, and how batches get there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safeloop.checks.data.source import BatchCannotMove, DeviceMissing
from safeloop.data.structure import key_path, tensors

_ACCEPTED = "auto, cpu, cuda or cuda:N"


def resolve_device(name: str | torch.device) -> torch.device:
    """The device that `run.device` means: `auto` is CUDA where there is one, else the CPU.

    `cuda` is the current CUDA device.

    Raises:
        FaultError: SL853 when it is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceMissing.error(f"{str(name)!r} names no device", fix=f"set run.device to {_ACCEPTED}") from error
    if device.type == "cuda":
        return _cuda(device)
    if device.type == "mps" and torch.backends.mps.is_available():
        return torch.device("mps", device.index or 0)
    if device.type != "cpu":
        raise DeviceMissing.error(f"device {str(name)!r} is not available", fix=f"set run.device to {_ACCEPTED}")
    return torch.device("cpu")


def _cuda(device: torch.device) -> torch.device:
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_devices:
        is_built = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
        why = "torch finds no CUDA driver or no device" if is_built else "this build of torch has no CUDA"
        fix = f"set run.device to auto or cpu (it is {device}), or install a CUDA build of torch and its driver"
        raise DeviceMissing.error(f"device '{device}' was asked for, and torch sees no CUDA device", why=why, fix=fix)
    index = torch.cuda.current_device() if str(device) == "cuda" else device.index
    if index >= num_devices:
        what = f"device '{device}' was asked for, and torch sees {num_devices} CUDA device(s)"
        raise DeviceMissing.error(
            what, fix=f"set run.device to cuda or to an index below {num_devices} (it is {device})"
        )
    return torch.device("cuda", index)


class Mover:
    """`mover(batch)`: the batch with every tensor on the device.

    Tuples, lists, dicts, namedtuples, dataclasses and objects with `.to(device)` are moved, nested as they come; a
    batch that is there already is returned itself. What holds no tensors (strings, numbers, numpy arrays) stays as it
    is. The caller's containers are never edited (an object's own `.to` may). About 1 us for a pair of tensors that are
    in place.
    """

    def __init__(self, device: torch.device) -> None:
        if str(device) == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._is_async = device.type == "cuda"

    def __call__(self, batch: Any) -> Any:
        """The batch on the device.

        Raises:
            FaultError: SL852, naming the path inside the batch and the type that cannot move.
        """
        kind = type(batch)
        if kind is tuple or kind is list:
            device = self.device
            for part in batch:
                if type(part) is not Tensor or part.device != device:
                    break
            else:
                return batch
        return self._move(batch, "batch")

    def _move(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return self._move_tensor(value, path)
        if callable(getattr(value, "to", None)) and not isinstance(value, type):
            moved = value.to(self.device)
            return value if moved is None else moved
        if isinstance(value, Mapping):
            return self._move_mapping(value, path)
        if isinstance(value, (tuple, list)):
            return self._move_sequence(value, path)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._move_dataclass(value, path)
        self._refuse_strays(value, path)
        return value

    def _move_tensor(self, tensor: Tensor, path: str) -> Tensor:
        if tensor.device == self.device:
            return tensor
        if tensor.is_meta:
            raise BatchCannotMove.error(
                f"`{path}` is a tensor on the meta device: it has a shape, no values, and cannot move to {self.device}",
                fix=f"give `{path}` real values: build it on the CPU or on {self.device}",
            )
        return tensor.to(self.device, non_blocking=self._is_async)

    def _move_mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        moved = {key: self._move(part, path + key_path(key)) for key, part in value.items()}
        changed = {key: part for key, part in moved.items() if part is not value[key]}
        if not changed:
            return value
        if type(value) is dict:
            return moved
        try:
            twin: Any = copy.copy(value)
            for key, part in changed.items():
                twin[key] = part
        except TypeError as error:
            raise self._cannot(path, value, "its items cannot be set") from error
        return twin

    def _move_sequence(self, value: tuple[Any, ...] | list[Any], path: str) -> Any:
        names = getattr(value, "_fields", None)
        steps = [f"[{index}]" for index in range(len(value))] if names is None else [f".{name}" for name in names]
        moved = [self._move(part, path + step) for step, part in zip(steps, value, strict=True)]
        if all(new is old for new, old in zip(moved, value, strict=True)):
            return value
        kind = type(value)
        try:
            return kind(*moved) if names is not None else kind(moved)
        except TypeError as error:
            raise self._cannot(path, value, "it cannot be built from its items") from error

    def _move_dataclass(self, value: Any, path: str) -> Any:
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        moved = {name: self._move(getattr(value, name), f"{path}.{name}") for name in names}
        changed = {name: part for name, part in moved.items() if part is not getattr(value, name)}
        if not changed:
            return value
        twin = copy.copy(value)
        for name, part in changed.items():
            object.__setattr__(twin, name, part)
        return twin

    def _refuse_strays(self, value: Any, path: str) -> None:
        for where, tensor in tensors(value, path):
            if tensor.device != self.device:
                raise self._cannot(
                    path, value, f"`{where}` in it is a tensor on {tensor.device}, and it has no `.to(device)`"
                )

    def _cannot(self, path: str, value: Any, reason: str) -> Exception:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        return BatchCannotMove.error(
            f"`{path}` is a `{kind}` that cannot move to {self.device}: {reason}",
            why="safeloop moves tensors in tuples, lists, dicts, dataclasses and objects with `to(device)`",
            fix=f"give `{type(value).__name__}` a `to(device)` that returns the moved one, or make it a dataclass",
        )
