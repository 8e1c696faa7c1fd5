"""What is known of one birth: the operation that gave NaN or infinity from inputs that were finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safeloop.checks.source import Place

Kind = Literal["nan", "inf"]
Phase = Literal["forward", "backward", "given"]
"""`given`: no operation made it; the batch, a parameter, a buffer or a constant already held it"""


@dataclass(frozen=True, slots=True)
class Reading:
    """The values of one tensor in a few numbers; `low` and `high` are of its finite entries, 0 where there are none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    num_zeros: int
    num_nan: int
    num_inf: int
    num_negative_inf: int

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        return not (self.num_nan or self.num_inf)

    @property
    def size(self) -> int:
        """Number of entries."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    def __str__(self) -> str:
        where = f"{list(self.shape)} " if self.shape else ""
        if not self.size:
            return f"{self.name}{where}without entries"
        span = f"{self.low:.4g}" if self.low == self.high else f"{self.low:.4g}..{self.high:.4g}"
        extras = [(self.num_zeros if self.low != self.high else 0, "zero"), (self.num_nan, "NaN")]
        extras += [(self.num_inf - self.num_negative_inf, "inf"), (self.num_negative_inf, "-inf")]
        has_finite = self.num_nan + self.num_inf < self.size
        parts = ([span] if has_finite else []) + [f"{count} {word}" for count, word in extras if count]
        return f"{self.name}{where}{', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a birth happens, and what to write instead."""

    trap: str
    """its short name, as in the table of traps"""
    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class Birth:
    """The first operation at which a NaN or an infinity is born that reaches what is bad."""

    phase: Phase
    op: str
    """the operation as torch's dispatcher knows it, `sqrt`; of what is given, its name: `batch[0]`"""
    kind: Kind
    num_bad: int
    size: int
    """entries that are not finite, of how many"""
    dtype: str
    node: str = ""
    """of a backward birth, the autograd node: `SqrtBackward0`"""
    call: str = ""
    """of a backward birth, the function that made the node in the forward: `sqrt`"""
    place: Place | None = None
    """the user's own line: of the operation, or of the forward call that made the node"""
    module: str = ""
    """name of the innermost module that was running; empty outside of any"""
    inputs: tuple[Reading, ...] = ()
    """what the operation was given"""
    saved: tuple[Reading, ...] = ()
    """of a backward birth, what the forward had kept for it"""
    is_custom: bool = False
    """whether it was born in the backward of a `torch.autograd.Function`"""
    is_benign: bool = False
    """whether infinity is what such an operation is for: a mask, an initial value"""
    is_hidden: bool = False
    """whether the value itself was masked out: the terms are finite, the gradient 0 * inf"""
    terms: tuple[str, ...] = ()
    """the loss terms concerned"""
    explanation: Explanation | None = None
    """why it happens, where the pattern is known"""

    @property
    def what(self) -> str:
        """The operation in a few words, for the sentence `born in ...`."""
        if self.phase == "given":
            return (
                f"`{self.op}` holds {self.num_bad} {'NaN' if self.kind == 'nan' else 'infinite'} of {self.size} entries"
            )
        return f"`{self.node}`" if self.node else f"`{self.op}` in the forward"
