"""Guard what autograd has saved: was a tensor written since, in a way that torch's version counter does not see?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import CodeType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from safeloop.autograd.default_hooks import pop, push
from safeloop.autograd.fingerprints import fingerprint, is_plain
from safeloop.autograd.names import ParameterNames
from safeloop.autograd.running_node import argument_of, is_own_write, running_node, writes_itself
from safeloop.autograd.saved_changes import Kind, SavedTensorChange, SavedTensorVersionError
from safeloop.autograd.sites import code_site, user_code
from safeloop.autograd.writes import WriteLog, storage_pointer

Level = Literal["version", "checksum"]


class _Saved:
    """What the guard keeps for each saved tensor: an alias of the tensor, which holds no graph."""

    __slots__ = ("alias", "checksum", "code", "num_writes", "origin", "pointer", "version")

    alias: Tensor
    origin: weakref.ref[Tensor]
    version: int
    pointer: int
    checksum: Tensor | None
    code: tuple[CodeType, int] | None
    num_writes: int


class SavedTensorGuard:
    """Watches every tensor that autograd saves between `start` and `stop`, and looks at it again when it is used.

    An in-place write that torch's version counter sees ends in torch's own error, whose words are kept. A write that
    it does not see (`.data`, numpy, DLPack, `leaf.data = new`, a kernel that writes without counting) becomes a
    `SavedTensorChange`, and the backward pass goes on with what it would have used without the guard. Gradients and
    random state are bitwise those of a run without it, with one exception: torch checks no versions under hooks, so
    the guard does, in the same place.

    Tensors that are saved while it is on stay watched until their graph is gone, also after `stop`. Hooks of the
    user's own (`save_on_cpu`) and those of non-reentrant checkpointing come first, and what they hold is not watched;
    see `ParameterLedger` for what checkpointing reads again.

    Cost: at level `version` about 4 us for each saved tensor; `checksum` reads each twice more. On accelerators no
    sync before `verify`. Memory: a saved tensor is held as long as torch would hold it.

    Args:
        parameters: by full name, so that a change can say which it was.
        level: `version` looks at version counters and addresses, `checksum` at every bit, too.
        writes: where writes are noted, to name who wrote.
        on_change: called with each change as it is found; on accelerators, those of kind `values` in `verify`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor] | None = None,
        level: Level = "checksum",
        *,
        writes: WriteLog | None = None,
        on_change: Callable[[SavedTensorChange], object] | None = None,
    ) -> None:
        self.findings: list[SavedTensorChange] = []
        """in the order in which they were found"""
        self._names = ParameterNames(parameters or {})
        self._is_deep = level == "checksum"
        self._writes = writes
        self._on_change = on_change
        self._pair = (self._pack, self._unpack)
        self._is_active = False
        self._checked: dict[tuple[Any, ...], Tensor | None] = {}
        self._pass = -1
        self._waiting: list[tuple[Tensor, Tensor, SavedTensorChange]] = []

    @property
    def is_active(self) -> bool:
        """Whether tensors saved now are watched; not, after a `start` under hooks of someone else."""
        return self._is_active

    def start(self) -> None:
        """Watch what is saved from now on, in this thread."""
        if not self._is_active:
            self._is_active = push(self._pair)

    def stop(self) -> tuple[SavedTensorChange, ...]:
        """Watch no further tensors; what was found so far. On accelerators this is one sync."""
        if self._is_active:
            self._is_active = False
            pop(self._pair)
        return self.verify()

    def verify(self) -> tuple[SavedTensorChange, ...]:
        """What was found so far; checksums on accelerators are compared here, all at once."""
        waiting, self._waiting = self._waiting, []
        for device in {before.device for before, _, _ in waiting}:
            own = [entry for entry in waiting if entry[0].device == device]
            before, after = (torch.stack([entry[i] for entry in own]) for i in (0, 1))  # type: ignore[misc]
            for entry, is_same in zip(own, (before == after).tolist(), strict=True):
                if not is_same:
                    self._report(entry[2])
        return tuple(self.findings)

    def __enter__(self) -> SavedTensorGuard:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _pack(self, tensor: Tensor) -> object:
        with torch._C.DisableTorchFunction():  # no function mode is to hear what the guard does
            return self._keep(tensor)

    def _keep(self, tensor: Tensor) -> object:
        if not is_plain(tensor):
            return tensor.detach()
        saved = _Saved()
        saved.alias = tensor.detach()  # the tensor itself would hold the graph, and the graph the tensor
        saved.origin = weakref.ref(tensor)
        saved.version = tensor._version
        saved.pointer = tensor.data_ptr() if tensor.layout is torch.strided else 0
        saved.code = user_code()
        saved.num_writes = self._writes.count if self._writes is not None else 0
        saved.checksum = fingerprint(saved.alias) if self._is_deep else None
        return saved

    def _unpack(self, saved: object) -> Tensor:
        if not isinstance(saved, _Saved):
            assert isinstance(saved, Tensor)
            return saved
        if saved.alias._version != saved.version:
            change = self._change("version", saved)
            self._report(change)
            raise SavedTensorVersionError.of(change, saved.alias, saved.origin(), saved.version)
        node = running_node()
        if node is None:  # someone looks at an attribute of a node: nothing is computed from it
            return saved.alias
        origin = saved.origin()
        if origin is not None and saved.pointer and origin.data_ptr() != saved.pointer and origin.grad_fn is not node:
            self._report(self._change("storage replaced", saved))  # of its own output a node keeps the old memory
            return origin.detach()
        if saved.checksum is not None:
            self._compare(saved, saved.checksum)
        return saved.alias

    def _compare(self, saved: _Saved, before: Tensor) -> None:
        after = self._current(saved)
        if after is None:
            return
        if _is_at_hand(before):
            if before.item() != after.item() and not is_own_write(argument := argument_of(saved)):
                self._report(self._change("values", saved, argument))
        elif not is_own_write(argument := argument_of(saved) if writes_itself() else ""):
            self._waiting.append((before, after, self._change("values", saved, argument)))

    def _current(self, saved: _Saved) -> Tensor | None:
        """The checksum now; taken once a backward pass for tensors that are saved several times."""
        current = torch._C._current_graph_task_id()
        if current != self._pass or current == -1:
            self._pass = current
            self._checked.clear()
        alias = saved.alias
        if alias.layout is not torch.strided:
            return fingerprint(alias)
        key = (saved.pointer, alias.shape, alias.stride(), alias.dtype, alias.is_conj(), alias.is_neg())
        if key not in self._checked:
            self._checked[key] = fingerprint(alias)
        return self._checked[key]

    def _change(self, kind: Kind, saved: _Saved, argument: str | None = None) -> SavedTensorChange:
        node = running_node()
        pointer = storage_pointer(saved.alias)
        return SavedTensorChange(
            kind=kind,
            node=node.name() if node is not None else "",
            argument=argument_of(saved) if argument is None else argument,
            shape=tuple(saved.alias.shape),
            dtype=saved.alias.dtype,
            storage=pointer,
            parameter=self._names.of(saved.alias, saved.origin()),
            saved_at=code_site(saved.code) if saved.code is not None else None,
            written_by=self._writes.since(pointer, saved.num_writes) if self._writes is not None else (),
        )

    def _report(self, change: SavedTensorChange) -> None:
        self.findings.append(change)
        if self._on_change is not None:
            self._on_change(change)


def _is_at_hand(checksum: Tensor) -> bool:
    """Whether its value can be read without waiting for a device."""
    return checksum.is_cpu
