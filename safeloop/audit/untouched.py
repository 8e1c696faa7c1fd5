"""A region in which a turn may be run again, and after which everything is as before."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from safeloop.data.structure import tensors
from safeloop.evaluation import preserved
from safeloop.step.turn import Rerun


@contextmanager
def untouched(model: nn.Module, rerun: Rerun, window: Sequence[Any]) -> Iterator[None]:
    """Inside, the parameters are frozen as in the phase; afterwards all is bitwise as before.

    That is: what `preserved` lists, the values of the batches, and which objects the attributes of the modules and of
    the Trainer are. A list or dict of the user's that the loss function edits in place is not undone.
    """
    owner = getattr(rerun.losses, "__self__", None)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(_contents_restored(window))
        stack.enter_context(_attributes_restored([*model.modules(), *([] if owner is None else [owner])]))
        stack.enter_context(_frozen_as_in(rerun))
        stack.enter_context(_eager())
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _frozen_as_in(rerun: Rerun) -> Iterator[None]:
    """Trained parameters require grad, unless their owner has others that do; those of other phases do not."""
    trained = [
        parameter
        for owner in rerun.owners
        if not any(parameter.requires_grad for parameter in owner.tensors)  # another phase runs: it froze them
        for parameter in owner.tensors
    ]
    saved = [(parameter, parameter.requires_grad) for parameter in (*trained, *rerun.others)]
    try:
        for parameter in trained:
            parameter.requires_grad = True
        for parameter in rerun.others:
            parameter.requires_grad = False
        yield
    finally:
        for parameter, requires_grad in saved:
            parameter.requires_grad = requires_grad


@contextmanager
def _contents_restored(window: Sequence[Any]) -> Iterator[None]:
    """Values, `requires_grad` and `.grad` of the tensors of a window."""
    found = {id(tensor): tensor for batch in window for _, tensor in tensors(batch)}.values()
    saved = [(t, t.detach().clone(), _version(t), t.requires_grad, t.grad if t.is_leaf else None) for t in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values, version, requires_grad, grad in saved:
                if _version(tensor) != version:
                    tensor.copy_(values)
                if tensor.is_leaf:
                    tensor.requires_grad_(requires_grad)
                    tensor.grad = grad


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _attributes_restored(objects: Iterable[Any]) -> Iterator[None]:
    saved = [(vars(one), dict(vars(one))) for one in objects if hasattr(one, "__dict__")]
    try:
        yield
    finally:
        for now, before in saved:
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update({name: value for name, value in before.items() if now.get(name) is not value})


def _eager() -> AbstractContextManager[object]:
    """Compiled modules run uncompiled, or their operations could not be seen."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
