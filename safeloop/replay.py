"""`safeloop.replay`: runs a bundled step again and says where its NaN or infinity was born, or how it failed."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from safeloop.audit.diagnosis import Diagnosis, diagnose
from safeloop.audit.telling import told
from safeloop.autograd.sites import is_user_code
from safeloop.bundles import Bundle, read_bundle, text_of
from safeloop.bundles.bundle import CONFIG
from safeloop.checks.data.bundles import BundleDoesNotFit, BundleNeedsItsTrainer, BundleWithoutBatch
from safeloop.config import load
from safeloop.data.move import Mover
from safeloop.faults import Fault, FaultError
from safeloop.step.turn import Rerun, Turn
from safeloop.trainer import Trainer, trainer_class


@dataclass(frozen=True)
class Replayed:
    """What a bundled step gave when it was run again."""

    step: int
    faults: tuple[Fault, ...]
    """as the finite check says them, with their origin; empty where nothing was bad this time"""
    note: str
    """in what it differs from the step that was saved; empty where it is bitwise the same"""
    has_failed: bool = False
    """whether the saved step ended in an error before its gradients were looked at"""
    error: str = ""
    """the traceback of the error that it ended in now, where that is no fault"""

    def __str__(self) -> str:
        texts = [*filter(None, [self.error]), *(str(fault) for fault in self.faults)]
        same = "has ended in the same error" if self.has_failed else "with the same values, bit by bit"
        same = f"not as it was: {self.note}" if self.note else same
        return "\n\n".join([*texts, f"step {self.step}, run again {same}"])


def replay(bundle: str | Path, trainer: Trainer | None = None, *, allow_modules: Sequence[str] = ()) -> Replayed:
    """Run the step in a bundle again, under the locator.

    Args:
        bundle: a folder `bundles/step-N` of a run.
        trainer: the run that wrote it, built anew; its weights become those of the bundle. None: it is built from the
            bundled config, whose targets must be allowed.
        allow_modules: further module prefixes that targets may name.

    Raises:
        FaultError: SL861 the bundle is damaged, SL862 its batch could not be saved, SL863 it does not fit the Trainer,
            SL864 it needs one from code; or what the config gets wrong here.
    """
    saved = read_bundle(Path(bundle))
    if saved.window is None:
        raise BundleWithoutBatch.error(
            f"the bundle has no batch: {saved.refused}",
            where=str(saved.path),
            fix="let the data give tensors in dicts, lists or tuples, and run until the step fails again",
        )
    trainer = _built(saved, allow_modules) if trainer is None else trainer
    assembly = trainer._assembled()
    rerun = assembly.program.rerun(saved.phase)
    if rerun is None:
        raise _unfit(saved, f"the Trainer has no phase `{saved.phase}`")
    _load(saved, trainer.model, rerun)
    trainer.step = saved.step
    move = Mover(assembly.device)
    turn = Turn(rerun, [move(batch) for batch in saved.window], saved.random)
    found = diagnose(trainer.model, turn, saved.step, saved.terms)
    if saved.is_failed:
        return _failed(saved, found)
    return Replayed(saved.step, tuple(told(fault, found, saved.step) for fault in found.faults), found.note)


def _failed(saved: Bundle, found: Diagnosis) -> Replayed:
    """Of a step that ended in an error."""
    error = found.error
    if error is None:
        note = f"it ended in no error, and in the run in {saved.fault.splitlines()[0]}"
        return Replayed(saved.step, (), note, has_failed=True)
    if isinstance(error, FaultError):
        trace, faults = "", (error.fault, *error.others)
    else:
        trace, faults = _trace(error), ()
    head, then = (text.partition("\n")[0] for text in (text_of(error), saved.fault))
    note = "" if head == then else f"it ended in {head}, and in the run in {then}"
    return Replayed(saved.step, faults, note, has_failed=True, error=trace)


def _trace(error: Exception) -> str:
    """The traceback of an error, of the user's frames alone; of all frames where there are none."""
    own = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if is_user_code(frame.f_code)]
    if not own:
        return "".join(traceback.format_exception(error)).rstrip()
    parts = [*traceback.StackSummary.extract(iter(own)).format(), *traceback.format_exception_only(error)]
    return "Traceback, of your code:\n" + "".join(parts).rstrip()


def _built(saved: Bundle, allow_modules: Sequence[str]) -> Trainer:
    if saved.needs:
        raise _needs(saved, f"the run was given its {', '.join(saved.needs)} in code, which no config can build")
    given = {"data", "eval_data"}
    loaded = load(saved.path / CONFIG, environment={}, allow_modules=allow_modules, given=given)
    cls = trainer_class(loaded)
    try:
        inspect.signature(cls).bind(loaded, data=saved.window)
    except TypeError:
        raise _needs(saved, f"`{cls.__qualname__}` has a constructor of its own") from None
    return cls(loaded, data=saved.window)


def _load(saved: Bundle, model: nn.Module, rerun: Rerun) -> None:
    """Put the saved weights, buffers, modes and gradient scale into a model."""
    own: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    if strangers := sorted(own.keys() ^ saved.weights.keys()):
        raise _unfit(saved, f"{len(strangers)} parameters or buffers are in one of the two only: `{strangers[0]}`")
    for name, value in saved.weights.items():
        if own[name].shape != value.shape or own[name].dtype != value.dtype:
            here, there = (f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (own[name], value))
            raise _unfit(saved, f"`{name}` is {here} in the model and {there} in the bundle")
    with torch.no_grad():
        for name, value in saved.weights.items():
            own[name].copy_(value)
    for name, module in model.named_modules():
        module.training = name not in saved.eval_modules
    if rerun.scale is not None and saved.scale is not None:
        rerun.scale.value.fill_(saved.scale)


def _unfit(saved: Bundle, what: str) -> Exception:
    return BundleDoesNotFit.error(
        what, where=str(saved.path), fix="replay it with the code and the model of the run that wrote it"
    )


def _needs(saved: Bundle, what: str) -> Exception:
    return BundleNeedsItsTrainer.error(
        what,
        where=str(saved.path),
        fix=f'build that Trainer in Python and call `safeloop.replay("{saved.path}", trainer)`',
    )
