"""Loops whose optimizer, schedule or scaler does not fit the model, beside their right twins, which have no fault."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, lr_scheduler
from torch.optim.optimizer import _global_optimizer_pre_hooks

import safeloop as sl

Loop = Callable[[Any, bool], None]
TWINS: list[tuple[str, str, Loop]] = []


def twins(code: str, word: str) -> Callable[[Loop], Loop]:
    """Add a loop that gives this code, and this word in its text, when it is bad, and nothing when it is good."""

    def add(loop: Loop) -> Loop:
        TWINS.append((code, word, loop))
        return loop

    return add


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loss_of(model: nn.Module, scale: float = 1.0) -> Tensor:
    return scale * F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))


def steps(audit: Any, model: nn.Module, optimizer: Any, times: int) -> Iterator[int]:
    """A plain loop; what the body of a `for` over it does comes after each step."""
    for i in range(times):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        yield i
        audit.step()


@pytest.mark.parametrize("is_bad", [True, False], ids=["bad", "good"])
@pytest.mark.parametrize(("code", "word", "loop"), TWINS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_bad_twin_is_named_and_the_good_one_is_not(
    code: str, word: str, loop: Loop, is_bad: bool, watched: Any
) -> None:
    audits: list[Any] = []

    class Watch:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = watched(*args, **kwargs)

        def __enter__(self) -> Any:
            audits.append(self.inner.__enter__())
            return audits[-1]

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    torch.manual_seed(0)
    loop(Watch, is_bad)
    faults = [fault for audit in audits for fault in audit.faults]
    text = "\n".join(map(str, faults))
    assert [fault.code for fault in faults] == ([code] if is_bad else []), text
    assert not is_bad or word in text
    assert not _global_optimizer_pre_hooks


# ---------------------------------------------------------------------------------------------------------- ownership


@twins("SL214", "0.weight")
def weights_replaced_by_new_parameters(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 9):
            if i == 3 and is_bad:
                model[0].weight = nn.Parameter(model[0].weight.detach().clamp(-0.1, 0.1))
            elif i == 3:
                model[0].weight.data.clamp_(-0.1, 0.1)


@twins("SL214", "0.weight")
def layer_unfrozen_and_not_handed_over(watch: Any, is_bad: bool) -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 9):
            if i == 3:
                model[0].requires_grad_(True)
                if not is_bad:
                    optimizer.add_param_group({"params": model[0].parameters()})


@twins("SL214", "3.weight")
def layer_added_late(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 9):
            if i == 3:
                model.append(nn.Linear(3, 3))
                if not is_bad:
                    optimizer = SGD(model.parameters(), lr=0.01)  # not the one that is watched, but there is one


@twins("SL201", "target.0.weight")
def target_network_without_no_grad(watch: Any, is_bad: bool) -> None:
    model = nn.ModuleDict({"online": net(), "target": net()})
    optimizer = SGD(model["online"].parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            x = torch.randn(8, 4)
            with torch.set_grad_enabled(is_bad):
                wanted = model["target"](x)
            optimizer.zero_grad()
            F.mse_loss(model["online"](x), wanted).backward()
            optimizer.step()
            audit.step()


@twins("SL215", "temperature")
def temperature_in_no_optimizer(watch: Any, is_bad: bool) -> None:
    model = net()
    temperature = torch.tensor(1.0, requires_grad=True)
    optimizer = SGD([*model.parameters(), *([] if is_bad else [temperature])], lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 4)) * temperature, torch.randint(0, 3, (8,))).backward()
            optimizer.step()
            audit.step()


class Prompted:
    """No module: nobody lists its prompt."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.prompt = model, nn.Parameter(torch.ones(4))

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x * self.prompt)
        return out


