"""The checks that look at each loss just before it is differentiated."""

from __future__ import annotations

from safeloop.checks.terms.baselines import PolicyTrainsBaseline
from safeloop.checks.terms.chosen import ConstantAlwaysChosen
from safeloop.checks.terms.constants import ConstantPartOfLoss
from safeloop.checks.terms.counted import PartCountedTwice
from safeloop.checks.terms.nobody import PartTrainsNobody
from safeloop.checks.terms.numbers import NumberInLoss

LossCheck = (
    ConstantPartOfLoss
    | NumberInLoss
    | PartCountedTwice
    | PolicyTrainsBaseline
    | PartTrainsNobody
    | ConstantAlwaysChosen
)


def loss_checks(*, are_joint: bool) -> tuple[LossCheck, ...]:
    """Those of a Trainer; `are_joint`: whether all terms are differentiated together."""
    joint = (PolicyTrainsBaseline(),) if are_joint else ()
    return (ConstantPartOfLoss(), NumberInLoss(), PartCountedTwice(), *joint)


def loop_loss_checks() -> tuple[LossCheck, ...]:
    """Those of a loop that is not ours, which differentiates and steps by itself."""
    return (*loss_checks(are_joint=True), PartTrainsNobody(), ConstantAlwaysChosen())
