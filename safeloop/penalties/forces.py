"""Forces that agree with energies: the gradient of what a model predicts is compared with targets."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from safeloop.penalties import gradients
from safeloop.penalties.base import AtPath, Penalty


class Forces(Penalty):
    """`mean (-dE/dx - F)^2` over all components: a model of energies is trained on forces, which stay conservative.

    `E` is one energy for each sample or molecule, or their sum, 0-d; `x` and the target forces `F` have one shape, such
    as `[N, atoms, 3]`, or `[all atoms, 3]` where molecules are laid end to end. Units are yours: forces are energy over
    length.

    Cost: with the energies at hand a backward pass, and about twice that when it is differentiated.

    Source: Stefan Chmiela et al.: Machine Learning of Accurate Energy-Conserving Molecular Force Fields (arXiv
    1611.04678, 2017); Wojciech M. Czarnecki et al.: Sobolev Training for Neural Networks (arXiv 1706.04859, 2017).
    """

    is_per_sample: ClassVar[bool] = False
    type: Literal["forces"] = "forces"
    targets: AtPath | None = None
    """config-only runs: where the forces are, a path into the batch: `batch.forces`"""

    @property
    def formula(self) -> str:
        return "mean (-grad - targets)^2"

    def value(self, field: gradients.Field) -> Tensor:
        assert field.targets is not None, "forces without targets"
        return (field.gradient() + field.targets).square().mean()
