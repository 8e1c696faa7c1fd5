"""Train, eval and grad modes that are left as they should not be."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from safeloop.autograd.sites import SAFELOOP, TORCH, Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, Check, EventCheck
from safeloop.checks.events import Event, Iteration, LoopState
from safeloop.checks.source import at
from safeloop.checks.wording import agree, listed
from safeloop.faults import Fault


def restless(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that behave differently in eval mode: dropout, and normalisation with running statistics."""
    return {name: module for name, module in model.named_modules() if _is_restless(module)}


def _is_restless(module: nn.Module) -> bool:
    if isinstance(module, _NormBase):
        return module.running_mean is not None
    p = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0)
    return isinstance(p, (int, float)) and p > 0


class ModeChangedInLoss(Check):
    """A loss function switches the model between train and eval mode, and does not switch it back.

    ## What it does
    Compares the mode of dropout and of batch and instance normalisation before and after the loss function, on the
    steps that are looked at in depth. Cost: two walks over the modules.

    ## Why it is bad
    A Trainer owns the mode: it puts the model into train mode before each epoch and into eval mode for `metrics`. A
    loss function that leaves it changed makes the following steps train another model.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            loss = self.model(batch).square().mean()
            self.model.eval()
            self.error = self.model(batch).detach().abs().mean()
            return loss

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            loss = self.model(batch).square().mean()
            self.model.eval()
            self.error = self.model(batch).detach().abs().mean()
            self.model.train()
            return loss

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Restore the mode that was there (`was = m.training ... m.train(was)`), or measure in `metrics`, where the loop owns
    the mode.

    ## Source
    https://github.com/wkentaro/pytorch-fcn/pull/56.
    """

    code = "SL705"
    title = "mode changed by the loss function"
    severity = "warning"

    @classmethod
    def of(cls, changed: dict[str, bool], source: str) -> Fault:
        """The fault for modules whose flag was changed: name -> the flag now."""
        names = list(changed)
        now = "train mode (training=True)" if changed[names[0]] else "eval mode (training=False)"
        return cls.fault(
            f"{listed(names)} {agree(len(names), 'was', 'were')} left in {now} by the loss function",
            where=source,
            why="from this step on they behave as they do in the other mode: dropout, and the statistics of batch "
            "normalisation",
            fix="restore the mode that was there (`was = m.training ... m.train(was)`), or measure in `metrics`, where "
            "the loop owns the mode",
            names=names,
        )


def _is_ours(frame: FrameType | None) -> bool:
    """Whether safeloop itself made a call, through torch."""
    while frame is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(SAFELOOP)


class GradModeLeftOff(CallCheck, EventCheck):
    """A loss function, or an iteration of a loop that is not ours, switches grad mode off and not on again.

    ## What it does
    Compares grad mode before and after the loss function, on the steps that are looked at in depth, and restores it
    before the fault is raised. In a loop that is not ours it looks at the end of each iteration, and tells where grad
    mode is off at two in a row after it was on. Cost: none.

    ## Why it is bad
    Grad mode belongs to the thread. Everything that follows builds no graph: the next backward pass fails, or a model
    that is built later trains nothing.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            loss = self.model(batch).square().mean()
            torch.set_grad_enabled(False)
            self.error = self.model(batch).abs().mean()
            return loss

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            loss = self.model(batch).square().mean()
            with torch.no_grad():
                self.error = self.model(batch).abs().mean()
            return loss

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Use `with torch.no_grad():`, which ends by itself, in place of `torch.set_grad_enabled(False)`.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/issues/2180.
    """

    code = "SL707"
    title = "grad mode left off"
    hears = frozenset(("_set_grad_enabled",))

    def __init__(self) -> None:
        self._was_on = False
        self._row = 0
        self._line: Site | None = None

    def hear(self, call: Call) -> Iterator[Fault]:
        """Remember the line that switched it off first, since it was on."""
        if not _is_ours(call.caller):
            self._line = None if call.args and call.args[0] else self._line or call.site
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of the second iteration in a row with grad mode off."""
        if not isinstance(event, Iteration):
            return
        if torch.is_grad_enabled():
            self._was_on, self._row = True, 0
            return
        self._row += self._was_on
        if self._row == 2:
            yield self.fault(
                "grad mode was on at the end of earlier iterations and is off now",
                where=f"iteration {event.iteration}; switched off at {at(self._line, 'a line that was not heard')}",
                why="something switched it off and did not switch it on again (an exception or an early return may "
                "have left it so): everything that follows builds no graph, and what needs one is not trained",
                fix="use `with torch.no_grad():`, which ends by itself, in place of torch.set_grad_enabled(False)",
            )

    @classmethod
    def of(cls, source: str) -> Fault:
        """The fault of the loss function at `source`."""
        return cls.fault(
            "grad mode was on before the loss function and is off after it",
            where=source,
            why="something called torch.set_grad_enabled(False) and did not switch it on again: everything that "
            "follows in this process builds no graph",
            fix="use `with torch.no_grad():`, which ends by itself, in place of torch.set_grad_enabled(False)",
        )


class GradModeChangedInMetrics(Check):
    """`metrics` switches grad mode on or off, and does not switch it back.

    ## What it does
    Compares grad mode before and after each call of `metrics`, and restores it. Cost: none.

    ## Why it is bad
    An evaluation runs without grad mode. Something in it that switches grad mode on for good has the rest of the
    evaluation build graphs: memory grows with each batch whose values are kept, and what follows runs in a mode that
    nobody chose.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def metrics(self, batch):
            torch.set_grad_enabled(True)
            return {"error": self.model(batch).abs().mean()}

    sgd, data = {"type": "SGD", "lr": 0.1}, [torch.randn(8, 4)]
    Run(model=nn.Linear(4, 1), data=data, eval_data=data, optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def metrics(self, batch):
            with torch.enable_grad():
                x = batch.clone().requires_grad_()
                (slope,) = torch.autograd.grad(self.model(x).sum(), x)
            return {"error": self.model(batch).abs().mean(), "slope": slope.norm()}

    sgd, data = {"type": "SGD", "lr": 0.1}, [torch.randn(8, 4)]
    Run(model=nn.Linear(4, 1), data=data, eval_data=data, optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Use `with torch.enable_grad():` around what needs it.

    ## Source
    https://github.com/jeanfeydy/geomloss/pull/49.
    """

    code = "SL722"
    title = "grad mode changed by metrics"
    severity = "warning"

    @classmethod
    def of(cls, source: str, *, is_on: bool) -> Fault:
        """The fault of the `metrics` at `source`."""
        before, after = ("off", "on") if is_on else ("on", "off")
        return cls.fault(
            f"grad mode was {before} before `metrics` and is {after} after it",
            where=source,
            why=f"something called torch.set_grad_enabled({is_on}) and did not undo it: the rest of the evaluation "
            + ("would build graphs and keep them" if is_on else "would have no gradients"),
            fix=f"use `with torch.{'enable_grad' if is_on else 'no_grad'}():`, which ends by itself",
        )
