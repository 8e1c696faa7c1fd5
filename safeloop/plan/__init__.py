"""The plan: which operations make a step, in which order, and why. Plain data, checked when it is built."""

from safeloop.plan.build import OwnerFacts, PhaseFacts, StepFacts, build_plan
from safeloop.plan.node import Node, Term
from safeloop.plan.nodes import Adapt, Backward, Clip, Finite, Forward, Schedule, Unscale, Update, Zero
from safeloop.plan.plan import Phase, StepPlan

__all__ = [
    "Adapt",
    "Backward",
    "Clip",
    "Finite",
    "Forward",
    "Node",
    "OwnerFacts",
    "Phase",
    "PhaseFacts",
    "Schedule",
    "StepFacts",
    "StepPlan",
    "Term",
    "Unscale",
    "Update",
    "Zero",
    "build_plan",
]
