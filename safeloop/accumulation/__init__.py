"""Accumulated micro-batches against one big batch."""

from safeloop.accumulation.compare import AccumulationReport, compare_accumulation

__all__ = ["AccumulationReport", "compare_accumulation"]
