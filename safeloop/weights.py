"""Weights of loss terms that change over a run."""

from __future__ import annotations

from pydantic import Field

from safeloop.component import Component, Float, Int


class WeightRamp(Component):
    """A weight that moves in a straight line, and stays where it arrives."""

    start: Float
    """weight until step `begin`"""
    end: Float
    """weight from step `begin + steps` on"""
    steps: Int = Field(ge=1)
    """how many steps the way takes"""
    begin: Int = Field(default=0, ge=0)
    """step at which it sets out"""

    def at(self, step: int) -> float:
        """The weight on a step, counted from 0."""
        way = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return self.start + (self.end - self.start) * way
