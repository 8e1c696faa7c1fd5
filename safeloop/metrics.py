"""Metrics as small callables that return a value per sample: their mean is exact, whatever the batches."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from safeloop.component import Component, Float, Int


class Accuracy(Component):
    """Whether the class is among the `top_k` largest logits: output [N, C, ...], labels [N, ...] -> bool [N, ...]."""

    top_k: Annotated[Int, Field(ge=1)] = Field(
        1, description="a sample counts when its class is among this many largest logits"
    )

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        """The hits, per sample.

        Raises:
            ValueError: when the labels have not the shape of the output without its dimension 1.
        """
        _same_shape(
            output[:, 0], labels, "labels", f"output of shape {tuple(output.shape)} without its class dimension 1"
        )
        if self.top_k == 1:
            return output.argmax(1) == labels
        return (output.topk(self.top_k, dim=1).indices == labels.unsqueeze(1)).any(1)


class BinaryAccuracy(Component):
    """Whether `output > threshold` agrees with the label, 0 or 1: both of one shape [N, ...] -> bool [N, ...]."""

    threshold: Float = Field(0.0, description="0 for logits, 0.5 for probabilities")

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        """The hits, per element.

        Raises:
            ValueError: when the shapes differ.
        """
        _same_shape(output, labels, "labels", "output")
        return (output > self.threshold) == labels.bool()


class MeanSquaredError(Component):
    """(output - target)^2, both of one shape [N, ...] -> [N, ...]."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The squared errors, per element.

        Raises:
            ValueError: when the shapes differ: they would broadcast to a mean over all pairs.
        """
        _same_shape(output, target, "target", "output")
        return (output - target).square()


class MeanAbsoluteError(Component):
    """|output - target|, both of one shape [N, ...] -> [N, ...]."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The absolute errors, per element.

        Raises:
            ValueError: when the shapes differ: they would broadcast to a mean over all pairs.
        """
        _same_shape(output, target, "target", "output")
        return (output - target).abs()


def _same_shape(expected: Tensor, given: Tensor, name: str, of: str) -> None:
    if expected.shape != given.shape:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, and {tuple(expected.shape)} is needed: that of the {of}"
        )
