"""The path that never waits for the device, forced onto the CPU, where every transfer can be counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import safeloop as sl
from safeloop import assembly
from safeloop.audit.observer import FIRST_STEPS
from safeloop.step import DeferredGate

BAD = 3
SPECS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "lr": 1e-2, "fused": True},
    "AdamW, clipped": {"type": "AdamW", "lr": 1e-2, "fused": True, "max_norm": 0.1},
    "Adam": {"type": "Adam", "lr": 1e-2, "fused": True, "amsgrad": True},
    "SGD": {"type": "SGD", "lr": 1e-2, "fused": True, "momentum": 0.9},
}
TRANSFERS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.item}


class Transfers(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in TRANSFERS
        return func(*args, **(kwargs or {}))


class Watched(sl.Trainer):
    """Keeps the state from before each step."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.before.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    @property
    def before(self) -> list[dict[str, Tensor]]:
        return self.__dict__.setdefault("_before", [])


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA with fused optimizers gets."""
    monkeypatch.setattr(assembly, "_gate", lambda config, owners, device, *_: DeferredGate(owners.values(), device))


def batches(count: int, *, bad: int | None = None) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(count)]
    if bad is not None:
        made[bad][0][2, 1] = torch.nan
    return made


def trainer(data: Any, kind: type[sl.Trainer] = Watched, *, optimizers: Any = None, **sections: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizers = optimizers or SPECS["AdamW"]
    if callable(optimizers):
        optimizers = optimizers(model.parameters())
    sections = {"run": {"max_epochs": 1}, "log": {"sinks": []}, **sections}
    return kind(model=model, data=data, optimizers=optimizers, **sections)


def assert_same(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def transfers_by_step(run: Any) -> Iterator[int]:
    """How many transfers each step made, the last left out."""
    with Transfers() as transfers:
        counts = []

        def forward(*_: Any) -> None:
            counts.append(transfers.count)

        run.model.register_forward_pre_hook(forward)
        run.fit()
    return (after - before for before, after in pairwise(counts))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.usefixtures("deferred")
def test_between_two_logs_nothing_waits_for_the_device(spec: dict[str, Any]) -> None:
    audit = {"budget": 0.0}  # else a step that is looked at in depth may fall into the stretch
    run = trainer(batches(FIRST_STEPS + 40), optimizers=spec, log={"sinks": [], "every": 10}, audit=audit)
    counts = list(transfers_by_step(run))
    quiet = [count for step, count in enumerate(counts) if step >= FIRST_STEPS and (step + 1) % 10]
    assert len(quiet) == 36
    assert set(quiet) == {0}


def test_the_immediate_check_is_seen_by_the_count() -> None:
    counts = list(transfers_by_step(trainer(batches(FIRST_STEPS + 10))))
    assert min(counts[FIRST_STEPS:]) > 0


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("num_later", [0, 1, 3])
@pytest.mark.usefixtures("deferred")
def test_the_weights_are_those_from_before_the_bad_step_although_it_is_seen_later(
    spec: dict[str, Any], num_later: int
) -> None:
    run = trainer(batches(BAD + 1 + num_later, bad=BAD), optimizers=spec)
    with pytest.raises(sl.FaultError, match="SL405") as caught:
        run.fit()
    assert f"step {BAD};" in caught.value.fault.where
    replayed = 1  # the loss function is called once more, to find the origin
    assert len(run.before) == BAD + 1 + min(num_later, 1) + replayed, "raised one step later, not after more"
    assert_same(run.model.state_dict(), run.before[BAD])
    assert run.faults == (caught.value.fault, *caught.value.others)


@pytest.mark.parametrize("bad", [0, 1, BAD])
@pytest.mark.usefixtures("deferred")
def test_the_optimizer_keeps_its_state_too(bad: int) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=True)

    good = trainer(batches(bad + 1)[:bad] or batches(1), optimizers=make, run={"max_steps": bad})
    good.fit()
    run = trainer(batches(bad + 2, bad=bad), optimizers=make)
    with pytest.raises(sl.FaultError):
        run.fit()
    ours, theirs = (copy.deepcopy(each._brought.optimizers["main"].state_dict()["state"]) for each in (run, good))
    for index, state in theirs.items():
        assert_same(ours[index], state)
    if not theirs:
        assert all(not tensor.any() for state in ours.values() for tensor in state.values())


@pytest.mark.usefixtures("deferred")
def test_good_steps_have_the_bits_of_the_immediate_check(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(batches(30), optimizers=SPECS["AdamW, clipped"])
    run.fit()
    monkeypatch.undo()
    plain = trainer(batches(30), optimizers=SPECS["AdamW, clipped"])
    plain.fit()
    assert_same(run.model.state_dict(), plain.model.state_dict())


class Breaks(Watched):
    def loss(self, batch: Any) -> Tensor:
        if len(self.before) == 2:
            raise ValueError("the user's own")
        return super().loss(batch)


@pytest.mark.parametrize(
    ("kind", "bad", "error"),
    [(Watched, None, None), (Watched, BAD, sl.FaultError), (Breaks, None, ValueError)],
    ids=["a good end", "a fault", "an exception of the user's"],
)
@pytest.mark.usefixtures("deferred")
def test_the_optimizer_is_given_back_without_the_flag(kind: type[Watched], bad: int | None, error: Any) -> None:
    made: list[torch.optim.Optimizer] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(parameters, lr=1e-2, fused=True))
        return made[0]

    run = trainer(batches(6, bad=bad), kind, optimizers=make)
    if error is None:
        run.fit()
    else:
        with pytest.raises(error):
            run.fit()
    assert not hasattr(made[0], "found_inf")


@pytest.mark.usefixtures("deferred")
def test_an_exception_of_the_users_is_not_hidden_by_the_flag() -> None:
    class Checks(Watched):
        def loss(self, batch: Any) -> Tensor:
            if len(self.before) == BAD + 1:
                raise ValueError("the user's own")
            return super().loss(batch)

    with pytest.raises(ValueError, match="the user's own"):
        trainer(batches(BAD + 3, bad=BAD), Checks).fit()


@pytest.mark.cuda
def test_on_cuda_no_step_between_two_logs_waits() -> None:
    class Strict(sl.Trainer):
        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            torch.cuda.set_sync_debug_mode("error" if FIRST_STEPS < self.step < FIRST_STEPS + 30 else "default")
            x, y = batch
            return F.cross_entropy(self.model(x), y)

    data = [(x.cuda(), y.cuda()) for x, y in batches(FIRST_STEPS + 40)]
    try:
        trainer(data, Strict, run={"max_epochs": 1, "device": "cuda"}, log={"sinks": [], "every": 1000}).fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
