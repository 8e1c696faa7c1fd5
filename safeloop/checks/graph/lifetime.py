"""Graphs that live longer than the iteration that made them."""

from __future__ import annotations

from safeloop.checks.check import Check


class GraphReachesBack(Check):
    """A loss depends on a graph of an earlier iteration.

    ## Source
    https://github.com/Eurus-Holmes/MNMT/issues/7; https://github.com/MorvanZhou/PyTorch-Tutorial/issues/57.
    """

    code = "SL310"
    title = "graph reaches back to an earlier iteration"


class GraphsKept(Check):
    """Graphs of earlier iterations are kept alive, more with each one.

    ## Source
    https://github.com/pytorch/pytorch/issues/64586; https://github.com/horovod/horovod/pull/641.
    """

    code = "SL311"
    title = "graphs of earlier iterations kept"


class StaleCasts(Check):
    """Autocast goes on using copies of the weights from before the last update.

    ## Source
    https://github.com/X-GenGroup/Flow-Factory/pull/186; documentation of `torch.autocast`.
    """

    code = "SL648"
    title = "stale autocast copies of weights"
