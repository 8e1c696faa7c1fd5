"""What the gradients of each parameter were over the steps that were looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from safeloop.autograd.sites import Site


@dataclass(slots=True)
class Cause:
    """Why a parameter has no gradient, or only zeros."""

    text: str
    """`cut by detach()`, `never used`, ..."""
    site: Site | None = None
    module: str = ""
    kind: str = "cut"
    """`cut`: its value reaches a loss without a gradient path; `escape`: it leaves torch or is dropped; `unused`;
    `zero`: an operation lets nothing through; `empty`: it was run on batches of no sample; `dropped`: a custom function
    returns None; `hooked`: a hook returns zeros; `cancelled`: its uses cancel; `attention`: it chooses among one key
    only; `derivative`: only a derivative without it reaches a loss"""
    others: tuple[Site, ...] = ()
    """other lines where their value was cut off, which may be the guilty ones"""
    cut: str = ""
    """the function that was called where the path ends"""
    callers: tuple[Site, ...] = ()
    """the user's lines that had called `site`, where grad mode was off"""


@dataclass(slots=True)
class Trace:
    """One parameter over the steps that were looked at."""

    steps: int = 0
    absent: int = 0
    """steps without a gradient"""
    dropped: int = 0
    """steps without a gradient although the graph of a loss leads to it"""
    zero: int = 0
    """steps with a gradient of zeros"""
    still: int = 0
    """steps with a gradient of zeros since the last one that was not"""
    unused: int = 0
    """steps on which no torch function was called with it, of those that a tape has seen"""
    tiny: int = 0
    """steps on which its norm was below 1e-12 of the largest one"""
    faint: int = 0
    """steps on which it was below 1e-9 of the largest one, and below 1e-8"""
    largest: float = 0.0
    smallest: float = float("inf")
    cause: Cause | None = None


SAMPLED, SCORED = "sampled", "scored"
"""Marks on a tape: drawn from a distribution without a gradient; compared with its mean, as by a log-probability."""


@dataclass(slots=True)
class Sampled:
    """A line that draws samples which go into losses."""

    names: tuple[str, ...]
    """the parameters that its distribution depends on, and that the losses reach in another way"""
    steps: int = 0
    is_scored: bool = False


@dataclass(slots=True)
class History:
    """Everything that the gradient checks look at: data, filled by the audit."""

    traces: dict[str, Trace] = field(default_factory=dict)
    dimensions: Mapping[str, int] = field(default_factory=dict)
    """parameter -> how many dimensions it has"""
    weight_of: Mapping[str, str] = field(default_factory=dict)
    """bias of one of torch's own layers -> the weight that it is added to the product of"""
    steps: int = 0
    where: str = ""
    terms_zero: dict[str, int] = field(default_factory=dict)
    """loss term -> steps on which it was exactly 0 although it has a graph; removed once it was not"""
    term_sites: dict[str, str] = field(default_factory=dict)
    samples: dict[Site | None, Sampled] = field(default_factory=dict)
    total: float = 0.0
    """the largest norm of all gradients together"""
    routed: frozenset[str] = frozenset()
    """parameters of modules that share a container with others that are used on some steps only"""
    moved: set[str] = field(default_factory=set)
    """parameters that had no gradient, or zeros, and have moved since"""
    is_late: bool = True
    """whether what may come later, such as a part that thaws, has had its time"""
    windows: int = 0
    """how often the history was looked at"""
    optional: frozenset[str] = frozenset()
    """parameters of modules that are never used, while others of the same container are: they may come later"""

    def is_mere_shift(self, name: str) -> bool:
        """Whether a bias is alone without a gradient, since a shift changes no difference: what it adds cancels."""
        weight = self.traces.get(self.weight_of.get(name, ""))
        return weight is not None and weight.largest > 0

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Names of parameters, in the model's order."""
        places = {name: place for place, name in enumerate(self.dimensions)}
        return sorted(names, key=lambda name: places.get(name, len(places)))
