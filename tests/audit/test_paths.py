"""`explain_path` names the line that cuts a parameter off from a loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from safeloop.audit import explain_path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(3, 1)
        self.drop = nn.Dropout(0.5)


def cut_by_detach(net: Net, x: Tensor) -> Tensor:
    return net.second(net.drop(net.first(x)).detach()).sum()  # guilty


def cut_by_no_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = net.first(x)  # guilty
    return net.second(hidden).sum()


def cut_by_a_number(net: Net, x: Tensor) -> Tensor:
    scale = net.first(x).mean().item()  # guilty
    return net.second(torch.ones(2, 4)).sum() * scale


@pytest.mark.parametrize("compute", [cut_by_detach, cut_by_no_grad, cut_by_a_number])
def test_the_guilty_line_is_named(compute: Callable[[Net, Tensor], Tensor]) -> None:
    net, x = Net(), torch.randn(2, 3)
    before = torch.get_rng_state()
    cause = explain_path(lambda: compute(net, x), net, "first.weight")
    assert cause is not None
    assert cause.site is not None
    assert "# guilty" in Path(cause.site.path).read_text(encoding="utf-8").splitlines()[cause.site.line - 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert explain_path(lambda: compute(net, x), net, "second.weight") is None


def test_a_parameter_that_is_never_used_is_told_apart() -> None:
    net, x = Net(), torch.randn(2, 3)
    cause = explain_path(lambda: cut_by_detach(net, x), net, "idle.weight")
    assert cause is not None
    assert cause.kind == "unused"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError):
        explain_path(lambda: torch.zeros(()), Net(), "nothing")