@twins("SL215", "prompted.prompt")
def prompt_in_a_plain_object(watch: Any, is_bad: bool) -> None:
    prompted = Prompted(net())
    optimizer = SGD([*prompted.model.parameters(), *([] if is_bad else [prompted.prompt])], lr=0.01)
    with watch(prompted.model, optimizer) as audit:
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(prompted(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
            optimizer.step()
            audit.step()


@twins("SL215", "adapter")
def adapter_in_a_hook(watch: Any, is_bad: bool) -> None:
    model, adapter = net(), nn.Linear(6, 6)
    model[0].register_forward_hook(lambda module, args, out: out + adapter(out))
    owned = [*model.parameters(), *([] if is_bad else adapter.parameters())]
    optimizer = SGD(owned, lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in steps(audit, model, optimizer, 8):
            assert adapter.weight.requires_grad


def test_a_network_that_only_judges_and_fixed_inputs_are_no_learnable_tensors(watched: Any) -> None:
    model, judge = net(), nn.Linear(3, 3)
    x, moving = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(8):
            out = model(x) + model(moving)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            optimizer.zero_grad()
            (judge(out).square().mean() + slope.square().mean()).backward()
            optimizer.step()
            with torch.no_grad():
                moving.mul_(0.9)
            audit.step()
    assert not audit.faults


def test_a_sac_loop_with_its_own_temperature_and_targets_has_no_fault(watched: Any) -> None:
    critic, actor = net(), net()
    target, log_alpha = copy.deepcopy(critic), torch.zeros(1, requires_grad=True)
    optimizers = {"critic": Adam(critic.parameters()), "actor": Adam(actor.parameters()), "alpha": Adam([log_alpha])}
    with watched({"critic": critic, "actor": actor, "target": target}, optimizers) as audit:
        for _ in range(8):
            x = torch.randn(8, 4)
            with torch.no_grad():
                goal = target(x) - log_alpha.exp()
            losses = {"critic": F.mse_loss(critic(x), goal), "actor": actor(x).square().mean()}
            losses["alpha"] = -(log_alpha * 0.3).mean()
            for name, loss in losses.items():
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
            with torch.no_grad():
                for p, q in zip(critic.parameters(), target.parameters(), strict=True):
                    q.lerp_(p, 0.1)
            audit.step()
    assert not audit.faults, "\n".join(map(str, audit.faults))


# --------------------------------------------------------------------------------------------- rates and schedules


@twins("SL658", "ExponentialLR")
def two_schedules_of_one_optimizer(watch: Any, is_bad: bool) -> None:
    model = nn.ModuleDict({"a": net(), "b": net()})
    a, b = SGD(model["a"].parameters(), lr=0.01), SGD(model["b"].parameters(), lr=0.01)
    schedules = [lr_scheduler.ExponentialLR(b if is_bad else a, 0.9), lr_scheduler.ExponentialLR(b, 0.9)]
    with watch(model, {"a": a, "b": b}) as audit:
        for _ in range(8):
            for part, optimizer in (("a", a), ("b", b)):
                optimizer.zero_grad()
                loss_of(model[part]).backward()
                optimizer.step()
            for schedule in schedules:
                schedule.step()
            audit.step()


@twins("SL659", "T_max")
def cosine_of_epochs_moved_by_batches(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 12):
            if is_bad or i % 6 == 5:
                schedule.step()


@twins("SL659", "ReduceLROnPlateau")
def plateau_of_batches(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, eps=0)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 18):
            if is_bad or i % 9 == 8:
                schedule.step(1.0)


@twins("SL216", "2.weight")
def a_group_with_a_rate_of_zero(watch: Any, is_bad: bool) -> None:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0 if is_bad else 0.1}]
    optimizer = SGD(groups, lr=0.01)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 12):
            assert i < 12


@twins("SL213", "head")
def a_decay_per_layer_the_wrong_way_round(watch: Any, is_bad: bool) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model.add_module("head", nn.Linear(4, 3))
    rates = [0.01 * 0.1**k for k in range(6)]
    parts = list(model.children())
    pairs = zip(parts, rates if is_bad else reversed(rates), strict=True)
    optimizer = Adam([{"params": part.parameters(), "lr": rate} for part, rate in pairs])
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 6):
            assert i < 6


