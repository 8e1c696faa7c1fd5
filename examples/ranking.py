"""An embedding of the digits by max-margin ranking: a digit is nearer to its like than to any other. See
`configs/ranking.yaml`.

The loss is often written as a loop of `loss += max(0, negative - positive + margin)`. That sum starts from a Python
number, `max` picks a constant on the batches where every pair is ranked well, and a constant has no gradient: on one
batch in many, training stops with an error or, with `torch.tensor(0., requires_grad=True)` as the start, trains nothing
in silence (SL402, SL404, SL301 name these). Here every triplet is one entry of one tensor, and `relu` keeps the graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl


class Embedding(nn.Sequential):
    """From flat images `[N, 64]` to unit vectors `[N, width]`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, width))

    def forward(self, images: Tensor) -> Tensor:
        """One unit vector for each image."""
        return F.normalize(super().forward(images), dim=1)


def margin_ranking(embedded: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """The mean of `relu(cos(a, n) - cos(a, p) + margin)` over all triplets of a batch that are not ranked well yet.

    a, p and n run over all rows, p another row of a's class, n of another class. 0-d, with a graph whatever the batch:
    where every triplet is ranked well, or there is none, it is 0 and its gradient is 0.
    """
    cosines = embedded @ embedded.T
    alike = labels.unsqueeze(0) == labels.unsqueeze(1)
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    is_triplet = (alike & other).unsqueeze(2) & (~alike).unsqueeze(1)
    behind = F.relu(cosines.unsqueeze(1) - cosines.unsqueeze(2) + margin) * is_triplet
    return behind.sum() / (behind.detach() > 0).sum().clamp(min=1)


class Ranking(sl.Trainer):
    """One loss term; nothing in it can lose its graph."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """How far triplets are from being ranked with the margin."""
        images, labels = batch
        return margin_ranking(self.model(images), labels)

    def metrics(self, batch: tuple[Tensor, Tensor]) -> dict[str, object]:
        """Recall among the held-out digits."""
        if not hasattr(self, "recall"):
            self.recall = RecallAtOne()
        images, labels = batch
        self.recall.update(self.model(images), labels)
        return {"recall_at_1": self.recall}


class RecallAtOne:
    """The part of all samples whose nearest other sample has their label."""

    def __init__(self) -> None:
        self.reset()

    def update(self, embedded: Tensor, labels: Tensor) -> None:
        """Add unit vectors `[N, width]` with their labels `[N]`."""
        self.embedded.append(embedded)
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """Between 0 and 1, 0-d."""
        embedded, labels = torch.cat(self.embedded), torch.cat(self.labels)
        cosines = (embedded @ embedded.T).fill_diagonal_(-2.0)
        return (labels[cosines.argmax(1)] == labels).double().mean()

    def reset(self) -> None:
        """Start anew."""
        self.embedded: list[Tensor] = []
        self.labels: list[Tensor] = []
