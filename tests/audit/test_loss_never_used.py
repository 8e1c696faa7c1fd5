"""Loss terms that are computed for nobody; and terms that are used in ways that are easily overlooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantised(nn.Module):
    """A codebook that keeps its commitment loss."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 3))
        self.commit_loss: Tensor | float = 0.0

    def forward(self, z: Tensor) -> Tensor:
        q = self.codes[torch.cdist(z, self.codes).argmin(1)]
        self.commit_loss = (
            F.mse_loss(z, q.detach())  # what the encoder is to learn
            + F.mse_loss(q, z.detach())
        )
        return z + (q - z).detach() + 0.1 * q


class Recurrent(nn.Module):
    """A net that keeps a penalty on its states."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 3, batch_first=True)
        self.drift_penalty: Any = None

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.cell(x.unsqueeze(1).expand(-1, 3, -1))
        self.drift_penalty = 0.1 * states.diff(dim=1).square().mean()
        return last[-1]


Loop = Callable[[Any, Tensor, Tensor, int, list[Any]], Tensor]


def codebook() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), Quantised(), nn.Linear(3, 3))


def forgotten(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    return F.cross_entropy(model(x), y)


def forgotten_beside_the_loss(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    scores = model(x)
    smooth_loss = scores.diff(dim=1).abs().mean()  # noqa: F841
    return F.cross_entropy(scores, y)


BAD: list[tuple[Callable[[], nn.Module], Loop, str]] = [
    (codebook, forgotten, "commit_loss"),
    (Recurrent, forgotten, "drift_penalty"),
    (lambda: nn.Linear(4, 3), forgotten_beside_the_loss, "smooth_loss"),
]


def added(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    return F.cross_entropy(model(x), y) + sum(m.commit_loss for m in model.modules() if isinstance(m, Quantised))


def added_later(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    return loss if i < 7 else loss + model[1].commit_loss


def logged(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    kept.append(model[1].commit_loss.item())
    return loss


def printed(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    kept.append(f"{model[1].commit_loss:.3f}")
    return loss


def kept_for_later(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    kept.append(model[1].commit_loss)
    return loss


def differentiated_by_itself(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(model[1].commit_loss, [model[1].codes], retain_graph=True)
    with torch.no_grad():
        model[1].codes -= 0.01 * gradient
    return F.cross_entropy(model(x), y) + 0 * loss.detach()


def of_the_second_view_only(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    first = F.cross_entropy(model(x), y)
    return first + F.cross_entropy(model(x + 0.1), y) + model[1].commit_loss


def looked_at_without_no_grad(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
    val_loss = F.cross_entropy(model(x + 1), y)  # noqa: F841
    return F.cross_entropy(model(x), y) + model[1].commit_loss


GOOD: list[Loop] = [
    added,
    added_later,
    logged,
    printed,
    kept_for_later,
    differentiated_by_itself,
    of_the_second_view_only,
    looked_at_without_no_grad,
]


def run(watched: Any, model: nn.Module, loss_of: Loop) -> list[Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kept: list[Any] = []
    with watched(model, optimizer) as audit:
        for i in range(10):
            loss = loss_of(model, torch.randn(8, 4), torch.randint(0, 3, (8,)), i, kept)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL464"]


@pytest.mark.parametrize(("build", "loss_of", "name"), BAD)
def test_a_term_that_nobody_uses_is_named(
    watched: Any, build: Callable[[], nn.Module], loss_of: Loop, name: str
) -> None:
    torch.manual_seed(0)
    (fault,) = run(watched, build(), loss_of)
    assert f"`{name}`" in fault.what


@pytest.mark.parametrize("loss_of", GOOD)
def test_a_term_that_somebody_uses_is_not(watched: Any, loss_of: Loop) -> None:
    torch.manual_seed(0)
    assert run(watched, codebook(), loss_of) == []


def test_the_loss_of_a_model_that_a_loop_replaces_by_its_own_is_not(watched: Any) -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            scores = self.inner(x)
            loss = F.cross_entropy(scores, y)
            self.loss = loss
            return {"loss": loss, "scores": scores}

    def smoothed(model: Any, x: Tensor, y: Tensor, i: int, kept: list[Any]) -> Tensor:
        return F.cross_entropy(model(x, y)["scores"], y, label_smoothing=0.1)

    torch.manual_seed(0)
    assert run(watched, Scored(), smoothed) == []
