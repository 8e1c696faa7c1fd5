"""The entry of the engine that the step uses: the bits of `torch.autograd.backward`, hooks and errors included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safeloop.autograd import engine
from safeloop.autograd.engine import run_backward


def roots_of(net: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    output = net(torch.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3))
    return [output.square().mean(), output.tanh(), net[0].weight.sum()]  # type: ignore[index]


def make_net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_has_the_bits_of_torchs_own(dtype: torch.dtype) -> None:
    assert engine._is_usable(), "this version of torch has the entry"
    nets, calls = (make_net(dtype), make_net(dtype)), []
    for net, run in zip(nets, (run_backward, torch.autograd.backward), strict=True):
        net[0].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter.shape))  # type: ignore
        for _ in range(2):
            roots = roots_of(net, dtype)
            run(roots, [torch.full_like(root, 0.3) for root in roots])
    assert len(calls) == 4, "hooks run as ever"
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_graph_that_is_freed_raises_torchs_error() -> None:
    (root, *_) = roots_of(make_net(torch.float32), torch.float32)
    run_backward([root], [torch.ones(())])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        run_backward([root], [torch.ones(())])


@pytest.mark.parametrize("broken", [None, lambda *_, **__: None])
def test_where_the_entry_is_not_what_it_was_torchs_own_is_called(monkeypatch: Any, broken: Any) -> None:
    monkeypatch.setattr(engine, "_run", broken)
    engine._is_usable.cache_clear()
    net = make_net(torch.float32)
    try:
        assert not engine._is_usable()
        run_backward(roots_of(net, torch.float32)[:1], [torch.ones(())])
    finally:
        engine._is_usable.cache_clear()
    assert all(parameter.grad is not None for parameter in net.parameters())
