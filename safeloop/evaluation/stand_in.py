"""Another model in the place of the live one, for an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from safeloop.evaluation.preserved import preserved


class Holder(Protocol):
    """Whatever has a `model`."""

    model: nn.Module


@contextmanager
def standing_in(holder: Holder, model: nn.Module | None) -> Iterator[None]:
    """A region in which `holder.model` is `model`; None: the live one stays.

    The live model is bitwise as before afterwards, also where the user kept a reference to it and ran it inside.
    """
    if model is None:
        yield
        return
    live = holder.model
    with preserved(live):
        holder.model = model
        try:
            yield
        finally:
            holder.model = live
