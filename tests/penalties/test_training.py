"""Penalties in a run: the bits of the careful hand-written loop, when they are due, and what they leave behind."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safeloop as sl
from safeloop.penalties.r1 import R1

OFF: dict[str, Any] = {"sinks": []}
ADAM = {"type": "Adam", "lr": 1e-2, "betas": [0.0, 0.9]}
WGAN_GP = {"type": "gradient", "target": 1.0, "weight": 10.0}


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(8, 1))


def nets() -> Nets:
    torch.manual_seed(0)
    return Nets()


def real_batches(n: int = 12) -> list[Tensor]:
    return list(torch.randn(n, 16, 2, generator=torch.Generator().manual_seed(1)))


class Wgan(sl.Trainer):
    @sl.phase(trains="critic", repeat=3)
    def critic_phase(self, real: Tensor) -> dict[str, Any]:
        fake = self.model.generator(torch.randn(len(real), 3))
        return {
            "wasserstein": self.model.critic(fake).mean() - self.model.critic(real).mean(),
            "gp": self.penalty(self.model.critic, at=sl.interpolate(real, fake)),
        }

    @sl.phase(trains="generator")
    def generator_phase(self, real: Tensor) -> dict[str, Tensor]:
        return {"adversarial": -self.model.critic(self.model.generator(torch.randn(len(real), 3))).mean()}


OWNERS = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": "rest"}}


def wgan(
    model: nn.Module, gp: dict[str, Any] = WGAN_GP, steps: int = 4, cls: Any = Wgan, **sections: Any
) -> sl.Trainer:
    sections = {"run": {"max_steps": steps, "seed": 5}, "log": OFF, **sections}
    return cls(model=model, data=real_batches(), optimizers=OWNERS, penalties={"gp": gp}, **sections)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_wgan_gp_has_the_bits_of_the_careful_hand_written_loop() -> None:
    model = nets()
    plain = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.0, 0.9), "fused": True}
    critic, generator = (torch.optim.Adam(net.parameters(), **options) for net in (plain.critic, plain.generator))
    torch.manual_seed(5)
    batches = iter(real_batches() * 9)
    for _ in range(4):
        for _ in range(3):
            real = next(batches)
            critic.zero_grad()
            fake = plain.generator(torch.randn(16, 3)).detach()
            loss = plain.critic(fake).mean() - plain.critic(real).mean()
            between = torch.lerp(fake, real, torch.rand(16, 1)).requires_grad_()
            (slope,) = torch.autograd.grad(plain.critic(between).sum(), between, create_graph=True)
            gp = (slope.norm(dim=1) - 1).square().mean()
            torch.autograd.backward([loss, gp], [torch.tensor(1.0), torch.tensor(10.0)])
            critic.step()
        next(batches)
        generator.zero_grad()
        (-plain.critic(plain.generator(torch.randn(16, 3))).mean()).backward()
        generator.step()
    result = wgan(model).fit()
    assert same(model, plain)
    assert result.faults == ()


class Scored(sl.Trainer):
    """A discriminator with R1 on the forward that its loss needs anyway."""

    def losses(self, batch: Tensor) -> dict[str, Any]:
        x = self.leaf(batch)
        score = self.model(x)
        return {"real": F.softplus(-score).mean(), "r1": self.penalty(of=score, at=x)}


def scored(model: nn.Module, r1: dict[str, Any], steps: int = 6, cls: Any = Scored, **sections: Any) -> sl.Trainer:
    sections = {
        "run": {"max_steps": steps, "seed": 5},
        "log": OFF,
        "optimizers": {"type": "SGD", "lr": 0.1},
        **sections,
    }
    sections = {"data": real_batches(), **sections}
    return cls(model=model, penalties={"r1": {"type": "r1", **r1}}, **sections)


def discriminator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))


def test_a_shared_forward_gives_what_a_forward_of_its_own_gives() -> None:
    class Apart(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            return {"real": F.softplus(-self.model(batch)).mean(), "r1": self.penalty(self.model, at=batch)}

    shared, apart = discriminator().double(), discriminator().double()
    data = [batch.double() for batch in real_batches()]
    scored(shared, {"weight": 3.0}, data=data).fit()
    scored(apart, {"weight": 3.0}, cls=Apart, data=data).fit()
    for a, b in zip(shared.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_a_lazy_penalty_counts_k_times_on_every_kth_step_and_not_between() -> None:
    model = discriminator()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, fused=True)
    for step, batch in enumerate(real_batches()[:6]):
        optimizer.zero_grad()
        x = batch.clone().requires_grad_(step % 3 == 0)
        score = plain(x)
        terms, seeds = [F.softplus(-score).mean()], [torch.tensor(1.0)]
        if step % 3 == 0:
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            terms.append(slope.square().sum(1).mean() / 2)
            seeds.append(torch.tensor(3 * 2.0))
        torch.autograd.backward(terms, seeds)
        optimizer.step()
    scored(model, {"weight": 2.0, "every": 3}).fit()
    assert same(model, plain)


def test_a_leaf_is_one_only_on_the_steps_when_a_penalty_of_the_phase_is_due() -> None:
    seen: list[tuple[str, bool]] = []

    class Both(sl.Trainer):
        @sl.phase(trains="critic")
        def critic_phase(self, real: Tensor) -> dict[str, Any]:
            return self._scored("critic", real, "gp")

        @sl.phase(trains="generator")
        def generator_phase(self, real: Tensor) -> dict[str, Any]:
            return self._scored("generator", real, "slow")

        def _scored(self, net: str, real: Tensor, name: str) -> dict[str, Any]:
            x = self.leaf(real)
            seen.append((net, x.requires_grad))
            score = getattr(self.model, net)(x if net == "critic" else torch.cat([x, x[:, :1]], 1))
            return {f"{net}_score": score.square().mean(), name: self.penalty(of=score, at=x)}

    penalties = {"gp": {"type": "r1", "every": 2}, "slow": {"type": "r2", "every": 4}}
    Both(model=nets(), data=real_batches(), optimizers=OWNERS, penalties=penalties, run={"max_steps": 5}, log=OFF).fit()
    assert [due for net, due in seen if net == "critic"] == [True, False, True, False, True]
    assert [due for net, due in seen if net == "generator"] == [True, False, False, False, True]


def test_a_leaf_of_what_requires_grad_keeps_its_graph() -> None:
    run = scored(discriminator(), {})
    x = torch.ones(2, 2, requires_grad=True) * 2
    assert run.leaf(x) is x
    with torch.no_grad():
        plain = torch.ones(2, 2)
        assert run.leaf(plain) is plain


@pytest.mark.parametrize("kind", ["gradient", "jacobian"])
def test_the_random_stream_does_not_depend_on_when_a_penalty_is_due(kind: str) -> None:
    def stream(every: int) -> list[float]:
        drawn: list[float] = []

        class Watch(Wgan):
            @sl.phase(trains="critic", repeat=3)
            def critic_phase(self, real: Tensor) -> dict[str, Any]:
                drawn.append(torch.rand(()).item())
                return super().critic_phase(real)

        wgan(nets(), {"type": kind, "every": every}, steps=6, cls=Watch).fit()
        return drawn

    first = stream(2)
    assert first == stream(3) == stream(5)
    assert len(set(first)) == 18


def test_the_graph_of_a_penalty_dies_with_its_step_without_the_garbage_collector() -> None:
    def graphs() -> int:
        return sum(type(one) is Tensor and one.grad_fn is not None for one in gc.get_objects())

    counts: list[int] = []

    class Watch(Scored):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            counts.append(graphs())
            return super().losses(batch)

    gc.collect()
    gc.disable()
    try:
        scored(discriminator(), {}, cls=Watch).fit()
        counts.append(graphs())
    finally:
        gc.enable()
    assert len(set(counts)) == 1, counts


def test_no_gradient_of_the_penalty_reaches_the_generator_or_the_batch() -> None:
    batches = real_batches()
    before = [batch.clone() for batch in batches]
    model = nets()
    seen: list[bool] = []

    class Watch(Wgan):
        @sl.phase(trains="generator")
        def generator_phase(self, real: Tensor) -> dict[str, Tensor]:
            seen.append(all(p.grad is None for p in self.model.generator.parameters()))
            return super().generator_phase(real)

    Watch(model=model, data=batches, optimizers=OWNERS, penalties={"gp": WGAN_GP}, run={"max_steps": 1}, log=OFF).fit()
    assert seen == [True]
    assert all(
        torch.equal(a, b) and a.grad is None and not a.requires_grad for a, b in zip(batches, before, strict=True)
    )


def test_watching_changes_no_bit(tmp_path: Path) -> None:
    watched, quiet = nets(), nets()
    log = {"every": 1, "sinks": ["jsonl"], "exact_term_norms": {"every": 2}}
    run = {"max_steps": 4, "seed": 5, "dir": str(tmp_path)}
    result = wgan(watched, log=log, run=run, audit={"level": "full"}).fit()
    wgan(quiet, audit={"level": "off"}).fit()
    assert same(watched, quiet)
    assert result.dir is not None
    line = json.loads((result.dir / "metrics.jsonl").read_text().splitlines()[1])
    assert line["loss/train"] == pytest.approx(
        line["loss/wasserstein"] + 10 * line["loss/gp"] + line["loss/adversarial"]
    )
    assert line["loss_grad_exact/gp"] > 0


def test_two_micro_batches_equal_one_of_twice_the_size() -> None:
    batches = [batch.double() for batch in real_batches(4)]
    whole = [torch.cat(batches[:2]), torch.cat(batches[2:])]
    small, large = discriminator().double(), discriminator().double()
    scored(small, {"weight": 2.0}, 2, data=batches, accumulate={"micro_batches": 2}).fit()
    scored(large, {"weight": 2.0}, 2, data=whole).fit()
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_a_weight_that_moves_is_multiplied_by_every_too() -> None:
    seen: list[float] = []
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    model.weight.register_hook(lambda gradient: seen.append(gradient[0, 0].item()))

    class OnlyPenalty(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            return {"none": 0.0 * self.model(batch).sum(), "r1": self.penalty(self.model, at=batch)}

    ramp = {"start": 0.0, "end": 1.0, "steps": 4}
    data = [batch.double() for batch in real_batches()]
    tiny = {"type": "SGD", "lr": 1e-12}
    scored(model, {"weight": ramp, "every": 2}, 6, OnlyPenalty, data=data, optimizers=tiny).fit()
    assert seen == pytest.approx([0.0, 0.0, 1.0, 0.0, 2.0, 0.0], abs=1e-9)


def test_a_penalty_of_a_checkpointed_function_is_that_of_the_plain_one() -> None:
    class Checkpointed(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            def again(x: Tensor) -> Tensor:
                return checkpoint(self.model, x, use_reentrant=False)

            return {"real": F.softplus(-self.model(batch)).mean(), "r1": self.penalty(again, at=batch)}

    plain, saved = discriminator(), discriminator()
    scored(plain, {}).fit()
    result = scored(saved, {}, cls=Checkpointed).fit()
    assert result.faults == ()
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_autocast_a_penalty_of_a_function_is_computed_in_float32(precision: str) -> None:
    formats: list[torch.dtype] = []

    class Watch(Wgan):
        @sl.phase(trains="critic")
        def critic_phase(self, real: Tensor) -> dict[str, Any]:
            def critic(x: Tensor) -> Tensor:
                formats.append(self.model.critic(x).dtype)
                return self.model.critic(x)

            fake = self.model.generator(torch.randn(len(real), 3))
            assert fake.dtype != torch.float32
            gp = self.penalty(critic, at=fake)
            return {"wasserstein": self.model.critic(fake).float().mean(), "gp": gp}

    run = {"max_steps": 3, "seed": 5, "precision": precision}
    result = wgan(nets(), cls=Watch, run=run).fit()
    assert result.faults == ()
    assert set(formats) == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_penalty_is_not_scaled_whatever_the_format(precision: str, tmp_path: Path) -> None:
    data = [torch.randn(16, 2)]
    run = {"max_steps": 1, "seed": 5, "precision": precision, "dir": str(tmp_path)}
    log = {"every": 1, "sinks": ["jsonl"]}
    model = discriminator()
    x = data[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    value = slope.square().sum(1).mean() / 2
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    wanted = torch.cat([g.flatten() for g in gradients]).norm().item()

    class OnlyPenalty(Scored):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            return {name: term for name, term in super().losses(batch).items() if name == "r1"}

    result = scored(model, {}, 1, OnlyPenalty, data=data, run=run, log=log).fit()
    assert result.dir is not None
    line = json.loads((result.dir / "metrics.jsonl").read_text().splitlines()[0])
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert line["loss/r1"] == pytest.approx(value.item(), rel=tolerance)
    assert line["grad/main/pre_clip"] == pytest.approx(wanted, rel=tolerance)


def test_a_custom_step_may_use_penalties() -> None:
    class Custom(sl.Trainer):
        def custom_step(self, ops: Any, batch: Tensor) -> None:
            ops.zero()
            x = self.leaf(batch)
            score = self.model(x)
            ops.backward({"real": F.softplus(-score).mean(), "r1": self.penalty(of=score, at=x)})
            ops.update()

    by_hand, by_plan = discriminator(), discriminator()
    scored(by_hand, {"weight": 2.0}, cls=Custom).fit()
    scored(by_plan, {"weight": 2.0}).fit()
    assert same(by_hand, by_plan)


def test_a_simultaneous_step_takes_the_gradient_of_a_penalty_to_what_it_trains() -> None:
    class Both(sl.Trainer):
        def losses(self, real: Tensor) -> dict[str, Any]:
            fake = self.model.generator(torch.ones(len(real), 3))
            x = self.leaf(real)
            score = self.model.critic(x)
            return {
                "critic": F.softplus(-score).mean() + F.softplus(self.model.critic(fake)).mean(),
                "generator": F.softplus(-self.model.critic(fake)).mean(),
                "r1": self.penalty(of=score, at=x),
            }

    losses = {"critic": {"trains": ["critic.*"]}, "generator": {"trains": ["generator.*"]}}
    penalties = {"r1": {"type": "r1", "trains": ["critic.*"]}}
    run = Both(
        model=nets(),
        data=real_batches(),
        optimizers=OWNERS,
        losses=losses,
        penalties=penalties,
        simultaneous=True,
        run={"max_steps": 3},
        log=OFF,
    )
    assert run.fit().faults == ()


def test_evaluation_leaves_penalties_out_of_the_loss() -> None:
    model = discriminator()
    run = scored(model, {"weight": 1e6}, 1, eval_data=real_batches(2), optimizers={"type": "SGD", "lr": 1e-12})
    wanted = torch.cat([F.softplus(-model(batch)) for batch in real_batches(2)]).mean().item()
    assert run.fit().metrics["loss/eval"] == pytest.approx(wanted, rel=1e-5)


def test_the_plan_says_what_a_penalty_is_and_when_it_is_due() -> None:
    text = str(wgan(nets(), {**WGAN_GP, "every": 16}).plan())
    assert "wasserstein, gp                 gp = mean (|grad| - 1)^2" in text
    assert "wasserstein + 10 gp -> critic" in text
    assert "one pass, graph freed; gp is second order every 16 steps, times 16" in text


def test_checking_a_run_leaves_the_buffers_that_a_penalty_touches_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))

    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            return {"fit": self.model(batch).square().mean(), "r1": self.penalty(self.model, at=batch)}

    before = copy.deepcopy(model.state_dict())
    run = scored(model, {}, cls=Run)
    assert [fault.code for fault in run.check()] == ["SL436"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["pcgrad", "mgda"])
@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_a_penalty_may_be_combined_with_the_other_terms(kind: str, at: str) -> None:
    pytest.importorskip("torchjd")
    result = scored(discriminator(), {}, combine={"type": kind, "at": at}).fit()
    assert result.faults == ()


def test_lbfgs_evaluates_a_penalty_in_its_closure() -> None:
    model = discriminator()
    optimizer = {"type": "LBFGS", "lr": 0.5, "line_search_fn": "strong_wolfe"}
    data = [real_batches()[0]]
    result = scored(model, {"weight": 2.0}, 3, optimizers=optimizer, data=data).fit()
    again = scored(discriminator(), {"weight": 2.0}, 1, optimizers=optimizer, data=data).fit()
    assert result.losses["train"] < again.losses["train"]


@pytest.mark.parametrize("given", [{}, {"function": "both"}])
def test_a_call_that_says_neither_or_both_is_refused(given: dict[str, str]) -> None:
    run, x = scored(discriminator(), {}), torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="not both"):
        run.penalty(run.model if given else None, at=x, of=run.model(x) if given else None)
    with pytest.raises(TypeError, match="takes a tensor as `at`, not a list"):
        run.penalty(run.model, at=[1.0])  # type: ignore[arg-type]


def test_autocast_is_off_while_a_penalty_is_computed_also_inside_a_region() -> None:
    model, x = discriminator(), torch.randn(16, 2)
    request = scored(model, {}).penalty(model, at=x)
    wanted = request("r1", R1())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert request("r1", R1()).item() == wanted.item()
