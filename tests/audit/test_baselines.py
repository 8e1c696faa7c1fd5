"""Advantages that train their baseline through the policy's loss; and products of log-probabilities that are meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import safeloop as sl

Loss = Callable[[nn.ModuleDict, Tensor], Tensor]


def reward_of(x: Tensor, action: Tensor) -> Tensor:
    return x[:, 0] * action.float() - x[:, 1]


def categorical(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    policy = Categorical(logits=nets["policy"](x))
    action = policy.sample()
    advantage = reward_of(x, action) - nets["critic"](x).squeeze(1)
    policy_loss = -(policy.log_prob(action) * advantage).mean()
    return policy_loss + 0.5 * advantage.pow(2).mean() - 0.01 * policy.entropy().mean()


def normalised_ratio(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    policy = Independent(Normal(nets["policy"](x), 1.0), 1)
    action = policy.sample()
    old = policy.log_prob(action).detach() - 0.01
    returns, value = action.sum(1), nets["critic"](x).flatten()
    advantage = returns - value
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (policy.log_prob(action) - old).exp()
    clipped = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return F.smooth_l1_loss(value, returns) - clipped.mean()


def step_by_step(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    losses = []
    for state in x:
        policy = F.log_softmax(nets["policy"](state), dim=0)
        action = policy.exp().multinomial(1)
        following, value = nets["critic"](state + 0.1).detach(), nets["critic"](state)
        error = state[0] * action + 0.9 * following - value
        losses.append(-policy.gather(0, action) * error + error.square())
    return torch.cat(losses).mean()


def summed_over_an_episode(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    scores: Any = 0.0
    length = torch.zeros(len(x))
    for _ in range(3):
        policy = Categorical(logits=nets["policy"](x))
        action = policy.sample()
        scores, length = scores + policy.log_prob(action), length + action
    value = nets["critic"](x).squeeze(-1)
    return ((length - value) * scores).mean() + F.mse_loss(value, length)


def of_two_parts(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    hidden = nets["policy"](x)
    which, how = Categorical(logits=hidden[:, :2]), Normal(hidden[:, 2], 1.0)
    first, second = which.sample(), how.sample()
    advantage = reward_of(x, first) + second - nets["critic"](x).flatten()
    score = which.log_prob(first) + how.log_prob(second)
    return -(score * advantage / 10).sum() + advantage.square().mean()


BAD: list[Loss] = [categorical, normalised_ratio, step_by_step, summed_over_an_episode, of_two_parts]


def detached(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    policy = Categorical(logits=nets["policy"](x))
    action = policy.sample()
    advantage = reward_of(x, action) - nets["critic"](x).squeeze(1)
    return -(policy.log_prob(action) * advantage.detach()).mean() + advantage.pow(2).mean()


def soft_actor(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    policy = Normal(nets["policy"](x), 1.0)
    action = policy.rsample()
    score = policy.log_prob(action).sum(1)
    alpha, q = nets["gate"](x[:1]).exp().squeeze(), nets["critic"](x + action.mean()).squeeze(1)
    return (alpha * score - q).mean() - (alpha * (score + 2.0).detach()).mean() + (q - x[:, 0]).square().mean()


def expected_over_actions(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    scores, q = nets["policy"](x).log_softmax(1), nets["critic"](x)
    return (scores.exp() * (0.1 * scores - q)).sum(1).mean() + (q - x[:, :1]).square().mean()


def abstaining(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    score = Normal(nets["policy"](x), 1.0).log_prob(x[:, :3]).sum(1)
    gate = nets["gate"](x).sigmoid().squeeze(1)
    return -(score * (1 - gate) + score * (torch.ones_like(gate) - gate)).mean() + gate.mean()


def mixture(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    weights = nets["gate"](x).sigmoid().squeeze(1)
    one, other = (Normal(nets[name](x).mean(1), 1.0).log_prob(x[:, 0]) for name in ("policy", "critic"))
    return -(weights * one + (1 - weights) * other).mean()


def importance_weighted(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    q = Normal(nets["policy"](x), 1.0)
    z = q.rsample()
    log_w = Normal(nets["critic"](x), 1.0).log_prob(z).sum(1) - q.log_prob(z).sum(1)
    return -(log_w.softmax(0) * log_w).sum()


def focal(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    losses = F.cross_entropy(nets["policy"](x), x.argmax(1).clamp(max=2), reduction="none")
    return ((1 - (-losses).exp()) * losses).mean() + nets["critic"](x).square().mean()


def learned_variance(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    mean, variance = nets["policy"](x), nets["critic"](x).exp()
    return (variance.log() + (x[:, :3] - mean).square() / variance).mean()


def sampled_mask(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    keep = Bernoulli(logits=nets["policy"](x))
    drawn = keep.sample()
    error = (x[:, :3] * drawn - nets["critic"](x)).square().mean(1)
    return (keep.log_prob(drawn).sum(1) * (error.detach() - error.mean().detach())).mean() + error.mean()


def reward_inside_the_score(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    policy = Categorical(logits=nets["policy"](x))
    action = policy.sample()
    value = nets["critic"](x).squeeze(1)
    soft = policy.log_prob(action) + nets["gate"](x).squeeze(1)
    return (soft * (reward_of(x, action) - value)).mean() + (value - x[:, 0]).square().mean()


def summed_and_detached(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    policy = Categorical(logits=nets["policy"](x))
    scores = sum(policy.log_prob(policy.sample()) for _ in range(3))
    value = nets["critic"](x).squeeze(1)
    return -(scores * (x[:, 0] - value.detach())).mean() + F.mse_loss(value, x[:, 0])


GOOD: list[Loss] = [
    reward_inside_the_score,
    summed_and_detached,
    detached,
    soft_actor,
    expected_over_actions,
    abstaining,
    mixture,
    importance_weighted,
    focal,
    learned_variance,
    sampled_mask,
]


def make() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"policy": nn.Linear(4, 3), "critic": nn.Linear(4, 1), "gate": nn.Linear(4, 1)})


def _faults(watched: Any, loss_of: Loss) -> list[Any]:
    nets = make()
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.01)
    with watched(nets, optimizer) as audit:
        for _ in range(5):
            loss = loss_of(nets, torch.randn(8, 4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL462"]


@pytest.mark.parametrize("loss_of", BAD)
def test_a_policy_loss_that_trains_the_critic_is_named(watched: Any, loss_of: Loss) -> None:
    (fault,) = _faults(watched, loss_of)[:1]
    assert fault.names == ("critic.weight", "critic.bias")
    assert fault.where.count(f"in {loss_of.__name__}") == 2


@pytest.mark.parametrize("loss_of", GOOD)
def test_log_probabilities_with_other_factors_are_not(watched: Any, loss_of: Loss) -> None:
    assert _faults(watched, loss_of) == []


def test_a_critic_with_a_pass_of_its_own_forgets_what_the_policy_left(watched: Any) -> None:
    nets = make()
    actor, critic = (torch.optim.SGD(nets[name].parameters(), lr=0.01) for name in ("policy", "critic"))
    with watched(nets, {"actor": actor, "critic": critic}) as audit:
        for _ in range(5):
            x = torch.randn(8, 4)
            policy = Categorical(logits=nets["policy"](x))
            action = policy.sample()
            advantage = reward_of(x, action) - nets["critic"](x).squeeze(1)
            actor.zero_grad()
            (-(policy.log_prob(action) * advantage).mean()).backward(retain_graph=True)
            actor.step()
            critic.zero_grad()
            advantage.pow(2).mean().backward()
            critic.step()
            audit.step()
    assert "SL462" not in [fault.code for fault in audit.faults]


@pytest.mark.parametrize("are_separate", [False, True])
def test_terms_of_a_trainer_are_looked_at_together_unless_each_is_confined(are_separate: bool) -> None:
    class Run(sl.Trainer):
        def losses(self, x: Tensor) -> dict[str, Tensor]:
            policy = Categorical(logits=self.model["policy"](x))
            action = policy.sample()
            advantage = reward_of(x, action) - self.model["critic"](x).squeeze(1)
            return {"actor": -(policy.log_prob(action) * advantage).mean(), "critic": advantage.pow(2).mean()}

    nets = make()
    del nets["gate"]
    sgd = {"type": "SGD", "lr": 0.1}
    options: dict[str, Any] = {}
    if are_separate:
        options = {
            "simultaneous": True,
            "losses": {"actor": {"trains": ["policy.*"]}, "critic": {"trains": ["critic.*"]}},
        }
    trainer = Run(model=nets, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}, **options)
    trainer.fit()
    assert [fault.code for fault in trainer.faults] == ([] if are_separate else ["SL462"])
