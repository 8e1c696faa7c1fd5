"""DistributedDataParallel, in one process, waits for gradients that do not come: the auditor says whose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import safeloop as sl


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.last = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor, has_side: bool) -> Tensor:
        h = self.body(x).relu()
        return self.last(h) + (self.side(h) if has_side else 0)


def names_told(used_for: int, *, watches_wrapper: bool) -> Any:
    """The fault's names, where the side head is used for so many iterations."""
    torch.manual_seed(0)
    net = Deep()
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    audit = sl.audit(model=wrapped if watches_wrapper else net, optimizers=optimizer, on_fault="collect")
    with pytest.raises(RuntimeError, match="finished reduction"), audit:
        for step in range(10):
            optimizer.zero_grad()
            F.cross_entropy(wrapped(torch.randn(8, 4), step < used_for), torch.randint(0, 2, (8,))).backward()
            optimizer.step()
            audit.step()
    (fault,) = [fault for fault in audit.faults if fault.code == "SL502"]
    return fault.names


@pytest.mark.parametrize("used_for", [0, 4], ids=["never used", "used at first"])
@pytest.mark.parametrize(("watches_wrapper", "prefix"), [(False, ""), (True, "module.")], ids=["net", "wrapper"])
def test_whose_gradients_it_waits_for(group: None, used_for: int, watches_wrapper: bool, prefix: str) -> None:
    """The side head, by the names of what is audited."""
    told = names_told(used_for, watches_wrapper=watches_wrapper)
    assert set(told) == {f"{prefix}side.weight", f"{prefix}side.bias"}
