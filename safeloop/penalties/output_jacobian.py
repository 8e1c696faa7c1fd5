"""The exact Jacobian of one output of a model."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class OutputJacobian(Penalty):
    """`1/2 mean_i ||J_i||_F^2`, exact, with `J_i` the Jacobian of one output of a model that has several.

    Cost: a backward pass for each component of the output, and about twice that when it is differentiated; `jacobian`
    estimates the same from fewer.

    Source: the contractive penalty of Salah Rifai et al.: Contractive Auto-Encoders (ICML 2011), equation 3, for any
    output; with the factor 1/2 of our other squared norms.
    """

    type: Literal["output_jacobian"] = "output_jacobian"
    output: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*$")
    """key, index or attribute of what the function returns: `logits`, `hidden.0`; null: it returns one tensor"""

    @property
    def formula(self) -> str:
        return f"1/2 mean |Jacobian{'' if self.output is None else f' of {self.output}'}|^2"

    def value(self, field: gradients.Field) -> Tensor:
        basis = torch.eye(field.values[0].numel(), dtype=field.values.dtype, device=field.values.device)
        rows = [
            gradients.squares(field.pull(axis.view(field.values[0].shape).expand_as(field.values))) for axis in basis
        ]
        return torch.stack(rows).sum(0).mean() / 2
