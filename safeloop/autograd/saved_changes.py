"""What a guard of saved tensors finds, as values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safeloop.autograd.sites import Site
from safeloop.autograd.writes import Write

Kind = Literal["version", "storage replaced", "values"]


@dataclass(frozen=True, slots=True)
class SavedTensorChange:
    """One saved tensor that was not the same any more when the backward pass asked for it."""

    kind: Kind
    """`version`: written in place, and counted: torch's own error follows; `storage replaced`: `.data = ...`;
    `values`: other bits in the same memory, and no write was counted"""
    node: str
    """the operation that had saved it and asked for it: `SigmoidBackward0`; empty where unknown"""
    argument: str
    """what it is to that operation: `self`, `result`, `weight`; empty where unknown"""
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    """the address of its memory: the same for changes of one pass that are one write seen twice"""
    parameter: str
    """the full name of the parameter that it is, or is part of; empty for any other tensor"""
    saved_at: Site | None
    """the user's line that was running when it was saved"""
    written_by: tuple[Write, ...]
    """writes into its storage since it was saved, where something noted them"""


class SavedTensorVersionError(RuntimeError):
    """What torch raises for an in-place write to a saved tensor, in its words; `change` says more."""

    def __init__(self, message: str, change: SavedTensorChange) -> None:
        super().__init__(message)
        self.change = change

    @classmethod
    def of(
        cls, change: SavedTensorChange, alias: Tensor, origin: Tensor | None, expected: int
    ) -> SavedTensorVersionError:
        """The error for a tensor that was saved at version `expected`; `origin` is the tensor itself, if alive."""
        maker = origin.grad_fn if origin is not None else None
        of = f", which is output {origin.output_nr} of {_short(maker.name())}," if origin is not None and maker else ""
        return cls(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{alias.type()} {list(alias.shape)}]{of} is at version {alias._version}; expected version {expected} "
            "instead. Hint: enable anomaly detection to find the operation that failed to compute its gradient, with "
            "torch.autograd.set_detect_anomaly(True, check_nan=False).",
            change,
        )


def _short(name: str) -> str:
    """As torch writes it in this error: `Sigmoid` for `SigmoidBackward0`."""
    return re.sub(r"Backward\d*$", "", name)
