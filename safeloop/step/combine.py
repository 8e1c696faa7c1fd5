"""The combined backward: the gradients of a phase's loss terms become one by a rule that knows of conflicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safeloop.autograd.conflict import (
    HiddenFeatures,
    HiddenPath,
    NoSharedCut,
    Products,
    backward_at_cut,
    backward_at_parameters,
)
from safeloop.checks.update.combine import CombinationFailed, TermsShareNoFeatures
from safeloop.optim.combining import CombineSpec
from safeloop.plan.combine import CombinedBackward
from safeloop.seeds import derive, isolated_rng
from safeloop.step.exact import exact_norms, refuse_inseparable
from safeloop.step.report import Frame, TermGeometry

if TYPE_CHECKING:
    from safeloop.step.bind import Parts


def bind_combined(
    node: CombinedBackward, parts: Parts, explain: Callable[[RuntimeError, str], None]
) -> Callable[[Frame], None]:
    """The operation of a combined backward. A single term is differentiated as it always is.

    The factors of the terms are computed on the CPU from their scalar products: one sync. What the rule draws at
    random is a function of the run's seed, the phase and the step; the global random state stays as it is.
    """
    spec, source = parts.combine, parts.readers[node.phase].rules.source
    assert spec is not None, "a combined backward without a rule"
    tensors = [tensor for name in node.owners for tensor in parts.owners[name].tensors]
    measure = None if parts.exact_every is None else exact_norms(lambda _: tensors, parts.exact_every, None)

    def backward(frame: Frame) -> None:
        if not frame.roots:
            return
        seed = derive(parts.seed, "combine", node.phase, frame.report.step)
        try:
            if measure is not None and (spec.at == "cut" or len(frame.roots) == 1):
                measure(frame, frame.seeds)
            if len(frame.roots) == 1:
                torch.autograd.backward(frame.roots, frame.seeds)
            elif spec.at == "parameters":
                refuse_inseparable(frame)
                found = backward_at_parameters(frame.roots, frame.seeds, tensors, lambda g: _factors(spec, g, seed))
                frame.report.exact_norms.update(zip(frame.root_names, found.gram.diagonal().sqrt(), strict=True))
            else:
                found = _at_cut(frame, spec, seed)
                if parts.measures_cut and frame.wants_modules:
                    _keep_geometry(frame, found)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                refuse_inseparable(frame)
            explain(error, source)
            raise
        frame.roots, frame.seeds, frame.root_names = [], [], []

    return backward


def _factors(spec: CombineSpec, gram: Tensor, seed: int) -> list[float]:
    """One factor for each term; all 1 where a gradient is not finite, which the finite check then refuses."""
    host = gram.cpu()
    if not bool(host.isfinite().all()):
        return [1.0] * len(host)
    try:
        with isolated_rng(seed):
            factors: list[float] = spec.factors(host).tolist()
    except (ValueError, ArithmeticError) as error:
        raise _failed(spec, host, str(error)) from error
    if not all(map(math.isfinite, factors)):
        raise _failed(spec, host, f"its factors are {factors}")
    return factors


def _failed(spec: CombineSpec, gram: Tensor, reason: str) -> Exception:
    norms = ", ".join(f"{norm:.3g}" for norm in gram.diagonal().sqrt().tolist())
    return CombinationFailed.error(
        f"`{spec.type}` found no combination of gradients with the norms {norms}: {reason}",
        where="combine",
        fix="bring the terms closer with `losses.<name>.weight`, or choose another `combine.type`",
    )


def _at_cut(frame: Frame, spec: CombineSpec, seed: int) -> Products:
    try:
        return backward_at_cut(frame.roots, frame.seeds, lambda gram: _factors(spec, gram, seed))
    except NoSharedCut as found:
        is_hidden = isinstance(found, HiddenFeatures)
        names = ", ".join(f"`{name}`" for name in frame.root_names)
        raise TermsShareNoFeatures.error(
            f"the terms {names} share no features"
            + " outside the compiled model" * is_hidden
            + ", so that there is no cut at which to combine their gradients",
            where=frame.source,
            why="a compiled model is one node, which shows its outputs only, and each of these serves one term alone"
            if is_hidden
            else "their graphs meet in parameters only, or not at all",
            fix="set `combine.at: parameters`"
            + ", or `run.compile: false`, or return the shared features from the model" * is_hidden,
        ) from None
    except HiddenPath:
        raise CombinationFailed.error(
            "the terms' gradients at the cut were not complete when the cut was reached",
            where=frame.source,
            why="a tensor below the cut was written in place after a view of it had been read",
            fix="set `combine.at: parameters`, or clone the tensor before the write",
        ) from None


def _keep_geometry(frame: Frame, products: Products) -> None:
    geometry, names = products.geometry(len(frame.roots)), tuple(frame.root_names)
    others = [known for known in frame.report.geometry if known.names != names]
    frame.report.geometry = [*others, TermGeometry(names, geometry.norms, geometry.cosines, geometry.pairs)]
