"""Gradient norms at tensors inside a forward: outputs of modules, and whatever the user's code names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safeloop.data.structure import tensors
from safeloop.step.precision import GradientScale
from safeloop.step.report import Frame, StepReport, Watched


class Watch:
    """Hooks on tensors, on the steps that log and on no others; they look at gradients and change none.

    A hook holds a name and the report, never a tensor: it goes with the graph. What is measured stays on the device.

    Args:
        modules: by name; the gradient at their outputs is measured.
        scale: what gradients are multiplied by; norms are without it.
    """

    def __init__(self, modules: Mapping[str, nn.Module], scale: GradientScale | None) -> None:
        self._modules = modules
        self._scale = scale
        self._open: tuple[StepReport, object] | None = None

    def during(self, forward: Callable[[Frame], None]) -> Callable[[Frame], None]:
        """A forward that is watched on the steps that log."""

        def watched(frame: Frame) -> None:
            if frame.wants_modules:
                with self.on(frame.report, frame.turn_key):
                    forward(frame)
            else:
                forward(frame)

        return watched

    @contextmanager
    def on(self, report: StepReport, turn: object) -> Iterator[None]:
        """A region in which tensors are watched; gradients of one turn are added up, a later turn replaces them."""
        handles = [module.register_forward_hook(partial(self._output, name)) for name, module in self._modules.items()]
        self._open = report, turn
        try:
            yield
        finally:
            self._open = None
            for handle in handles:
                handle.remove()

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Watch one tensor of the present forward; outside of a watched one, or without a graph, nothing happens."""
        if self._open is None or not tensor.requires_grad:
            return
        report, turn = self._open
        scale = self._scale

        def hook(gradient: Tensor) -> None:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=dtype)
            square = (norm if scale is None else norm / scale.value).square()
            known = report.watched.get(name)
            report.watched[name] = Watched(turn, square + known.square if known and known.turn is turn else square)

        tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for _, tensor in tensors(output):
            self.tensor(name, tensor)
