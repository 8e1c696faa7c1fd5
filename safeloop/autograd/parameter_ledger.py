"""Remember the parameters as the forward left them, to see whether they have changed before they are read again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from safeloop.autograd.fingerprints import fingerprint
from safeloop.autograd.writes import Write, WriteLog, storage_pointer


@dataclass(frozen=True, slots=True)
class ParameterChange:
    """A parameter that is not what it was when the forward ended."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["version", "storage replaced", "values"]
    """`version`: an in-place write that was counted; `storage replaced`: `.data = ...`; `values`: an uncounted write"""
    written_by: tuple[Write, ...]
    """writes since then, where something noted them"""


class _Entry(NamedTuple):
    version: int
    pointer: int
    checksum: Tensor | None


class ParameterLedger:
    """Versions, addresses and checksums of parameters, taken by `close_forward` and compared by `changed`.

    It sees what a guard of saved tensors cannot: activation checkpointing saves no parameters, it reads them again
    while it recomputes the forward inside the backward pass. A change is no mistake of itself: an optimizer may step
    between two backward passes of which the second does not need what it wrote. So ask for those that matter:
    `changed(only=recomputed_leaves(roots))`, before the backward pass; after it only where no optimizer steps inside of
    it.

    Cost: about 20 us and two passes over memory for each parameter, twice; one sync in `changed` on an accelerator.

    Args:
        parameters: by full name; buffers may be among them. They are read anew each time.
        writes: where writes are noted, to name who wrote.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, writes: WriteLog | None = None) -> None:
        self._parameters = parameters
        self._writes = writes
        self._entries: dict[str, _Entry] = {}
        self._num_writes = 0
        self.is_closed = False
        """whether there is something to compare with"""

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Close the forward each time that `model` has run, so that a write later in the loss function is seen too."""
        hook = model.register_forward_hook(lambda *_: self.close_forward())
        try:
            yield
        finally:
            hook.remove()

    def open_forward(self) -> None:
        """Forget what was remembered: a new forward begins."""
        self._entries, self.is_closed = {}, False

    def close_forward(self) -> None:
        """Remember all of them as they are now; not inside of a backward pass, where a forward is a recomputation."""
        if torch._C._current_graph_task_id() != -1:
            return
        self.is_closed = True
        self._num_writes = self._writes.count if self._writes is not None else 0
        with torch._C.DisableTorchFunction():  # no function mode is to take this for a use of the parameters
            self._entries = {name: _entry(parameter) for name, parameter in self._parameters.items()}

    def changed(self, only: Collection[Tensor] | None = None) -> tuple[ParameterChange, ...]:
        """Those that differ from what `close_forward` saw, in the order of the parameters; of `only`, where given."""
        now = self._parameters
        names = [name for name in self._entries if name in now and (only is None or now[name] in only)]
        before = [self._entries[name] for name in names]
        after = [_entry(now[name]) for name in names]
        other = _differing(before, after)
        found = []
        for i, name in enumerate(names):
            if before[i].pointer != after[i].pointer:
                found.append(self._change(name, "storage replaced"))
            elif before[i].version != after[i].version:
                found.append(self._change(name, "version"))
            elif i in other:
                found.append(self._change(name, "values"))
        return tuple(found)

    def _change(self, name: str, kind: Literal["version", "storage replaced", "values"]) -> ParameterChange:
        parameter = self._parameters[name]
        pointer = storage_pointer(parameter)
        written = self._writes.since(pointer, self._num_writes) if self._writes is not None else ()
        return ParameterChange(name, tuple(parameter.shape), kind, written)


def _entry(parameter: Tensor) -> _Entry:
    version = 0 if parameter.is_inference() else parameter._version
    pointer = parameter.data_ptr() if parameter.layout is torch.strided else 0
    return _Entry(version, pointer, fingerprint(parameter))


def _differing(before: list[_Entry], after: list[_Entry]) -> set[int]:
    """Positions whose checksums differ; one sync for each device."""
    by_device: dict[torch.device, list[tuple[int, Tensor, Tensor]]] = {}
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.checksum is not None and new.checksum is not None and old.checksum.device == new.checksum.device:
            by_device.setdefault(old.checksum.device, []).append((i, old.checksum, new.checksum))
    differing: set[int] = set()
    for entries in by_device.values():
        is_same = torch.stack([old for _, old, _ in entries]) == torch.stack([new for _, _, new in entries])
        differing |= {i for (i, _, _), same in zip(entries, is_same.tolist(), strict=True) if not same}
    return differing
