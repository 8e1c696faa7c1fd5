"""Gradient penalties by hand: without a graph, or through batch statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def critic(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), norm, nn.Softplus(), nn.Linear(8, 1))


def images(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.LeakyReLU(), nn.Flatten(), nn.Linear(288, 1))


def slopes(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    x = x.clone().requires_grad_()
    out = model(x)
    return torch.autograd.grad(out, x, torch.ones_like(out), **options)[0]


def wgan_gp(model: nn.Module) -> Tensor:
    penalty = ((slopes(model, X).norm(2, dim=1) - 1) ** 2).mean()
    return model(X).mean() - model(X + 1).mean() + 10 * penalty


def r1(model: nn.Module) -> Tensor:
    return F.softplus(-model(X)).mean() + 5 * slopes(model, X).pow(2).sum(1).mean()


def of_the_weights(model: nn.Module) -> Tensor:
    loss = F.mse_loss(model(X), Y)
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return loss + 0.1 * sum(g.pow(2).sum() for g in gradients)


def retain_in_place_of_create(model: nn.Module) -> Tensor:
    loss = F.mse_loss(model(X), Y)
    loss += 0.1 * (slopes(model, X, retain_graph=True).norm() - 1).abs()
    return loss


def stacked(model: nn.Module) -> Tensor:
    return torch.stack([F.mse_loss(model(X), Y), slopes(model, X).square().mean()]).sum()


@pytest.mark.parametrize("loss", [wgan_gp, r1, of_the_weights, retain_in_place_of_create, stacked])
def test_a_penalty_without_graph_is_told(loss: Callable[[nn.Module], Tensor], audited: Any, trained: Any) -> None:
    def make() -> Any:
        model = critic(nn.Identity())
        return model, lambda i: loss(model)

    for run in (audited, trained):
        faults = run(make, steps=4)
        assert [(fault.code, fault.severity) for fault in faults] == [("SL422", "error")]
        assert "slopes" in faults[0].where or "autograd.grad" in faults[0].where


def test_a_gradient_norm_that_is_detached_is_meant(audited: Any) -> None:
    def make() -> Any:
        model = critic(nn.Identity())

        def step(i: int) -> Tensor:
            return F.mse_loss(model(X), Y) + slopes(model, X).norm().detach()

        return model, step

    assert audited(make, steps=4) == []


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    slope = slopes(model, x, create_graph=True).flatten(1)
    return model(x).square().mean() + (slope.norm(dim=1) - 1).square().mean()


NORMS = {
    "BatchNorm1d": (critic, nn.BatchNorm1d(8), X),
    "without statistics": (critic, nn.BatchNorm1d(8, track_running_stats=False), X),
    "BatchNorm2d": (images, nn.BatchNorm2d(8), IMAGES),
}
OTHERS = {
    "LayerNorm": (critic, nn.LayerNorm(8), X),
    "GroupNorm": (images, nn.GroupNorm(2, 8), IMAGES),
    "InstanceNorm2d": (images, nn.InstanceNorm2d(8), IMAGES),
    "BatchNorm in eval mode": (critic, nn.BatchNorm1d(8).eval(), X),
}


@pytest.mark.parametrize("name", [*NORMS, *OTHERS])
def test_a_penalty_through_batch_statistics_is_told(name: str, audited: Any) -> None:
    build, norm, x = (NORMS | OTHERS)[name]

    def make() -> Any:
        model = build(norm)
        return model, lambda i: penalised(model, x)

    found = [(fault.code, fault.names) for fault in audited(make, steps=4)]
    assert found == ([("SL423", ("1",))] if name in NORMS else [])


def test_a_penalty_of_a_critic_without_batch_norm_on_features_that_have_it_is_meant(audited: Any) -> None:
    def make() -> Any:
        model = nn.ModuleDict(
            {"features": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), "critic": critic(nn.Tanh())}
        )

        def step(i: int) -> Tensor:
            return penalised(model["critic"], X) + model["features"](X).pow(4).mean()

        return model, step

    assert audited(make, steps=4) == []


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.BatchNorm1d(8)], ids=["LayerNorm", "BatchNorm1d"])
def test_batch_norm_in_what_made_the_inputs_is_not_penalised(norm: nn.Module, audited: Any) -> None:
    def make() -> Any:
        generator = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
        model = nn.ModuleDict({"generator": generator, "critic": critic(norm)})

        def step(i: int) -> Tensor:
            fake = model["generator"](X)
            return penalised(model["critic"], 0.5 * (X + fake).detach()) + model["critic"](fake).mean()

        return model, step

    found = [(fault.code, fault.names) for fault in audited(make, steps=4)]
    assert found == ([("SL423", ("critic.1",))] if isinstance(norm, nn.BatchNorm1d) else [])
