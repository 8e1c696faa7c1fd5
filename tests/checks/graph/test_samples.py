"""Samples of normal distributions through which no gradient goes: those that are a bug, and those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

import safeloop as sl

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def faults_of(loss: Callable[[nn.ModuleDict], Any]) -> list[tuple[str, tuple[str, ...]]]:
    torch.manual_seed(0)
    nets = nn.ModuleDict({"mean": nn.Linear(4, 2), "decoder": nn.Linear(2, 4), "critic": nn.Linear(6, 1)})
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.01)
    accept = {"SL502": ["*"]}  # not every net is used in every loss
    with sl.audit(model=nets, optimizers=optimizer, on_fault="collect", accept=accept) as audit:
        for _ in range(8):
            optimizer.zero_grad()
            terms = loss(nets)
            for term in terms if isinstance(terms, tuple) else (terms,):
                term.backward()
            optimizer.step()
            audit.step()
    return [(fault.code, fault.names) for fault in audit.faults]


def of_a_distribution(mean: Tensor) -> Tensor:
    return Normal(mean, torch.ones_like(mean)).sample()


def of_independent_ones(mean: Tensor) -> Tensor:
    return Independent(Normal(mean, 1.0), 1).sample()


def of_torch(mean: Tensor) -> Tensor:
    return torch.normal(mean, torch.ones_like(mean))


@pytest.mark.parametrize("draw", [of_a_distribution, of_independent_ones, of_torch])
def test_a_latent_that_only_the_kl_term_trains_is_told(draw: Callable[[Tensor], Tensor]) -> None:
    def elbo(nets: nn.ModuleDict) -> Tensor:
        mean = nets["mean"](X)
        kl = kl_divergence(Normal(mean, 1.0), Normal(0.0, 1.0)).mean()
        return F.mse_loss(nets["decoder"](draw(mean)), X) + kl

    assert faults_of(elbo) == [("SL317", ("mean.weight", "mean.bias"))]


def reparameterised(nets: nn.ModuleDict) -> Tensor:
    mean = nets["mean"](X)
    latent = Normal(mean, 1.0).rsample() + torch.randn_like(mean)
    return F.mse_loss(nets["decoder"](latent), X) + mean.square().mean()


def policy_gradient(nets: nn.ModuleDict) -> Tensor:
    policy = Normal(nets["mean"](X), 1.0)
    action = policy.sample()
    value = nets["critic"](torch.cat([X, action], 1))
    actor = -(policy.log_prob(action).sum(1) * value.detach().squeeze(1)).mean()
    return actor + value.square().mean() - 0.01 * policy.entropy().mean()


def log_probability_by_hand(nets: nn.ModuleDict) -> Tensor:
    mean = nets["mean"](X)
    action = torch.normal(mean.detach(), 1.0)
    again = Normal(mean, 1.0).sample()
    score = -0.5 * ((action - mean) ** 2 + (again - mean) ** 2).sum(1)
    return -(score * nets["critic"](torch.cat([X, again], 1)).squeeze(1)).mean()


def imagined_states_of_a_learned_model(nets: nn.ModuleDict) -> Tensor:
    following = Normal(nets["mean"](X), 1.0)
    likelihood = -following.log_prob(X[:, :2]).mean()
    return likelihood + nets["critic"](torch.cat([X, following.sample()], 1)).square().mean()


def noise_on_actions_of_another_loss(nets: nn.ModuleDict) -> tuple[Tensor, Tensor]:
    action = nets["mean"](X)
    noisy = torch.normal(action.detach(), 0.1)
    critic = nets["critic"](torch.cat([X, noisy], 1)).square().mean()
    return critic, -nets["critic"](torch.cat([X, action], 1)).mean()


def noise_without_detach(nets: nn.ModuleDict) -> tuple[Tensor, Tensor]:
    noisy = torch.normal(nets["mean"](X), 0.1)
    critic = nets["critic"](torch.cat([X, noisy], 1)).square().mean()
    return critic, -nets["critic"](torch.cat([X, nets["mean"](X)], 1)).mean()


@pytest.mark.parametrize(
    "loss",
    [
        reparameterised,
        policy_gradient,
        log_probability_by_hand,
        imagined_states_of_a_learned_model,
        noise_on_actions_of_another_loss,
        noise_without_detach,
    ],
)
def test_a_sample_that_is_scored_or_of_another_loss_is_well(loss: Callable[[nn.ModuleDict], Any]) -> None:
    assert faults_of(loss) == []
