"""Every wrong order of a step that users of other frameworks reported: it cannot be written here, or is refused.

Each test is named after what happened to them; the numbers are those of plain PyTorch.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl
from safeloop.plan import (
    Adapt,
    Backward,
    Clip,
    Finite,
    Forward,
    Node,
    Phase,
    Schedule,
    StepPlan,
    Term,
    Unscale,
    Update,
    Zero,
)

OFF: dict[str, Any] = {"sinks": []}
SGD: dict[str, Any] = {"type": "SGD", "lr": 1.0}
A: dict[str, Any] = {**SGD, "params": ["a.*"]}
B: dict[str, Any] = {**SGD, "params": ["b.*"]}


class Weights(nn.Module):
    """Scalars with a weight each: a term `w * x.mean()` has the gradient `x.mean()`."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names or ("a",):
            self.add_module(name, nn.ParameterDict({"w": torch.tensor(0.0)}))

    def at(self, name: str) -> Tensor:
        return self.get_submodule(name)["w"]  # type: ignore[index]


class Linear(sl.Trainer):
    """One term for each scalar."""

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        return {name: self.model.at(name) * batch.mean() for name, _ in self.model.named_children()}


def run(
    model: nn.Module, data: Any, optimizers: Any = SGD, *, cls: type[sl.Trainer] = Linear, **sections: Any
) -> sl.RunResult:
    return make(model, data, optimizers, cls=cls, **sections).fit()


def make(
    model: nn.Module, data: Any, optimizers: Any = SGD, *, cls: type[sl.Trainer] = Linear, **sections: Any
) -> sl.Trainer:
    sections = {"run": {"max_steps": 1}, "log": OFF, **sections}
    return cls(model=model, data=data, optimizers=optimizers, **sections)


def full(value: float, size: int = 1) -> Tensor:
    return torch.full((size,), value)


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def make_nets() -> Nets:
    torch.manual_seed(0)
    return Nets()


def reals(count: int = 12) -> list[Tensor]:
    return list(torch.randn(count, 8, 2, generator=torch.Generator().manual_seed(1)))


class Gan(sl.Trainer):
    @sl.phase(trains="critic", repeat=5)
    def criticise(self, real: Tensor) -> dict[str, Tensor]:
        fake = self.model.generator(torch.randn(len(real), 3))
        return {"critic": self.model.critic(fake).mean() - self.model.critic(real).mean()}

    @sl.phase(trains="generator")
    def generate(self, real: Tensor) -> dict[str, Tensor]:
        return {"generator": -self.model.critic(self.model.generator(torch.randn(len(real), 3))).mean()}


ADVERSARIES: dict[str, Any] = {
    "critic": {"type": "SGD", "lr": 0.1, "params": ["critic.*"]},
    "generator": {"type": "SGD", "lr": 0.1, "params": "rest"},
}


# ---------------------------------------------------------------------------------- several optimizers, GANs (1 to 14)


def test_a_backbone_outside_the_optimizer_is_named_and_its_gradient_does_not_grow() -> None:
    """Row 1, E1: its gradient norm grew by the same amount each step, and nobody said so."""
    net = Weights("a", "backbone")
    with pytest.raises(sl.FaultError) as caught:
        run(net, [full(1.0)], A)
    assert caught.value.fault.code == "SL201"
    assert caught.value.fault.names == ("backbone.w",)
    run(
        net, [full(1.0)], A, frozen=["backbone.*"], run={"max_steps": 8}, losses={"backbone": {"may_be_constant": True}}
    )
    assert net.at("backbone").grad is None


def test_max_steps_counts_passes_not_optimizers(tmp_path: Path) -> None:
    """Row 2: with two optimizers `max_steps=1000` stopped after 500 batches."""
    seen: list[int] = []

    class Counts(Linear):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            seen.append(self.step)
            return super().losses(batch)

    schedule = {"type": "StepLR", "step_size": 1, "gamma": 0.5}
    optimizers = {"a": {**A, "scheduler": schedule}, "b": {**B, "scheduler": schedule}}
    section = {"max_steps": 10, "dir": tmp_path}
    log = {"every": 5, "sinks": ["jsonl"]}
    trainer = make(Weights("a", "b"), [full(1.0)], optimizers, cls=Counts, run=section, log=log)
    result = trainer.fit()
    assert seen == list(range(10))
    assert result.steps == trainer.step == 10
    assert [record["step"] for record in records(result)] == [5, 10]
    assert records(result)[-1]["optim/lr/a"] == pytest.approx(0.5**10)


