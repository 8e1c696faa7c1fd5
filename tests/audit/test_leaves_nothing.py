"""Watching changes no bit, and leaves nothing behind, however the loop ends."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import safeloop as sl
from safeloop.audit.shims import hookable


def make() -> tuple[nn.Module, SGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 1))
    return model, SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
    loss.backward()
    optimizer.step()
    return loss


def assert_nothing_is_left(*optimizers: torch.optim.Optimizer) -> None:
    assert not _get_current_function_mode_stack()
    assert not modules._global_forward_pre_hooks
    assert not modules._global_forward_hooks
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def dropout_loop(audit: Any) -> list[Tensor]:
    model, optimizer = make()
    with audit(model, optimizer):
        for _ in range(25):
            train(model, optimizer)
    return list(model.parameters())


def scaled_loop(audit: Any) -> list[Tensor]:
    model, _ = make()
    optimizer = AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    with audit(model, optimizer):
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(torch.randn(8, 4))
            scaler.scale(out.float().square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    return [*model.parameters(), torch.tensor(scaler.get_scale())]


def closure_loop(audit: Any) -> list[Tensor]:
    model, _ = make()
    model.eval()
    optimizer = LBFGS(model.parameters(), lr=0.5, max_iter=4)
    x, y = torch.randn(8, 4), torch.randn(8, 1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with audit(model, optimizer):
        for _ in range(5):
            optimizer.step(closure)
    return list(model.parameters())


def adversarial_loop(audit: Any) -> list[Tensor]:
    torch.manual_seed(0)
    gen, disc = nn.Linear(2, 4), nn.Linear(4, 1)
    opt_g, opt_d = Adam(gen.parameters(), lr=0.01), Adam(disc.parameters(), lr=0.01)
    with audit({"gen": gen, "disc": disc}, [opt_g, opt_d]):
        for _ in range(12):
            fake = gen(torch.randn(8, 2))
            opt_d.zero_grad()
            F.softplus(disc(fake.detach()) - disc(torch.randn(8, 4))).mean().backward()
            opt_d.step()
            opt_g.zero_grad()
            F.softplus(-disc(fake)).mean().backward()
            opt_g.step()
    return [*gen.parameters(), *disc.parameters()]


@pytest.mark.parametrize("loop", [dropout_loop, scaled_loop, closure_loop, adversarial_loop])
def test_weights_and_random_state_are_bitwise_the_same(loop: Callable[[Any], list[Tensor]], watched: Any) -> None:
    plain = loop(lambda model, optimizers: nullcontext())
    state = torch.get_rng_state()
    seen = loop(watched)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, plain, seen))


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, GeneratorExit])
def test_an_error_of_any_kind_leaves_nothing(error: type[BaseException], watched: Any) -> None:
    model, optimizer = make()
    with pytest.raises(error), watched(model, optimizer):
        train(model, optimizer)
        raise error
    assert_nothing_is_left(optimizer)


def test_break_leaves_nothing(watched: Any) -> None:
    model, optimizer = make()
    for _ in range(2):
        with watched(model, optimizer):
            train(model, optimizer)
            break
    assert_nothing_is_left(optimizer)


def test_a_generator_that_is_closed_in_the_middle_leaves_nothing() -> None:
    model, optimizer = make()

    def loop() -> Iterator[Tensor]:
        with sl.audit(model=model, optimizers=optimizer, on_fault="collect"):
            while True:
                yield train(model, optimizer)

    running = loop()
    for _ in range(3):
        next(running)
    running.close()
    assert_nothing_is_left(optimizer)


def test_a_mode_of_the_users_that_outlives_the_watch_stays_alone() -> None:
    model, optimizer = make()

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    mode = Mode()
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect"):
        mode.__enter__()
        train(model, optimizer)
    assert _get_current_function_mode_stack() == [mode]
    mode.__exit__(None, None, None)
    assert_nothing_is_left(optimizer)


def test_optimizer_scaler_and_scheduler_keep_their_state_and_can_be_copied_meanwhile(watched: Any) -> None:
    def run(audit: Any, copies: bool) -> list[dict[str, Any]]:
        model, optimizer = make()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scheduler = ExponentialLR(optimizer, 0.9)
        with audit(model, optimizer):
            for _ in range(4):
                optimizer.zero_grad()
                scaler.scale(F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))).backward()
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
            if copies:
                for other in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
                    assert other.step.__self__ is other
                    assert other.state_dict() == scaler.state_dict()
                assert copy.deepcopy(optimizer).state_dict().keys() == optimizer.state_dict().keys()
                torch.save([optimizer.state_dict(), scaler.state_dict(), scheduler.state_dict()], io.BytesIO())
        assert not {"step", "unscale_", "update"} & scaler.__dict__.keys()
        pickle.loads(pickle.dumps([optimizer, scaler]))
        copy.deepcopy(optimizer)
        return [optimizer.state_dict(), scaler.state_dict(), scheduler.state_dict()]

    plain, seen = run(lambda model, optimizer: nullcontext(), False), run(watched, True)
    assert plain[1:] == seen[1:]
    assert plain[0]["param_groups"] == seen[0]["param_groups"]


def test_attributes_of_a_scaler_are_put_back(watched: Any) -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    mine = scaler.update
    scaler.update = mine  # type: ignore[method-assign]
    with watched(model, optimizer), sl.audit(model=model, optimizers=optimizer, on_fault="collect"):
        scaler.scale(F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))).backward()
        scaler.step(optimizer)
        scaler.update()
    assert {name for name in ("step", "unscale_", "update") if name in scaler.__dict__} == {"update"}
    assert scaler.__dict__["update"] is mine


def test_an_error_of_ours_in_a_hook_does_not_end_the_loop(monkeypatch: Any) -> None:
    model, optimizer = make()
    broken: list[Exception] = []

    def run() -> None:
        with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
            assert audit._watch is not None
            monkeypatch.setattr(audit._watch._updates, "event", None)
            watch = audit._watch
            train(model, optimizer)
        broken.extend(watch.broken)
        watch.broken.clear()

    with pytest.warns(RuntimeWarning, match="TypeError"):
        run()
    assert [type(error) for error in broken] == [TypeError]


def test_a_wrapper_is_watched_by_what_it_holds() -> None:
    class Outer:
        def __init__(self, inner: Any) -> None:
            self.optimizer = inner

    _, optimizer = make()
    assert hookable(Outer(Outer(optimizer))) is optimizer
    assert hookable(Outer(None)) is None


def test_an_error_of_ours_in_a_trainer_is_told_and_ends_nothing(monkeypatch: Any) -> None:
    from safeloop.checks.terms.misuse import ProbabilitiesAsLogits

    def fail(check: Any, call: Any) -> Any:
        raise TypeError("a slip of ours")

    class Run(sl.Trainer):
        def loss(self, batch: Any) -> Any:
            return torch.nn.functional.cross_entropy(self.model(batch), torch.tensor([0, 1]))

    monkeypatch.setattr(ProbabilitiesAsLogits, "hear", fail)
    run = Run(
        model=torch.nn.Linear(3, 2),
        data=[torch.ones(2, 3)],
        optimizers={"type": "SGD", "lr": 0.1},
        run={"max_steps": 2},
        log={"sinks": []},
    )
    with pytest.warns(RuntimeWarning, match="failed in itself 2 times.*a slip of ours"):
        run.fit()
    run._assembled().audit._tape.broken.clear()
