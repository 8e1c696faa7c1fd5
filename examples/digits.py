"""A convolutional net with two losses on a shared encoder: name the digit, and redraw it. See `configs/digits.yaml`.

Run it with `safeloop train configs/digits.yaml`, or with `python -m examples.digits`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl


class DigitsNet(nn.Module):
    """Encodes 8x8 images `[N, 1, 8, 8]` into codes `[N, width]`, from which both heads work."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, width),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, 10))
        self.decoder = nn.Linear(width, 64)


class Digits(sl.Trainer):
    """Two loss terms and two metrics; the config weighs the terms."""

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Cross entropy of the labels, and mean squared error of the redrawn image."""
        images, labels = batch
        code = self.model.encoder(images)
        redrawn = self.model.decoder(code).view_as(images)
        return {
            "classify": F.cross_entropy(self.model.classifier(code), labels),
            "reconstruct": F.mse_loss(redrawn, images),
        }

    def metrics(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Per sample: whether the label is right, and the squared error of the redrawn image."""
        images, labels = batch
        code = self.model.encoder(images)
        error = (self.model.decoder(code) - images.flatten(1)).square().mean(1)
        return {"accuracy": self.model.classifier(code).argmax(1) == labels, "redraw_mse": error}


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(Digits("configs/digits.yaml").fit())
