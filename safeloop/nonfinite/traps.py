"""Known traps: which pattern a birth follows, and so why it happens and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from safeloop.nonfinite.birth import Birth, Explanation, Kind, Phase
from safeloop.nonfinite.trap_tests import any_value

_NODE = re.compile(r"Backward(Backward)?\d*$")


@dataclass(frozen=True, slots=True)
class Trap:
    """A pattern with its name. In `why` and `fix`, `{op}` is the function and `{bad}` how many entries are bad.

    `ops` are operations of the forward (`sqrt`) and roots of autograd nodes in small letters (`sqrt` for
    `SqrtBackward0`); empty for any. The first trap of the table that fits a birth explains it.
    """

    name: str
    ops: frozenset[str]
    why: str
    fix: str
    phase: Phase | None = None
    kind: Kind | None = None
    when: Callable[[Birth], bool] = any_value

    def fits(self, birth: Birth) -> bool:
        """Whether a birth follows this pattern."""
        if self.phase is not None and birth.phase != self.phase:
            return False
        if self.kind is not None and birth.kind != self.kind:
            return False
        return (not self.ops or root(birth) in self.ops) and self.when(birth)


def root(birth: Birth) -> str:
    """What a birth is looked up by: the operation of a forward, the node of a backward without its suffix."""
    return _NODE.sub("", birth.node).lower() if birth.node else birth.op


def explain(birth: Birth) -> Explanation | None:
    """What is known of a birth's pattern; None where no trap fits."""
    from safeloop.nonfinite.trap_table import TRAPS

    trap = next((trap for trap in TRAPS if trap.fits(birth)), None)
    if trap is None:
        return None
    words = {"op": birth.call or root(birth), "bad": f"{birth.num_bad} of {birth.size} entries", "dtype": birth.dtype}
    return Explanation(trap.name, trap.why.format(**words), trap.fix.format(**words))
