"""A GAN on the digits: two phases, two optimizers, and no gradient where it does not belong. See `configs/gan.yaml`.

Run it with `safeloop train configs/gan.yaml`; `safeloop plan configs/gan.yaml --why` shows what a step does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl
from safeloop.datasets import Digits


class GanNets(nn.Module):
    """A generator of flat 8x8 images `[N, 64]` in 0..1 from noise `[N, latent]`, and a critic of them `[N, 1]`."""

    def __init__(self, latent: int = 16, width: int = 192) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(
            nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64), nn.Sigmoid()
        )
        self.critic = nn.Sequential(
            nn.Linear(64, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, 1),
        )


class Gan(sl.Trainer):
    """The non-saturating GAN of Goodfellow et al. (2014), with dropout in the critic."""

    def noise(self, real: Tensor) -> Tensor:
        """Noise for as many samples as there are real ones."""
        return torch.randn(len(real), self.model.latent, device=real.device)

    @sl.phase(trains="critic")
    def critic_phase(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Tell real from generated; the generator is frozen here, so no graph is built through it."""
        real = batch[0]
        fake = self.model.generator(self.noise(real))
        return {
            "real": F.softplus(-self.model.critic(real)).mean(),
            "fake": F.softplus(self.model.critic(fake)).mean(),
        }

    @sl.phase(trains="generator")
    def generator_phase(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Make the critic take generated digits for real; gradients pass through the frozen critic."""
        fake = self.model.generator(self.noise(batch[0]))
        return {"adversarial": F.softplus(-self.model.critic(fake)).mean()}

    def metrics(self, batch: tuple[Tensor, Tensor]) -> dict[str, object]:
        """Which digits a classifier of real ones finds among generated ones."""
        if not hasattr(self, "coverage"):
            self.coverage = Coverage()
        self.coverage.update(self.model.generator(self.noise(batch[0])))
        return {"digits": self.coverage}


class Coverage:
    """Counts generated digits by class, as a support vector classifier of real digits sees them."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        images, labels = Digits("train", flat=True).tensors
        self.classifier = SVC(gamma=0.5).fit(images.numpy(), labels.numpy())
        self.reset()

    def update(self, images: Tensor) -> None:
        """Classify generated images `[N, 64]`."""
        found = torch.as_tensor(self.classifier.predict(images.cpu().numpy()))
        self.counts += torch.bincount(found, minlength=10)

    def compute(self) -> dict[str, float]:
        """How many of the ten classes were found, and the share of the rarest."""
        return {"found": float((self.counts > 0).sum()), "rarest": float(self.counts.min() / self.counts.sum())}

    def reset(self) -> None:
        """Start counting anew."""
        self.counts = torch.zeros(10, dtype=torch.int64)
