"""The step: a plan bound to live objects, and the function that runs it once."""

from safeloop.step.finite import DeferredGate, ImmediateGate
from safeloop.step.report import StepReport
from safeloop.step.run import Observer, Parts, Program, run_step
from safeloop.step.terms import TermReader, TermRules

__all__ = [
    "DeferredGate",
    "ImmediateGate",
    "Observer",
    "Parts",
    "Program",
    "StepReport",
    "TermReader",
    "TermRules",
    "run_step",
]
