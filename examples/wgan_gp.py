"""WGAN-GP on the digits: five steps of the critic for one of the generator, a declared gradient penalty.

See `configs/wgan_gp.yaml`. Run it with `safeloop train configs/wgan_gp.yaml`, in about a minute on two cores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import safeloop as sl
from examples.gan import Coverage


class WganNets(nn.Module):
    """A generator of flat 8x8 images `[N, 64]` in 0..1 from noise `[N, latent]`, and a critic of them `[N, 1]`.

    The critic has no batch normalisation: the penalty is about each image's own gradient (SL436).
    """

    def __init__(self, latent: int = 16, width: int = 128) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(
            nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64), nn.Sigmoid()
        )
        self.critic = nn.Sequential(
            nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )


class Wgan(sl.Trainer):
    """Gulrajani et al. (2017): the critic's score differences estimate a distance while its slope is near 1."""

    def noise(self, real: Tensor) -> Tensor:
        """Noise for as many samples as there are real ones."""
        return torch.randn(len(real), self.model.latent, device=real.device)

    @sl.phase(trains="critic", repeat=5)
    def critic_phase(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Score generated images low and real ones high, with a slope near 1 between them."""
        real = batch[0]
        fake = self.model.generator(self.noise(real))  # frozen here: no graph is built
        return {
            "wasserstein": self.model.critic(fake).mean() - self.model.critic(real).mean(),
            "gp": self.penalty(self.model.critic, at=sl.interpolate(real, fake)),
        }

    @sl.phase(trains="generator")
    def generator_phase(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Make images that the critic scores high; gradients pass through the frozen critic."""
        return {"adversarial": -self.model.critic(self.model.generator(self.noise(batch[0]))).mean()}

    def metrics(self, batch: tuple[Tensor, Tensor]) -> dict[str, object]:
        """Which digits a classifier of real ones finds among generated ones."""
        if not hasattr(self, "coverage"):
            self.coverage = Coverage()
        self.coverage.update(self.model.generator(self.noise(batch[0])))
        return {"digits": self.coverage}
