"""How the term checks read what a loss function returned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safeloop.checks.source import term_lines
from safeloop.checks.views import TermsView

_SHOWN = 3


@dataclass(frozen=True)
class ReadTerm:
    """A loss term that holds a tensor: `tensor`, or `(tensor, weights)`."""

    name: str
    tensor: Tensor
    weights: Any = None
    is_weighted: bool = False

    @property
    def is_well_formed(self) -> bool:
        """Whether it can be differentiated as it stands: a float scalar, or a float tensor with weights like it."""
        shape = self.weights.shape if isinstance(self.weights, Tensor) else None
        is_scalar = shape == self.tensor.shape if self.is_weighted else self.tensor.dim() == 0
        return self.tensor.dtype.is_floating_point and is_scalar


def read_terms(view: TermsView) -> Iterator[ReadTerm]:
    """The terms that hold a tensor, in order; everything else is for SL401 and SL402."""
    for name, term in view.terms.items():
        if isinstance(term, Tensor):
            yield ReadTerm(name, term)
        elif isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], Tensor):
            yield ReadTerm(name, term[0], term[1], is_weighted=True)


def where(view: TermsView, term: str) -> str:
    """Where the loss function is, and its lines that make and return this term."""
    lines = [f"line {place.line}: `{place.text}`" for place in term_lines(view.source, term)]
    made = view.made.get(term)
    if made is not None and f"line {made.line}: `{made.text}`" not in lines:
        lines.append(f"made at {made}")
    shown = "; ".join([*lines[:_SHOWN], *(["..."] if len(lines) > _SHOWN else [])])
    cut = f"; {view.cuts[term]}" if term in view.cuts else ""
    return f"loss term `{term}`, {view.source}" + (f"; {shown}" if shown else "") + cut
