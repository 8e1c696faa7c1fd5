"""The plan: which operations make a step, in which order, and why. Plain data, checked when it is built."""

from safeloop.plan.build import build_plan
from safeloop.plan.nodes import Backward, Clip, Finite, Forward, Node, Schedule, Term, Update, Zero
from safeloop.plan.plan import Phase, StepPlan

__all__ = [
    "Backward",
    "Clip",
    "Finite",
    "Forward",
    "Node",
    "Phase",
    "Schedule",
    "StepPlan",
    "Term",
    "Update",
    "Zero",
    "build_plan",
]