def records(result: sl.RunResult) -> list[dict[str, Any]]:
    assert result.dir is not None
    lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_the_generators_backward_leaves_nothing_in_the_discriminator() -> None:
    """Rows 3 and 4: the generator's loss left gradients in the discriminator, which its next step applied."""
    critics: list[list[Tensor]] = []

    class Watch(Gan):
        def generate(self, real: Tensor) -> dict[str, Tensor]:
            critics.append([p.grad.clone() for p in self.model.critic.parameters()])
            return super().generate(real)

        def criticise(self, real: Tensor) -> dict[str, Tensor]:
            assert all(p.grad is None for p in self.model.critic.parameters()), "an update starts from nothing"
            return super().criticise(real)

    nets = make_nets()
    run(nets, reals(), ADVERSARIES, cls=Watch, run={"max_steps": 3})
    assert len(critics) == 3
    for parameter, before in zip(nets.critic.parameters(), critics[-1], strict=True):
        assert torch.equal(parameter.grad, before)


def test_toggling_does_not_unfreeze_what_the_user_froze() -> None:
    """Row 5: switching between optimizers turned requires_grad on for everything."""
    nets = make_nets()
    nets.generator[0].requires_grad_(False)
    before = copy.deepcopy(nets.generator[0].state_dict())
    run(nets, reals(), ADVERSARIES, cls=Gan, run={"max_steps": 4})
    assert [p.requires_grad for p in nets.generator.parameters()] == [False, False, True, True]
    assert all(p.requires_grad for p in nets.critic.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets.generator[0].state_dict().items())


def test_what_a_ready_optimizer_holds_and_the_user_froze_stays_frozen() -> None:
    """Row 5, with optimizers that were built before the freezing."""
    nets = make_nets()
    ready = {name: torch.optim.SGD(net.parameters(), lr=0.1) for name, net in nets.named_children()}
    nets.generator[0].requires_grad_(False)
    before = copy.deepcopy(nets.generator[0].state_dict())
    run(nets, reals(), ready, cls=Gan, run={"max_steps": 2})
    assert [p.requires_grad for p in nets.generator.parameters()] == [False, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets.generator[0].state_dict().items())


