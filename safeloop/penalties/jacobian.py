"""The Frobenius norm of the Jacobian, estimated by random projections."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from safeloop.component import Int
from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class Jacobian(Penalty):
    """`1/2 mean_i ||J_i||_F^2`, with `J_i` the Jacobian `[K, features]` of the K outputs of sample i, without bias.

    With `v` uniform on the unit sphere of the outputs, `K ||v^T J||^2` has the mean `||J||_F^2`; `projections` of them
    are averaged. Its relative standard deviation falls with their root: for a network of ten outputs, one projection
    and a batch of 100 give about 4 %. With one output it is exact.

    Cost: a backward pass for each projection, and about twice that when it is differentiated.

    Source: Judy Hoffman et al.: Robust Learning with Jacobian Regularization (arXiv 1908.02729, 2019), algorithm 1.
    """

    type: Literal["jacobian"] = "jacobian"
    projections: Int = Field(default=1, ge=1)
    """random directions among the outputs, drawn anew each time"""

    @property
    def formula(self) -> str:
        return f"1/2 mean |Jacobian|^2 by {self.projections} projection{'s' * (self.projections > 1)}"

    def value(self, field: gradients.Field) -> Tensor:
        num_outputs = field.values[0].numel()
        total = gradients.squares(self._projected(field))
        for _ in range(self.projections - 1):
            total = total + gradients.squares(self._projected(field))
        return total.mean() * (num_outputs / self.projections / 2)

    def _projected(self, field: gradients.Field) -> Tensor:
        drawn = torch.randn_like(gradients.widened(field.values.detach()))
        return field.pull(gradients.normalized(drawn).to(field.values.dtype))
