"""Train and eval mode where the other was meant."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import swa_utils

from safeloop.autograd.sites import call_text
from safeloop.autograd.tape import Call, Mark
from safeloop.checks.check import CallCheck, Check, EventCheck
from safeloop.checks.events import Backward, Event, Iteration, LoopState
from safeloop.checks.graph.recomputed import updates_statistics
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


def restless(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that behave differently in eval mode: dropout, batch and instance normalisation."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_DropoutNd, _NormBase)) or getattr(module, "dropout", 0) not in (0, 0.0, None, False)
    }


class StatisticsFromValidation(CallCheck, EventCheck):
    """Batch normalisation takes data into its running statistics that nothing is trained on.

    ## Source
    https://github.com/princeton-vl/pytorch_stacked_hourglass/issues/44.
    """

    code = "SL702"
    title = "validation data in running statistics"
    hears = frozenset(("batch_norm", "backward"))

    def __init__(self) -> None:
        self._trained: set[str] = set()
        self._open: dict[int, Mark] = {}
        self._times: Counter[str] = Counter()
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note forwards in train mode under no_grad, and which of them a loss uses."""
        tape = call.tape
        if call.name == "backward":
            used = {id(mark) for tensor in call.tensors for mark in tape.marks_of(tensor)}
            self._open = {key: mark for key, mark in self._open.items() if key not in used}
        elif updates_statistics(call):
            if call.grad_mode:
                self._trained.add(tape.module)
            elif not _is_refresh():
                mark = Mark("statistics", "batch_norm", "", call.site, tape.module, 0)
                tape.mark(call.out, mark)
                self._open[id(mark)] = mark
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of an iteration: what no loss has used was validation."""
        if not isinstance(event, Iteration):
            return
        left, self._open = self._open, {}
        modules = {mark.module: mark for mark in left.values()}
        for module in modules:
            self._times[module] += 1
        names = [m for m in modules if self._times[m] >= 2 and m in self._trained and m not in self._told]
        if names:
            self._told |= set(names)
            yield self.fault(
                f"running_mean and running_var of {listed(names)} took in data under no_grad, in train mode, that no "
                "loss was computed from",
                where=at(modules[names[0]].site, f"forward of `{names[0]}`"),
                why="the model was evaluated without model.eval(): the statistics of validation data leak into the model, "
                "and the result depends on the batch",
                fix="call model.eval() before the evaluation and model.train() after it",
                names=names,
            )


def _is_refresh() -> bool:
    """Whether torch's own `update_bn` runs, whose purpose this is."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == swa_utils.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class LeftInEvalMode(EventCheck):
    """The model was put into eval mode during training, and goes on training in it.

    ## Source
    https://github.com/wkentaro/pytorch-fcn/pull/56.
    """

    code = "SL703"
    title = "left in eval mode"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._was_training: set[str] = set()
        self._row = 0
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second backward pass in eval mode after one in train mode."""
        if not isinstance(event, Backward) or self._was_told:
            return
        modules = restless(self._model)
        now = {name for name, module in modules.items() if module.training}
        stopped = sorted(self._was_training - now)
        self._was_training |= now
        self._row = self._row + 1 if stopped else 0
        if self._row < 2:
            return
        self._was_told = True
        yield self.fault(
            f"the model was in train mode and now trains in eval mode (training=False): {listed(stopped)} no longer do "
            "what they do in training",
            where=f"iteration {event.iteration}; {at(event.site, 'the backward pass')}",
            why="an evaluation called model.eval() and nothing called model.train() after it: dropout is off, and "
            "batch normalisation uses its running statistics",
            fix="call model.train() after each evaluation, or at the start of each epoch",
            names=stopped,
        )


class ModeChangedInLoss(Check):
    """A loss function switches the model between train and eval mode, and does not switch it back.

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
            f"{listed(names)} were left in {now} by the loss function",
            where=source,
            why="from this step on they behave as they do in the other mode: dropout, and the statistics of batch "
            "normalisation",
            fix="restore the mode that was there (`was = m.training ... m.train(was)`), or measure in `metrics`, where the "
            "loop owns the mode",
            names=names,
        )


