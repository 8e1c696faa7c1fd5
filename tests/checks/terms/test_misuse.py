"""Losses that broadcast, and losses that are given probabilities for logits, in the ways in which people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, 0] - X[:, 1]
CLASSES = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
BINARY = (X[:, 0] > 0).float()


def program(outputs: int, loss: Callable[[Tensor], Any], last: nn.Module | None = None) -> Callable[[], Any]:
    def make() -> Any:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs), last or nn.Identity())
        return model, lambda i: loss(model(X))

    return make


LOSSES = {
    "mse_loss": lambda z: F.mse_loss(z, Y),
    "nn.MSELoss": lambda z: nn.MSELoss()(z, Y),
    "nn.L1Loss": lambda z: nn.L1Loss()(z, Y),
    "nn.HuberLoss": lambda z: nn.HuberLoss()(z, Y),
    "smooth_l1_loss": lambda z: F.smooth_l1_loss(input=z, target=Y),
    "target first": lambda z: F.mse_loss(Y, z),
    "target by view(-1)": lambda z: F.mse_loss(z, Y[:, None].view(-1)),
    "prediction squeezed, target not": lambda z: F.mse_loss(z.squeeze(), Y[:, None]),
    "huber": lambda z: F.huber_loss(z.flatten(), Y.unsqueeze(1)),
}
RESIDUALS = {
    "difference": lambda z: (z - Y).square().mean(),
    "target first": lambda z: (Y - z).pow(2).mean(),
    "in-place free": lambda z: torch.sub(z, Y).abs().sum() / 256,
    "absolute": lambda z: torch.mean(torch.abs(z - Y)),
    "weighted": lambda z: 0.5 * ((z - Y) ** 2).mean(),
    "root": lambda z: (z - Y).square().mean().sqrt(),
    "asymmetric": lambda z: torch.where(z - Y > 0, z - Y, 2 * (Y - z)).mean(),
    "log-cosh": lambda z: torch.log(torch.cosh(z - Y)).mean(),
    "gaussian by hand": lambda z: 0.5 * ((Y - z) / 2.0).square().mean(),
    "not reduced at once": lambda z: F.mse_loss(z, Y, reduction="none").mean(),
    "policy gradient": lambda z: -(F.logsigmoid(z) * Y).mean(),
    "policy gradient, advantage a column": lambda z: -(Y[:, None].tanh() * F.logsigmoid(z).squeeze(1)).sum(),
    "cross entropy by hand": lambda z: -(BINARY * F.logsigmoid(z) + (1 - BINARY) * F.logsigmoid(-z)).mean(),
    "weighted errors": lambda z: torch.mul(Y.abs(), (z - Y[:, None]).square()).mean(),
    "squeezed prediction": lambda z: (z.squeeze(1) - Y.view(-1, 1)).square().mean(),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_broadcasts_is_an_error(name: str, audited: Any, trained: Any) -> None:
    for run in (audited, trained):
        faults = run(program(1, LOSSES[name]), steps=2)
        assert [(fault.code, fault.severity) for fault in faults] == [("SL420", "error")]
        assert "[16, 16]" in faults[0].what


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", RESIDUALS)
def test_a_residual_that_broadcasts_is_a_warning(name: str, audited: Any) -> None:
    faults = audited(program(1, RESIDUALS[name]), steps=2)
    assert {(fault.code, fault.severity) for fault in faults} == {("SL420", "warning")}


PAIRS = {
    "indexed with None": lambda z: (z.squeeze(1)[:, None] - Y[None]).square().mean(),
    "indexed with None once": lambda z: (z.squeeze(1)[:, None] - Y).abs().mean(),
    "unsqueezed": lambda z: (z.squeeze(1).unsqueeze(1) - Y).abs().mean(),
    "reduced along one dimension": lambda z: (z - Y).square().min(1).values.mean(),
    "logsumexp over anchors": lambda z: (-(z - Y).square()).logsumexp(1).mean(),
    "a loss for each pair": lambda z: F.mse_loss(z, Y, reduction="none").amin(1).mean(),
    "bins": lambda z: (z - torch.linspace(-1, 1, 5)).square().mean(),
    "same shape": lambda z: (z - Y[:, None]).square().mean(),
    "a number": lambda z: (z - Y.mean()).square().mean(),
    "one row": lambda z: (z - Y[:1]).square().mean(),
    "both depend on the model": lambda z: (z - z.squeeze(1)).square().mean() + z.square().mean(),
    "products of pairs": lambda z: (z.squeeze(1)[:, None] * Y).tanh().mean(),
    "products with an indexed column": lambda z: (z.squeeze(1) * Y[:, None]).tanh().mean(),
    "a weight for each": lambda z: (z * Y[:, None]).mean() + (z.squeeze(1) * Y).mean(),
    "attention mask": lambda z: (torch.softmax(z @ z.t() + (Y > 0).float().log1p()[None], 1) @ z).square().mean(),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_are_meant_are_not_told(name: str, audited: Any) -> None:
    assert audited(program(1, PAIRS[name]), steps=2) == []


def test_a_layer_that_is_written_by_hand_is_not_told(audited: Any) -> None:
    class Features(nn.Module):
        """As many features as samples, of one number each."""

        def __init__(self) -> None:
            super().__init__()
            self.frequencies = nn.Parameter(torch.linspace(1, 2, 16))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.frequencies).sin()

    def make() -> Any:
        model = Features()
        return model, lambda i: model(X[:, :1].tanh()).square().mean()

    assert audited(make, steps=2) == []


class Softmax(nn.Module):
    """by hand"""

    def forward(self, x: Tensor) -> Tensor:
        e = (x - x.amax(1, keepdim=True)).exp()
        return e / e.sum(1, keepdim=True)


def one_hot() -> Tensor:
    return F.one_hot(CLASSES, 3).float()


PROBABILITIES: dict[str, Any] = {
    "nn.Softmax in the model": (3, lambda z: nn.CrossEntropyLoss()(z, CLASSES), nn.Softmax(1)),
    "softmax by hand": (3, lambda z: F.cross_entropy(z, CLASSES), Softmax()),
    "softmax of a sequence": (3, lambda z: F.cross_entropy(z.view(4, 4, 3).softmax(-1).flatten(0, 1), CLASSES), None),
    "soft targets": (3, lambda z: F.cross_entropy(z.softmax(1), one_hot()), None),
    "transposed": (3, lambda z: F.cross_entropy(z.view(4, 4, 3).softmax(2).transpose(1, 2), CLASSES.view(4, 4)), None),
    "nll_loss of a softmax": (3, lambda z: F.nll_loss(z.softmax(1), CLASSES), None),
    "nn.NLLLoss of a softmax": (3, lambda z: nn.NLLLoss()(z, CLASSES), nn.Softmax(dim=-1)),
    "nll_loss of scores": (3, lambda z: F.nll_loss(z, CLASSES), None),
    "nn.BCEWithLogitsLoss": (1, lambda z: nn.BCEWithLogitsLoss()(z.squeeze(1), BINARY), nn.Sigmoid()),
    "sigmoid and view": (1, lambda z: F.binary_cross_entropy_with_logits(torch.sigmoid(z).view(-1), BINARY), None),
    "logits of a softmax": (3, lambda z: F.binary_cross_entropy_with_logits(z.softmax(1), one_hot()), None),
    "kl_div of a softmax": (3, lambda z: F.kl_div(z.softmax(1), X[:, :3].softmax(1), reduction="batchmean"), None),
    "flattened": (1, lambda z: F.binary_cross_entropy_with_logits(z.sigmoid().flatten(), BINARY), None),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_for_logits_are_told(name: str, audited: Any) -> None:
    outputs, loss, last = PROBABILITIES[name]
    faults = audited(program(outputs, loss, last), steps=2)
    assert [(fault.code, fault.severity) for fault in faults] == [("SL421", "warning")]
    assert __file__.rpartition("/")[2] in faults[0].where or "the loss" not in faults[0].where
