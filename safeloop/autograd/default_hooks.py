"""Install a pair of default hooks for saved tensors so that nothing else notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch import Tensor
from torch._C import _autograd
from torch.autograd import graph

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]
Pair = tuple[Pack, Unpack]

_pushed: list[Pair] = []
"""of all threads"""
_lock = Lock()
_torchs_own = graph.disable_saved_tensors_hooks


def push(pair: Pair) -> bool:
    """Install `pair` as `torch.autograd.graph.saved_tensors_hooks` does, in this thread; False where it must not be.

    Torch calls only the pair that was pushed last, so where hooks of someone else are already there (`save_on_cpu`, an
    offloader), or where hooks are not allowed, everything is left as it is. Hooks that others push later take over
    until they go.

    `torch.func.grad` and its like refuse to run under hooks, by `torch.autograd.graph.disable_saved_tensors_hooks`.
    Until the last pair of `push` is gone, that name is a function that takes the pair away for as long as they run.
    """
    if _autograd._saved_tensors_hooks_get_disabled_error_message() is not None or _top() is not None:
        return False
    with _lock:
        _pushed.append(pair)
        graph.disable_saved_tensors_hooks = _disabled
    _autograd._push_saved_tensors_default_hooks(*pair)
    return True


def pop(pair: Pair) -> None:
    """Take away a pair that was pushed; pairs that others pushed on top of it stay."""
    above: list[Pair] = []
    while (top := _top()) is not None:
        _autograd._pop_saved_tensors_default_hooks()
        if top[0] is pair[0]:
            break
        above.append(top)
    for other in reversed(above):
        _autograd._push_saved_tensors_default_hooks(*other)
    with _lock:
        _pushed.remove(pair)
        if not _pushed:
            graph.disable_saved_tensors_hooks = _torchs_own


@contextmanager
def _disabled(error_message: str) -> Iterator[None]:
    """Torch's own, with a pair of ours out of the way."""
    top = _top()
    ours = next((pair for pair in _pushed if top is not None and pair[0] is top[0]), None)
    if ours is not None:
        _autograd._pop_saved_tensors_default_hooks()
    try:
        with _torchs_own(error_message):
            yield
    finally:
        if ours is not None:
            _autograd._push_saved_tensors_default_hooks(*ours)


def _top() -> Pair | None:
    return _autograd._top_saved_tensors_default_hooks(True)
