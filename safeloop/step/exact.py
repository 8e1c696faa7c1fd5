"""The exact norm of each loss term's gradient over all parameters that a phase trains, on the steps that want it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safeloop.autograd.norms import each_norm
from safeloop.autograd.walk import reach
from safeloop.checks.update.combine import TermsInseparable
from safeloop.seeds import isolated_rng
from safeloop.step.precision import GradientScale
from safeloop.step.report import Frame

Measure = Callable[[Frame, Sequence[Tensor]], None]


def exact_norms(trained_by: Callable[[str], Sequence[Tensor]], every: int, scale: GradientScale | None) -> Measure:
    """A function of the frame and the seeds that measures `||d(seed_k root_k) / d parameters||` for each root k.

    It works on every `every`th step, before the backward pass, and leaves each `.grad` and the random state as they
    were, bit for bit. Under accumulation the gradients of a window are summed term by term, so that the norm is that
    of the whole window. The norms go into the report without the gradient scale, 0-d, on the device: no sync.

    Cost on those steps: one backward pass for each term, and one term's gradients kept at a time; under accumulation
    all terms' gradients until the end of the window. Hooks that the user put on parameters run once more for each term.

    Args:
        trained_by: the parameters that a term, by name, trains.
        every: steps between two measurements.
        scale: what the seeds are multiplied by.
    """

    def measure(frame: Frame, seeds: Sequence[Tensor]) -> None:
        if (frame.report.step + 1) % every:
            return
        refuse_inseparable(frame)
        with isolated_rng():
            for name, root, seed in zip(frame.root_names, frame.roots, seeds, strict=True):
                trained = [tensor for tensor in trained_by(name) if tensor.requires_grad]
                gradients: Sequence[Tensor | None] = torch.autograd.grad(
                    root, trained, seed, retain_graph=True, allow_unused=True
                )
                if frame.share is not None:
                    gradients = frame.term_gradients[name] = _sum(frame.term_gradients.get(name), gradients)
                norm = total_norm(gradients, root)
                frame.report.exact_norms[name] = norm if scale is None else norm / scale.value

    return measure


def refuse_inseparable(frame: Frame) -> None:
    """See that each term can be differentiated by itself; about 2 us for each node of its graph.

    Raises:
        FaultError: SL622, a graph runs through a re-entrant checkpoint, behind which torch finds no parameters.
    """
    for name, root in zip(frame.root_names, frame.roots, strict=True):
        if not reach(root).is_complete:
            raise TermsInseparable.error(
                f"the graph of `{name}` runs through a re-entrant checkpoint: its gradient cannot be had by itself",
                where=frame.source,
                fix="use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            )


def total_norm(gradients: Sequence[Tensor | None], root: Tensor) -> Tensor:
    """The norm of all gradients as one vector, 0-d; 0 on the root's device where there are none."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return torch.zeros((), device=root.device)
    norm: Tensor = torch.linalg.vector_norm(each_norm(present))
    return norm


def _sum(known: Sequence[Tensor | None] | None, more: Sequence[Tensor | None]) -> list[Tensor | None]:
    if known is None:
        return list(more)
    return [b if a is None else a if b is None else a + b for a, b in zip(known, more, strict=True)]
