"""The step: a plan bound to live objects, and the function that runs it once."""

from safeloop.step.bind import Observer, Parts
from safeloop.step.finite import DeferredGate, ImmediateGate
from safeloop.step.precision import Precision
from safeloop.step.report import StepReport
from safeloop.step.run import Draw, Program, run_step
from safeloop.step.terms import TermReader, TermRules

__all__ = [
    "DeferredGate",
    "Draw",
    "ImmediateGate",
    "Observer",
    "Parts",
    "Precision",
    "Program",
    "StepReport",
    "TermReader",
    "TermRules",
    "run_step",
]