class GradModeLeftOff(Check):
    """A loss function switches grad mode off or on, and does not switch it back.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/issues/2180.
    """

    code = "SL707"
    title = "grad mode left off"

    @classmethod
    def of(cls, source: str) -> Fault:
        """The fault of the loss function at `source`."""
        return cls.fault(
            "grad mode was on before the loss function and is off after it",
            where=source,
            why="something called torch.set_grad_enabled(False) and did not switch it on again: everything that follows "
            "in this process builds no graph",
            fix="use `with torch.no_grad():`, which ends by itself, in place of torch.set_grad_enabled(False)",
        )


class DropoutInEvaluation(CallCheck):
    """Functional dropout is active in eval mode.

    ## Source
    https://github.com/pytorch/pytorch/issues/26338.
    """

    code = "SL704"
    title = "dropout active in evaluation"
    severity = "warning"
    hears = frozenset(
        [
            "dropout",
            "dropout1d",
            "dropout2d",
            "dropout3d",
            "alpha_dropout",
            "feature_alpha_dropout",
            "scaled_dot_product_attention",
        ]
    )

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a module in eval mode calls dropout without saying whether it trains."""
        module = call.tape.running
        if module is None or module.training or (not call.is_direct and call.name != "scaled_dot_product_attention"):
            return
        if not _drops(call):
            return
        place = at(call.site, f"forward of `{call.tape.module}`")
        if place in self._told:
            return
        self._told.add(place)
        fix = (
            "dropout_p=self.p if self.training else 0.0" if call.name.startswith("scaled") else "training=self.training"
        )
        yield self.fault(
            f"`{call.name}` drops values although module `{call.tape.module}` is in eval mode",
            where=place,
            why="a functional dropout does not know the mode of the module: its default is to be active, so that every "
            "evaluation is random",
            fix=f"pass `{fix}`, or use nn.Dropout",
            names=(call.tape.module,),
        )


def _drops(call: Call) -> bool:
    if call.name == "scaled_dot_product_attention":
        p = call.kwargs.get("dropout_p", call.args[4] if len(call.args) > 4 else 0.0)
        return bool(p) and not isinstance(call.tape.running, nn.MultiheadAttention)
    if not call.kwargs.get("training", True) or not call.kwargs.get("p", 0.5):
        return False
    return call.frame is not None and "training" not in call_text(call.frame)  # said on purpose: Monte Carlo dropout


class FrozenStatistics(CallCheck):
    """The running statistics of a frozen module keep moving.

    ## Source
    https://github.com/pytorch/pytorch/issues/86590.
    """

    code = "SL706"
    title = "statistics of a frozen module move"
    severity = "warning"
    hears = frozenset(("batch_norm",))

    def __init__(self, model: nn.Module, frozen: frozenset[int]) -> None:
        self._frozen = frozen
        self._told: set[str] = set()
        self._parents = _parents(model)

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where batch normalisation with frozen weights, inside a frozen module, trains in grad mode."""
        module, name = call.tape.running, call.tape.module
        if not isinstance(module, _NormBase) or name in self._told or not updates_statistics(call):
            return
        own = list(module.parameters(recurse=False))
        around = self._parents.get(name, own)
        if not own or not call.grad_mode:
            return
        if not all(id(p) in self._frozen and not p.requires_grad for p in (*own, *around)):
            return
        self._told.add(name)
        yield self.fault(
            f"every parameter of `{name.rpartition('.')[0] or name}` is frozen, and running_mean and running_var of "
            f"`{name}` ({type(module).__name__}) still change",
            where=f"module `{name}`; {at(call.site, 'its forward')}",
            why="requires_grad=False stops gradients, not the statistics, which follow train mode: the frozen features "
            "drift",
            fix=f"keep it in eval mode: call `.eval()` on `{name.rpartition('.')[0] or name}` after model.train()",
            names=(name,),
        )


def _parents(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Module path -> the parameters of the module that it is a part of."""
    modules = dict(model.named_modules())
    return {name: list(modules[name.rpartition(".")[0]].parameters()) for name in modules if "." in name}
