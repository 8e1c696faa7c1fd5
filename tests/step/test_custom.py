"""`custom_step` is bitwise a plain loop, and cannot do what a plan could not have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import safeloop as sl

SGD = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "fused": False}
QUIET: dict[str, Any] = {"sinks": []}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make_data(n: int = 8) -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(n)]


def made(step: Callable[..., None], model: nn.Module, data: Any = None, **sections: Any) -> sl.Trainer:
    kind = type("Run", (sl.Trainer,), {"custom_step": step})
    sections.setdefault("optimizers", SGD)
    sections.setdefault("run", {"max_steps": 4})
    return kind(model=model, data=make_data() if data is None else data, log=QUIET, **sections)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def adapted(net: nn.Module, batch: Any, k: int) -> dict[str, Tensor]:
    """k inner steps of gradient descent that can be differentiated."""
    weights = dict(net.named_parameters())
    for _ in range(k):
        loss = F.mse_loss(functional_call(net, weights, batch[0]), batch[1])
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {name: w - 0.05 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
    return weights


def maml(self: Any, ops: Any, batch: Any) -> None:
    query = ops.draw()
    ops.zero("main")
    ops.backward({"outer": F.mse_loss(functional_call(self.model, adapted(self.model, batch, 3), query[0]), query[1])})
    ops.update("main")


def test_an_inner_loop_is_bitwise_the_plain_one() -> None:
    net, plain = make_net(), make_net()
    made(maml, net).fit()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    data = make_data()
    for support, query in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        F.mse_loss(functional_call(plain, adapted(plain, support, 3), query[0]), query[1]).backward()
        optimizer.step()
    assert same(net, plain)
    assert not same(net, make_net())


def perturb(net: nn.Module, rho: float = 0.05) -> list[Tensor]:
    """Move the weights along their gradients; gives them as they were."""
    with torch.no_grad():
        gradients = [p.grad for p in net.parameters()]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        before = [p.clone() for p in net.parameters()]
        for p, g in zip(net.parameters(), gradients, strict=True):
            p.add_(g, alpha=rho / float(norm))
    return before


def restore(net: nn.Module, before: list[Tensor]) -> None:
    with torch.no_grad():
        for p, old in zip(net.parameters(), before, strict=True):
            p.copy_(old)


def sam(self: Any, ops: Any, batch: Any) -> None:
    ops.zero()
    ops.backward({"here": F.mse_loss(self.model(batch[0]), batch[1])})
    before = perturb(self.model)
    ops.zero()
    ops.backward({"there": F.mse_loss(self.model(batch[0]), batch[1])})
    restore(self.model, before)
    ops.update()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_two_passes_with_moved_weights_are_bitwise_the_plain_ones(clip: float | None) -> None:
    net, plain = make_net(), make_net()
    result = made(sam, net, optimizers={**SGD, "max_norm": clip}).fit()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in make_data()[:4]:
        optimizer.zero_grad()
        F.mse_loss(plain(x), y).backward()
        before = perturb(plain)
        optimizer.zero_grad()
        F.mse_loss(plain(x), y).backward()
        restore(plain, before)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
    assert (
        same(net, plain)
        if clip is None
        else all(
            torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(net.parameters(), plain.parameters(), strict=True)
        )
    )
    assert set(result.losses) >= {"here", "there"}


def test_owners_alternate_and_only_schedules_of_updated_ones_advance() -> None:
    optimizers = {
        "first": {**SGD, "params": ["0.*"], "scheduler": {"type": "StepLR", "step_size": 1, "gamma": 0.5}},
        "second": {**SGD, "params": "rest", "scheduler": {"type": "StepLR", "step_size": 1, "gamma": 0.5}},
    }

    def alternate(self: Any, ops: Any, batch: Any) -> None:
        name = ops.owners[self.step % 2]
        for _ in range(2):
            ops.zero()
            ops.backward({"mse": F.mse_loss(self.model(batch[0]), batch[1])})
            ops.update(name)
            batch = batch if _ else ops.draw()

    net, plain = make_net(), make_net()
    made(alternate, net, optimizers=optimizers, run={"max_steps": 3}).fit()
    owned = list(plain[0].parameters()), list(plain[2].parameters())
    pair = [torch.optim.SGD(parameters, lr=0.1, momentum=0.9) for parameters in owned]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in pair]
    for step, batches in enumerate(zip(make_data()[::2], make_data()[1::2], strict=True)):
        if step == 3:
            break
        for x, y in batches:
            plain.zero_grad()
            F.mse_loss(plain(x), y).backward()
            pair[step % 2].step()
        schedules[step % 2].step()
    assert same(net, plain)


def test_a_weight_of_the_config_and_accumulation_count() -> None:
    def summed(self: Any, ops: Any, batch: Any) -> None:
        ops.zero()
        ops.backward({"mse": F.mse_loss(self.model(batch[0]), batch[1])})
        ops.backward({"mse": F.mse_loss(self.model(batch[0]), batch[1])}, accumulate=True)
        ops.update()

    net, plain = make_net(), make_net()
    made(summed, net, losses={"mse": {"weight": 0.25}}, run={"max_steps": 1}).fit()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    x, y = make_data()[0]
    for _ in range(2):
        (0.25 * F.mse_loss(plain(x), y)).backward()
    optimizer.step()
    assert same(net, plain)


def test_a_graph_that_is_kept_serves_two_passes() -> None:
    def twice(self: Any, ops: Any, batch: Any) -> None:
        out = self.model(batch[0])
        ops.zero()
        ops.backward({"one": out.square().mean()}, retain_graph=True)
        ops.backward({"two": out.mean()}, accumulate=True)
        ops.update()

    net, plain = make_net(), make_net()
    made(twice, net, run={"max_steps": 1}).fit()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    out = plain(make_data()[0][0])
    out.square().mean().backward(retain_graph=True)
    out.mean().backward()
    optimizer.step()
    assert same(net, plain)


def loss_of(self: Any, batch: Any) -> Tensor:
    return F.mse_loss(self.model(batch[0]), batch[1])


def not_zeroed(self: Any, ops: Any, batch: Any) -> None:
    ops.backward({"mse": loss_of(self, batch)})
    ops.update()


def not_zeroed_again(self: Any, ops: Any, batch: Any) -> None:
    ops.zero()
    ops.backward({"mse": loss_of(self, batch)})
    ops.backward({"mse": loss_of(self, batch)})
    ops.update()


def without_gradients(self: Any, ops: Any, batch: Any) -> None:
    ops.zero()
    ops.update()


def updated_twice(self: Any, ops: Any, batch: Any) -> None:
    ops.zero()
    ops.backward({"mse": loss_of(self, batch)})
    if self.step:
        ops.update()
    ops.zero()
    ops.update()


def stranger(self: Any, ops: Any, batch: Any) -> None:
    ops.zero("mian")


def no_dict(self: Any, ops: Any, batch: Any) -> None:
    ops.zero()
    ops.backward(loss_of(self, batch))


def no_scalar(self: Any, ops: Any, batch: Any) -> None:
    ops.zero()
    ops.backward({"mse": self.model(batch[0])})


def detached(self: Any, ops: Any, batch: Any) -> None:
    ops.zero()
    ops.backward({"mse": loss_of(self, batch).detach()})


def infinite(self: Any, ops: Any, batch: Any) -> None:
    ops.zero()
    ops.backward({"mse": loss_of(self, batch) * torch.inf})
    ops.update()


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (not_zeroed, "SL601"),
        (not_zeroed_again, "SL601"),
        (without_gradients, "SL601"),
        (updated_twice, "SL601"),
        (stranger, "SL616"),
        (no_dict, "SL616"),
        (no_scalar, "SL403"),
        (detached, "SL404"),
        (infinite, "SL405"),
    ],
)
@pytest.mark.parametrize("checks", [False, True])
def test_what_a_plan_could_not_have_is_refused_before_any_update(
    step: Callable[..., None], code: str, checks: bool
) -> None:
    net = make_net()
    trainer = made(step, net)
    with pytest.raises(sl.FaultError) as error:
        trainer.check() if checks else trainer.fit()
    assert error.value.fault.code == code
    assert same(net, make_net())


def test_a_fault_says_what_was_done_before_and_what_to_call() -> None:
    with pytest.raises(sl.FaultError) as error:
        made(not_zeroed_again, make_net()).fit()
    fault = error.value.fault
    assert "zero main; backward mse -> main" in fault.why
    assert 'ops.zero("main")' in fault.fix
    assert "accumulate=True" in fault.fix
    assert "operation 3" in fault.where


def test_a_skipped_update_changes_nothing_and_is_told_to_the_step() -> None:
    told: list[bool] = []

    def step(self: Any, ops: Any, batch: Any) -> None:
        ops.zero()
        ops.backward({"mse": loss_of(self, batch) * (torch.inf if self.step == 1 else 1.0)})
        before = copy.deepcopy(self.model)
        told.append(ops.update())
        assert same(before, self.model) is not told[-1]

    policy = {"policy": "skip", "max_consecutive": 2}
    made(step, make_net(), nonfinite=policy).fit()
    assert told == [True, False, True, True]


def test_the_record_is_in_the_step_and_in_the_plan_and_checking_trains_nothing() -> None:
    records: list[list[str]] = []

    def step(self: Any, ops: Any, batch: Any) -> None:
        sam(self, ops, batch)
        records.append(ops.record)

    net = make_net()
    trainer = made(step, net, optimizers={**SGD, "max_norm": 1.0})
    text = str(trainer.plan())
    assert same(net, make_net())
    assert all(p.grad is None for p in net.parameters())
    assert "custom_step" in text
    assert "recorded" in text
    lines = ["zero main", "backward here -> main", "zero main", "backward there -> main", "finite main", "clip main"]
    assert [line.split("  ")[0] for line in records[0]] == [*lines, "update main"]
    plain = [" ".join(line.split()[1:]) for line in text.splitlines()[2:9]]
    assert [line.split()[0] for line in plain] == [line.split()[0] for line in records[0]]
    assert trainer.plan().phases[0].trains == ("main",)
    unchecked = made(sam, make_net(), optimizers={**SGD, "max_norm": 1.0})
    trainer.fit()
    unchecked.fit()
    assert same(net, unchecked.model)
    assert records[-1] == records[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_formats_need_autocast_around_the_forward(precision: str) -> None:
    run = {"max_steps": 2, "precision": precision}
    with pytest.raises(sl.FaultError) as error:
        made(not_zeroed, make_net(), run=run).fit()
    assert error.value.fault.code == "SL616"

    def step(self: Any, ops: Any, batch: Any) -> None:
        ops.zero()
        with ops.autocast():
            out = self.model(batch[0])
        ops.backward({"mse": F.mse_loss(out.float(), batch[1])})
        ops.update()

    class Plain(sl.Trainer):
        def losses(self, batch: Any) -> dict[str, Tensor]:
            return {"mse": F.mse_loss(self.model(batch[0]).float(), batch[1])}

    custom, plain = make_net(), make_net()
    trainer = made(step, custom, run=run)
    trainer.check()
    trainer.fit()
    Plain(model=plain, data=make_data(), optimizers=SGD, run=run, log=QUIET).fit()
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(custom.parameters(), plain.parameters(), strict=True)
    )
    assert not same(custom, make_net())


def test_what_a_custom_step_excludes_is_refused() -> None:
    class Both(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            return loss_of(self, batch)

        def custom_step(self, ops: Any, batch: Any) -> None: ...

    with pytest.raises(sl.FaultError, match="SL118"):
        Both(model=make_net(), data=make_data(), optimizers=SGD, run={"max_steps": 1})
    with pytest.raises(sl.FaultError, match="SL616"):
        made(sam, make_net(), accumulate={"micro_batches": 2})
    with pytest.raises(sl.FaultError, match="SL61"):
        made(sam, make_net(), optimizers={"type": "LBFGS"}).fit()


def test_operations_end_with_their_step() -> None:
    kept: list[Any] = []
    made(lambda self, ops, batch: kept.append(ops), make_net(), run={"max_steps": 1}).fit()
    with pytest.raises(sl.FaultError, match="after the step had ended"):
        kept[0].zero()


@pytest.mark.parametrize("breaks", [False, True])
def test_a_check_puts_weights_back_that_the_step_moved(breaks: bool) -> None:
    def step(self: Any, ops: Any, batch: Any) -> None:
        ops.zero()
        ops.backward({"mse": loss_of(self, batch)})
        perturb(self.model)
        if breaks:
            raise ValueError("half way")

    net = make_net()
    trainer = made(step, net)
    if breaks:
        with pytest.raises(ValueError, match="half way"):
            trainer.check()
    else:
        trainer.check()
    assert same(net, make_net())