@twins("SL657", "bfloat16")
def updates_that_round_away(watch: Any, is_bad: bool) -> None:
    model = nn.Linear(4, 1).to(torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=1e-6 if is_bad else 0.1)
    with watch(model, optimizer) as audit:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4, dtype=torch.bfloat16)).square().mean().backward()
            optimizer.step()
            audit.step()


@twins("SL657", "load_state_dict")
def the_target_is_copied_the_wrong_way(watch: Any, is_bad: bool) -> None:
    online = net()
    target = copy.deepcopy(online)
    optimizer = SGD(online.parameters(), lr=0.1)
    with watch({"online": online, "target": target}, optimizer) as audit:
        for _ in steps(audit, online, optimizer, 12):
            if is_bad:
                online.load_state_dict(target.state_dict())
            else:
                target.load_state_dict(online.state_dict())


@twins("SL661", "learning_rate")
def a_rate_under_another_key(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 4):
            optimizer.param_groups[0]["learning_rate" if is_bad else "lr"] = 0.1 / (i + 2)


@twins("SL661", "attribute `lr`")
def a_rate_as_an_attribute(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer: Any = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 4):
            if is_bad:
                optimizer.lr = 0.1 / (i + 2)


@twins("SL660", "Adam")
def an_optimizer_for_every_step(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = Adam(model.parameters())
    with watch(model) as audit:
        for _ in range(8):
            optimizer = Adam(model.parameters()) if is_bad else optimizer
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            audit.step()


# ------------------------------------------------------------------------------------------- clipping and precision


@twins("SL640", "no parameter")
def clip_of_a_generator_that_is_used_up(watch: Any, is_bad: bool) -> None:
    model = net()
    parameters: Any = model.parameters() if is_bad else list(model.parameters())
    optimizer = SGD(parameters, lr=0.01)
    with warnings.catch_warnings(), watch(model, optimizer) as audit:
        warnings.simplefilter("ignore")  # torch says so once, without a line of the user's
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(model).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            audit.step()


@twins("SL640", "before a backward pass")
def clip_before_backward(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad()
            loss = loss_of(model)
            for is_clip in (True, False) if is_bad else (False, True):
                if is_clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                else:
                    loss.backward()
            optimizer.step()
            audit.step()


def test_the_clip_that_torch_refuses_is_explained(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with pytest.raises(RuntimeError), watched(model, optimizer) as audit:
        optimizer.zero_grad()
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
    assert [fault.code for fault in audit.faults] == ["SL640"]
    assert "clip_grad_value_" in audit.faults[0].where


@twins("SL653", "0.weight")
def one_loss_is_not_scaled(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            (loss_of(model) if is_bad else scaler.scale(loss_of(model))).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()


def test_a_scaler_that_has_scaled_nothing_is_explained(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(AssertionError), watched(model, optimizer) as audit:
        loss_of(model).backward()
        scaler.step(optimizer)
    assert [fault.code for fault in audit.faults] == ["SL653"]


@twins("SL656", "GradScaler")
def float16_with_a_scaler_that_is_off(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=not is_bad)
    with watch(model, optimizer) as audit:
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()


def test_a_scaler_that_is_off_asks_for_no_scaled_loss(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with watched(model, optimizer) as audit:
        for _ in range(8):
            optimizer.zero_grad()
            loss_of(model).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    assert not audit.faults


# ---------------------------------------------------------------------------------------------- windows and averages


@twins("SL655", "micro-batches")
def the_tail_is_zeroed(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(4):
            optimizer.zero_grad()
            for i in range(5):
                loss_of(model, 1 / 3 if i < 3 or is_bad else 1 / 2).backward()
                if i == 2 or (i == 4 and not is_bad):
                    optimizer.step()
                    optimizer.zero_grad()
                    audit.step()


@twins("SL652", "next epoch")
def the_tail_counts_in_the_next_epoch(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(3):
            for i in range(8 if is_bad else 9):
                loss_of(model, 1 / 3).backward()
                if i % 3 == 2:
                    optimizer.step()
                    optimizer.zero_grad()
                    audit.step()


@twins("SL654", "zero_grad")
def a_closure_that_zeroes_last(watch: Any, is_bad: bool) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x, y = torch.randn(16, 4), torch.randn(16, 1)

    def closure() -> Tensor:
        if not is_bad:
            optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if is_bad:
            optimizer.zero_grad()
        return loss

    with watch(model, optimizer) as audit:
        for _ in range(4):
            optimizer.step(closure)
            audit.step()


@twins("SL318", "mixed with itself")
def an_average_in_the_memory_of_the_weights(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    state = model.state_dict()
    shadow = state if is_bad else copy.deepcopy(state)
    with watch(model, optimizer) as audit:
        for _ in steps(audit, model, optimizer, 6):
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    shadow[name].mul_(0.9).add_(weight, alpha=0.1)


@twins("SL318", "best")
def the_best_state_is_the_latest(watch: Any, is_bad: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 6):
            if i == 2:
                best = model.state_dict() if is_bad else copy.deepcopy(model.state_dict())
            elif i == 5:
                model.load_state_dict(best)


def test_a_decay_by_hand_is_no_average(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in steps(audit, model, optimizer, 6):
            for p in model.parameters():
                p.data.add_(p.data, alpha=-0.001)
    assert not audit.faults


def test_who_clears_the_gradients_of_what_he_freezes_means_it(watched: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for i in steps(audit, model, optimizer, 9):
            if i == 3:
                for p in itertools.chain(model[0].parameters()):
                    p.requires_grad_(False)
                    p.grad = None
    assert not audit.faults


def test_a_trainer_names_a_parameter_that_was_replaced_in_the_middle() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            if self.step == 3:
                self.model[2].weight = nn.Parameter(torch.randn(1, 8))  # type: ignore[index]
            return self.model(batch).square().mean()

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    sections: dict[str, Any] = {"optimizers": {"type": "SGD", "lr": 0.1}, "log": {"sinks": []}}
    with pytest.raises(sl.FaultError) as caught:
        Run(model=net, data=[torch.randn(8, 4)], run={"max_steps": 10}, **sections).fit()
    assert (caught.value.fault.code, caught.value.fault.names) == ("SL214", ("2.weight",))
    assert "step 3" in caught.value.fault.where


@pytest.mark.parametrize(("is_clamped", "expected"), [(True, []), (False, ["SL657"])])
def test_a_multiplier_that_is_clamped_at_zero_is_at_work(is_clamped: bool, expected: list[str], watched: Any) -> None:
    model, multiplier = net(), nn.Parameter(torch.zeros(()))
    primal = SGD(model.parameters(), lr=0.01)
    dual = SGD([multiplier], lr=0.1 if is_clamped else 1e-30, maximize=True)
    if not is_clamped:
        multiplier.data.fill_(0.5)
    with watched(model, {"primal": primal, "dual": dual}) as audit:
        for _ in range(24):
            out = model(torch.randn(8, 4))
            primal.zero_grad()
            dual.zero_grad()
            (out.square().mean() - multiplier * (out.square().mean() + 1)).backward()
            primal.step()
            dual.step()
            if is_clamped:
                with torch.no_grad():
                    multiplier.clamp_(min=0)
            audit.step()
    assert [fault.code for fault in audit.faults] == expected


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    ("before", "at_begin", "codes"),
    [(0, True, ["SL680"]), (0, False, []), (3, False, []), (3, True, [])],
    ids=["at the begin of an epoch", "at its end", "a resumed run", "resumed, at the begin"],
)
def test_a_schedule_that_moves_before_the_first_step(before: int, at_begin: bool, codes: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=4)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(before):
            schedule.step()
        for _ in range(3):
            if at_begin:
                schedule.step()
            for _ in range(4):
                optimizer.zero_grad()
                F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
                optimizer.step()
                audit.step()
            if not at_begin:
                schedule.step()
    assert [fault.code for fault in audit.faults] == codes