def test_adam_for_some_layers_and_sgd_for_others_in_one_step() -> None:
    """Rows 7 and 12: refused elsewhere, or two backwards by hand."""

    class Fit(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().mean()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    plain = copy.deepcopy(net)
    adam = torch.optim.Adam(plain[0].parameters(), lr=0.01, fused=True)
    sgd = torch.optim.SGD(plain[2].parameters(), lr=0.1, momentum=0.9, fused=True)
    for batch in reals():
        adam.zero_grad()
        sgd.zero_grad()
        plain(batch).square().mean().backward()
        adam.step()
        sgd.step()
    optimizers = {
        "first": {"type": "Adam", "lr": 0.01, "params": ["0.*"]},
        "second": {"type": "SGD", "lr": 0.1, "momentum": 0.9, "params": "rest"},
    }
    run(net, reals(), optimizers, cls=Fit, run={"max_steps": 12})
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_graph_from_before_an_update_is_refused_with_fused_kernels_too(is_fused: bool) -> None:
    """Row 8, E14: several steps in one training_step. Torch sees the stale graph; a fused kernel hides it."""

    class Keeps(sl.Trainer):
        @sl.phase(trains="main")
        def first(self, batch: Tensor) -> dict[str, Tensor]:
            self.kept = self.model(batch).square().mean()
            return {"first": self.model(batch).mean()}

        @sl.phase(trains="main")
        def second(self, batch: Tensor) -> dict[str, Tensor]:
            return {"second": self.kept}

    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    spec = {"type": "AdamW", "lr": 0.01, "fused": is_fused}
    with pytest.raises(sl.FaultError) as caught:
        run(net, reals(), {"main": spec}, cls=Keeps)
    assert caught.value.fault.code == "SL303"


def test_a_loss_function_that_calls_backward_itself_is_refused() -> None:
    """Row 8: the habit of a hand-written loop."""

    class Impatient(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            loss = self.model(batch).square().mean()
            loss.backward()
            return loss

    net = nn.Linear(2, 1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(sl.FaultError) as caught:
        run(net, reals(), cls=Impatient)
    assert caught.value.fault.code == "SL617"
    assert "torch.autograd.grad" in caught.value.fault.fix
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(sl.FaultError, match="SL302"):
        run(net, reals(), cls=Impatient, audit={"level": "off"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_critic_five_times_sees_five_fresh_batches_and_its_schedule_moves_once() -> None:
    """Row 9: "frequency" meant something else to everybody, and the users' own modulo was wrong."""
    seen: list[tuple[str, int]] = []
    data = reals(12)

    class Watch(Gan):
        def criticise(self, real: Tensor) -> dict[str, Tensor]:
            seen.append(("critic", next(i for i, batch in enumerate(data) if batch is real)))
            return super().criticise(real)

        def generate(self, real: Tensor) -> dict[str, Tensor]:
            seen.append(("generator", next(i for i, batch in enumerate(data) if batch is real)))
            return super().generate(real)

    schedule = {"type": "StepLR", "step_size": 1, "gamma": 0.5}
    optimizers = {name: {**spec, "scheduler": schedule} for name, spec in ADVERSARIES.items()}
    trainer = make(make_nets(), data, optimizers, cls=Watch, run={"max_steps": 2})
    trainer.fit()
    turns = [*["critic"] * 5, "generator"] * 2
    assert seen == list(zip(turns, range(12), strict=True))
    owners = trainer._assembled().owners
    assert [owner.optimizer.param_groups[0]["lr"] for owner in owners.values()] == [0.1 * 0.25] * 2


def test_a_deferred_term_with_a_frequency_is_computed_on_its_steps_alone() -> None:
    """Row 9: a modulo inside the loss function computed it every time and threw it away."""
    computed: list[int] = []

    class Rare(Linear):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            def rare() -> Tensor:
                computed.append(self.step)
                return self.model.at("a") * 10.0

            return {**super().losses(batch), "rare": rare}

    net = Weights()
    run(net, [full(1.0)], cls=Rare, losses={"rare": {"every": 3}}, run={"max_steps": 5})
    assert computed == [0, 3]
    assert net.at("a").item() == -25.0, "five times 1, twice 10, and not twice 30"


class Unused(nn.Module):
    """The `spare` head takes part in nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.spare = nn.Linear(2, 4), nn.Linear(4, 1)


def test_what_got_no_gradient_is_named() -> None:
    """Row 11: "parameters not used", without saying which. An optimizer that gets nothing is refused by its name."""

    class Phased(sl.Trainer):
        @sl.phase(trains=["body", "spare"])
        def fit_body(self, batch: Tensor) -> dict[str, Tensor]:
            return {"value": self.model.body(batch).square().mean()}

    optimizers = {name: {**SGD, "lr": 0.1, "params": [f"{name}.*"]} for name in ("body", "spare")}
    with pytest.raises(sl.FaultError) as caught:
        run(Unused(), reals(), optimizers, cls=Phased)
    assert caught.value.fault.code == "SL413"
    assert caught.value.fault.names == ("spare",)


def test_the_log_shows_which_parameters_had_a_gradient(tmp_path: Path) -> None:
    """Row 11, inside one optimizer: what took no part is left as it was, and has no line in the log."""

    class Fit(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model.body(batch).square().mean()

    net = Unused()
    before = copy.deepcopy(net.spare.state_dict())
    adamw = {"type": "AdamW", "lr": 0.1, "weight_decay": 0.5}
    section, log = {"max_steps": 3, "dir": tmp_path}, {"every": 3, "sinks": ["jsonl"]}
    (record,) = records(run(net, reals(), adamw, cls=Fit, run=section, log=log))
    norms = {tag.removeprefix("module/grad_norm/") for tag in record if tag.startswith("module/grad_norm/")}
    assert norms == {"body"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.spare.state_dict().items())


def test_two_models_accumulate_together_and_apart() -> None:
    """Rows 10 and 13: accumulation and several optimizers excluded each other, or nested contexts were wrong."""

    class Apart(sl.Trainer):
        @sl.phase(trains="a")
        def first(self, batch: Tensor) -> dict[str, Tensor]:
            return {"a": self.model.at("a") * batch.mean()}

        @sl.phase(trains="b")
        def second(self, batch: Tensor) -> dict[str, Tensor]:
            return {"b": self.model.at("b") * batch.mean()}

    optimizers = {"a": A, "b": B}
    micro = [full(1.0, 1), full(3.0, 3), full(2.0, 2), full(6.0, 2)]
    together, apart = Weights("a", "b"), Weights("a", "b")
    run(together, micro, optimizers, accumulate={"micro_batches": 2}, run={"max_steps": 2})
    run(apart, micro, optimizers, cls=Apart, accumulate={"micro_batches": 2})
    first, second = (1 * 1.0 + 3 * 3.0) / 4, (2 * 2.0 + 2 * 6.0) / 4
    assert together.at("a").item() == together.at("b").item() == -(first + second)
    assert apart.at("a").item() == -first, "the first phase has the first window"
    assert apart.at("b").item() == -second, "and the second phase a fresh one"


def test_two_optimizers_with_param_groups_come_from_yaml(tmp_path: Path) -> None:
    """Row 14: several optimizers or parameter groups could not be written in YAML."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "run: {max_steps: 1}\n"
        "optimizers:\n"
        "  first: {type: AdamW, lr: 0.1, params: ['0.*'], groups: [{params: ['*.bias'], weight_decay: 0.0}]}\n"
        "  second: {type: SGD, lr: 0.2, momentum: 0.9, params: rest}\n"
        "log: {sinks: []}\n"
    )

    class Fit(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().mean()

    trainer = Fit(file, model=nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)), data=reals())
    assert trainer.fit().steps == 1
    owners = trainer._assembled().owners
    decays = [group["weight_decay"] for group in owners["first"].optimizer.param_groups]
    assert decays == [0.0, 0.01]
    assert type(owners["second"].optimizer) is torch.optim.SGD
    assert set(owners["second"].parameters) == {"1.weight", "1.bias"}


# ------------------------------------------------------------------------------------------ clipping and AMP (15 to 22)

SCALE = 2.0**16


def test_clipping_comes_after_unscaling() -> None:
    """Rows 15 and 17: a true gradient of 2 is 131072 when scaled; clipped before it is unscaled, 3e-5 would be left."""
    net = Weights()
    run(net, [full(2.0)], {**SGD, "max_norm": 4.0}, run={"max_steps": 1, "precision": "fp16"})
    assert net.at("a").item() == -2.0, "a norm of 2 is below 4"
    net = Weights()
    run(net, [full(2.0)], {**SGD, "max_norm": 1.0}, run={"max_steps": 1, "precision": "fp16"})
    assert net.at("a").item() == pytest.approx(-1.0, rel=1e-5)


def test_the_scale_is_updated_once_a_step_with_two_optimizers_and_the_second_gradient_is_not_doubled() -> None:
    """Row 16, E4: the scale was halved between a backward and its unscale; the second optimizer got 2.0 for 1.0."""

    class Overflows(sl.Trainer):
        @sl.phase(trains="a")
        def first(self, batch: Tensor) -> dict[str, Tensor]:
            return {"a": self.model.at("a") * (torch.inf if self.step == 0 else 1.0)}

        @sl.phase(trains="b", repeat=2)
        def second(self, batch: Tensor) -> dict[str, Tensor]:
            return {"b": self.model.at("b") * 1.0}

    class Quiet(Overflows):
        @sl.phase(trains="a")
        def first(self, batch: Tensor) -> dict[str, Tensor]:
            return {"a": self.model.at("a") * 1.0}

    net = Weights("a", "b")
    net.a["w"].data.fill_(1.0)
    loud = make(net, [full(1.0)], {"a": A, "b": B}, cls=Overflows, run={"max_steps": 1, "precision": "fp16"})
    loud.fit()
    assert net.at("a").item() == 1.0, "its update was skipped"
    assert net.at("b").item() == -2.0, "two turns, a gradient of exactly 1 in each"
    assert scale_of(loud).value.item() == SCALE / 2
    quiet = make(Weights("a", "b"), [full(1.0)], {"a": A, "b": B}, cls=Quiet, run={"max_steps": 1, "precision": "fp16"})
    quiet.fit()
    assert scale_of(quiet).value.item() == SCALE
    assert scale_of(quiet)._good_steps.item() == 1, "three updates, and one good step on the way to a higher scale"


def scale_of(trainer: sl.Trainer) -> Any:
    return trainer._assembled().precision.scale


def test_only_the_discriminator_is_clipped() -> None:
    """Row 18 and 21: clipping was for all optimizers, or had to be written by hand."""
    net = Weights("a", "b")
    run(net, [full(5.0)], {"a": {**A, "max_norm": 1.0}, "b": B})
    assert net.at("a").item() == pytest.approx(-1.0, rel=1e-5)
    assert net.at("b").item() == -5.0


def test_the_norm_is_logged_before_and_after_clipping(tmp_path: Path) -> None:
    """Row 19: people saw the norm from before clipping and concluded that clipping does not work."""
    log = {"every": 1, "sinks": ["jsonl"]}
    section = {"max_steps": 1, "dir": tmp_path}
    (record,) = records(run(Weights(), [full(5.0)], {**SGD, "max_norm": 1.0}, run=section, log=log))
    assert record["grad/main/pre_clip"] == 5.0
    assert record["grad/main/post_clip"] == pytest.approx(1.0, rel=1e-5)
    assert record["grad/main/clip_fraction"] == 1.0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("limit", [{}, {"max_norm": 1.0}])
def test_a_norm_that_is_not_finite_raises_before_anything_is_clipped(poison: float, limit: dict[str, float]) -> None:
    """Row 20, E5: one NaN made all other gradients NaN, one Inf made them zero; neither raised."""
    net = Weights("a", "b")

    class Poisoned(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            gate = torch.where(batch > 0, 0.0, poison)
            return {"a": (self.model.at("a") * gate).sum() * 0 + self.model.at("a"), "b": 3 * self.model.at("b")}

    with pytest.raises(sl.FaultError) as caught:
        run(net, [full(-1.0)], {**SGD, **limit}, cls=Poisoned)
    assert caught.value.fault.code in {"SL405", "SL501"}
    assert net.at("a").item() == net.at("b").item() == 0.0
    assert net.at("b").grad.item() == 3.0, "a NaN is never spread"


def test_a_loss_that_is_not_finite_raises_though_its_gradients_are() -> None:
    """Row 20: a norm alone does not see it."""

    class Shifted(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model.at("a") + batch.mean()

    net = Weights()
    with pytest.raises(sl.FaultError) as caught:
        run(net, [full(torch.inf)], cls=Shifted)
    assert caught.value.fault.code == "SL405"
    assert net.at("a").item() == 0.0


@pytest.mark.parametrize("bad", ["a", "b"])
def test_a_nan_in_the_gradient_of_one_optimizer_skips_the_update_of_both(bad: str) -> None:
    """Row 20: the loss is finite, one gradient is not, and the other optimizer must not run ahead."""

    class Roots(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            values = {name: self.model.at(name) for name in ("a", "b")}
            values[bad] = values[bad] + (0.0 * values[bad]).sqrt() if self.step == 0 else values[bad]
            return values

    net = Weights("a", "b")
    policy = {"policy": "skip", "max_consecutive": 3}
    run(net, [full(1.0)], {"a": A, "b": B}, cls=Roots, nonfinite=policy)
    assert net.at("a").item() == net.at("b").item() == 0.0
    run(net, [full(1.0)], {"a": A, "b": B}, cls=Roots, nonfinite=policy, run={"max_steps": 2})
    assert net.at("a").item() == net.at("b").item() == -1.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_grad_inside_a_step_under_autocast_does_not_kill_the_gradients(precision: str) -> None:
    """Row 22: autocast served the weights that it had cast under no_grad, without their graph."""

    class Teacher(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.model(batch)
            return F.mse_loss(self.model(batch), target + 1)

    net = nn.Linear(2, 1)
    run(net, reals(), cls=Teacher, run={"max_steps": 1, "precision": precision})
    assert net.weight.grad is not None
    assert net.weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------- accumulation (23 to 30)


def test_the_last_window_is_weighted_right() -> None:
    """Row 23, E2 and E6: five batches of gradient 1 in windows of four gave updates of 1 and of 0.25."""
    moves: list[float] = []

    class Watch(Linear):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            moves.append(self.model.at("a").item())
            return super().losses(batch)

    net = Weights()
    result = run(net, [full(1.0)] * 5, cls=Watch, accumulate={"micro_batches": 4}, run={"max_epochs": 2})
    assert result.steps == 4
    assert [*moves, net.at("a").item()] == [0, 0, 0, 0, -1, -2, -2, -2, -2, -3, -4]


def test_micro_batches_of_one_and_three_samples_are_no_mean_of_means() -> None:
    """E2b and E17: the gradient was 2 where that of the full batch is 1."""
    net = Weights()
    run(net, [full(4.0, 1), full(0.0, 3)], accumulate={"micro_batches": 2})
    assert net.at("a").item() == -1.0
    by_batches = Weights()
    run(by_batches, [full(4.0, 1), full(0.0, 3)], accumulate={"micro_batches": 2, "weight_by": "batches"})
    assert by_batches.at("a").item() == -2.0, "only where it is asked for"


def test_a_window_longer_than_the_epoch_is_the_epoch() -> None:
    """Rows 24 and 27: accumulation was silently ignored, or the end of the data forced a badly weighted step."""
    net = Weights()
    result = run(net, [full(1.0), full(2.0), full(6.0)], accumulate={"micro_batches": 8}, run={"max_epochs": 2})
    assert result.steps == 2
    assert net.at("a").item() == -6.0, "twice the mean of 1, 2 and 6"


def test_the_logged_loss_is_not_divided_by_the_window() -> None:
    """Row 25: callbacks saw a quarter of the loss."""

    class Constant(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model.at("a") * 0 + batch.mean()

    data = [full(6.0), full(2.0), full(4.0), full(8.0)]
    result = run(Weights(), data, cls=Constant, accumulate={"micro_batches": 4})
    assert result.losses == {"train": 5.0, "loss": 5.0}


def test_tokens_are_counted_and_not_batches() -> None:
    """Row 26: the mean over micro-batches of the mean over tokens is not the mean over tokens."""

    class Tokens(Linear):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            return {"a": self.model.at("a") * batch[batch >= 0].mean()}

        def count_tokens(self, batch: Tensor) -> int:
            return int((batch >= 0).sum())

    padding = -1.0
    data = [torch.tensor([8.0, padding, padding, padding]), torch.tensor([0.0, 0.0, 0.0, padding])]
    net = Weights()
    run(net, data, cls=Tokens, accumulate={"micro_batches": 2, "weight_by": "tokens"})
    assert net.at("a").item() == -2.0, "8 over four tokens"


@pytest.mark.parametrize("num_optimizers", [1, 2])
def test_a_window_of_unlike_sequences_has_the_gradient_of_one_big_batch(num_optimizers: int) -> None:
    """Row 26: a model that knows nothing of windows stayed inexact, silently; the last, shorter window included."""

    class Tagger(sl.Trainer):
        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            words, tags = batch
            return F.cross_entropy(self.model(words).flatten(0, 1), tags.flatten(), ignore_index=-1)

        def count_tokens(self, batch: tuple[Tensor, Tensor]) -> int:
            return int((batch[1] >= 0).sum())

    def make_net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4)).double()

    generator = torch.Generator().manual_seed(1)
    words = torch.randint(7, (10, 6), generator=generator)
    tags = torch.randint(4, (10, 6), generator=generator)
    tags[torch.rand(10, 6, generator=generator) < torch.linspace(0.0, 0.8, 10).unsqueeze(1)] = -1
    micro = list(zip(words.split(2), tags.split(2), strict=True))
    big = [(words[:6], tags[:6]), (words[6:], tags[6:])]
    nets = make_net(), make_net()
    sgd = {"type": "SGD", "lr": 0.5}
    two = {"words": {**sgd, "params": ["0.*"]}, "tags": {**sgd, "params": ["1.*"]}}
    optimizers = {"main": sgd} if num_optimizers == 1 else two
    window = {"micro_batches": 3, "weight_by": "tokens"}
    run(nets[0], micro, optimizers, cls=Tagger, accumulate=window, run={"max_epochs": 1})
    run(nets[1], big, optimizers, cls=Tagger, run={"max_epochs": 1})
    for ours, plain in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(ours, plain, rtol=0, atol=1e-14)


def test_what_is_done_every_n_steps_lines_up_with_the_ends_of_windows(tmp_path: Path) -> None:
    """Row 29: a cadence counted in micro-batches fell into the middle of a window, whose gradients were then lost."""
    evaluated: list[tuple[int, float]] = []

    class Watch(Linear):
        def metrics(self, batch: Tensor) -> dict[str, Tensor]:
            evaluated.append((self.step, self.model.at("a").item()))
            return {"value": self.model.at("a") + batch.mean()}

    section, log = {"max_epochs": 2, "dir": tmp_path}, {"every": 2, "sinks": ["jsonl"]}
    data = [full(1.0)] * 10
    accumulate, evaluate = {"micro_batches": 4}, {"every": 3}
    result = run(
        Weights(),
        data,
        cls=Watch,
        eval_data=[full(0.0)],
        run=section,
        log=log,
        accumulate=accumulate,
        evaluate=evaluate,
    )
    assert result.steps == 6, "three windows an epoch: of 4, 4 and 2"
    assert evaluated == [(3, -3.0), (6, -6.0)], "each after a whole number of updates"
    assert [record["step"] for record in records(result)] == [2, 4, 6]


def test_nothing_is_zeroed_between_the_micro_batches_of_a_window() -> None:
    """Rows 10 and 28: official scripts threw away all micro-batches but the last."""
    kept: list[float | None] = []

    class Watch(Linear):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            gradient = self.model.at("a").grad
            kept.append(None if gradient is None else gradient.item())
            return super().losses(batch)

    data = [full(4.0), full(8.0), full(12.0), full(16.0)]
    trainer = make(Weights(), data, cls=Watch, accumulate={"micro_batches": 4}, run={"max_steps": 2})
    trainer.fit()
    assert kept == [None, 1.0, 3.0, 6.0] * 2
    (phase,) = trainer._assembled().plan.phases
    assert [node.verb for node in phase.nodes] == ["zero", "forward", "backward", "finite", "update"]


def test_a_logger_sees_the_gradients_of_the_step(tmp_path: Path) -> None:
    """Row 30: they were already zeroed when a logger read them."""
    net = Weights("a", "b")
    section = {"max_steps": 2, "dir": tmp_path}
    log = {"every": 1, "sinks": ["jsonl"]}
    result = run(net, [full(3.0), full(4.0)], {"a": A, "b": B}, run=section, log=log)
    assert [record["grad/a/pre_clip"] for record in records(result)] == [3.0, 4.0]
    assert [record["module/grad_norm/b"] for record in records(result)] == [3.0, 4.0]
    assert net.at("a").grad.item() == 4.0


# ---------------------------------------------------------------------------- what a plan that is made by hand refuses

BOTH = ("a", "b")
TERMS = (Term("a"), Term("b"))
ZERO, FORWARD, BACKWARD = Zero(BOTH), Forward("train", TERMS), Backward("train", TERMS, BOTH)
UNSCALE, FINITE = Unscale(BOTH), Finite(BOTH, "skip", is_scaled=True)
CLIP = Clip("a", 1.0)
UPDATE_A = Update("a", "SGD", is_clipped=True, phases=("train",))
UPDATE_B = Update("b", "SGD", phases=("train",))
RIGHT = (ZERO, FORWARD, BACKWARD, UNSCALE, FINITE, CLIP, UPDATE_A, UPDATE_B)
CLOSING = (Schedule("a", "StepLR"), Adapt(BOTH))


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param((FORWARD, BACKWARD, ZERO, *RIGHT[3:]), id="E3: zero_grad after the backward and before the step"),
        pytest.param(RIGHT[1:], id="zero_grad forgotten"),
        pytest.param((*RIGHT[:2], *RIGHT[3:], BACKWARD), id="all steps before the backward"),
        pytest.param((*RIGHT[:3], CLIP, UNSCALE, FINITE, *RIGHT[6:]), id="row 15: clip before unscale"),
        pytest.param((*RIGHT[:4], CLIP, FINITE, *RIGHT[6:]), id="row 20: clip before the finite check"),
        pytest.param((*RIGHT[:3], FINITE, UNSCALE, *RIGHT[5:]), id="finite check of scaled gradients"),
        pytest.param((*RIGHT[:6], UPDATE_A, BACKWARD, UPDATE_B), id="row 8: a second backward after the first step"),
        pytest.param((*RIGHT, UPDATE_B), id="one optimizer twice on the same gradients"),
        pytest.param((*RIGHT[:5], *RIGHT[6:]), id="clip forgotten"),
        pytest.param(RIGHT[:-1], id="an optimizer that never steps"),
        pytest.param((*RIGHT[:7], Adapt(BOTH), UPDATE_B), id="row 16: the scale moves between two optimizers"),
        pytest.param((Schedule("a", "StepLR"), *RIGHT), id="schedule before the first update"),
    ],
)
def test_a_reported_wrong_order_is_no_plan(nodes: tuple[Node, ...]) -> None:
    StepPlan((Phase("train", RIGHT, BOTH),), CLOSING)
    with pytest.raises(sl.FaultError) as caught:
        StepPlan((Phase("train", nodes, BOTH),))
    assert caught.value.fault.code == "SL601"
