"""Who wrote it: writes to memory that no version counter saw, as something that watches operations notes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from safeloop.autograd.sites import Site


class Write(NamedTuple):
    """One operation that wrote into a tensor."""

    description: str
    """the operation, for a reader: ``Tensor.mul_`` or ``numpy()``"""
    place: Site | None
    """the user's line, where it is known"""


class WriteLog:
    """Writes by the memory that they went to, in order.

    A function mode, a step hook of an optimizer, or whatever else sees operations, calls `note` for each that writes
    into a tensor, or gives out memory that can be written unseen (`numpy()`, `to_dlpack`). Tensors that share a
    storage share their writes. The log keeps addresses and no tensor: an address tells something only as long as the
    one who asks keeps the storage alive, as a saved tensor does. Cost: about 1 us a note.
    """

    def __init__(self) -> None:
        self._writes: dict[int, list[tuple[int, Write]]] = {}
        self.count = 0
        """writes noted so far: what to give to `since` later"""

    def note(self, tensor: Tensor, description: str, place: Site | None) -> None:
        """`tensor` is being written, or given out to be written."""
        pointer = storage_pointer(tensor)
        if pointer:
            self.count += 1
            self._writes.setdefault(pointer, []).append((self.count, Write(description, place)))

    def since(self, pointer: int, count: int) -> tuple[Write, ...]:
        """The writes to the storage at `pointer` after the first `count` writes of the log, each once, in order."""
        return tuple(dict.fromkeys(write for at, write in self._writes.get(pointer, ()) if at > count))

    def clear(self) -> None:
        """Forget all writes; the count goes on."""
        self._writes.clear()


def storage_pointer(tensor: Tensor) -> int:
    """The address of a tensor's storage; of its values where it is sparse; 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        pass
    try:
        values = tensor._values() if tensor.is_sparse else tensor.values()
        return values.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, AttributeError):
        return 0
