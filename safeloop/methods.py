"""The loss functions of a Trainer as phases: one of its own, `@phase` methods, or what a config declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeloop.checks.config.keys import MissingKey, UnknownKey
from safeloop.checks.source import where_defined
from safeloop.ingredients import PhaseMethod
from safeloop.phases import PhaseMark, phases_of

if TYPE_CHECKING:
    from safeloop.config import Loaded
    from safeloop.config.run import PhaseSection
    from safeloop.declared import Declared
    from safeloop.trainer import Trainer


def phase_methods(trainer: Trainer, declared: Declared | None, *, is_single: bool) -> list[PhaseMethod]:
    """The phases of a run, in order.

    Args:
        trainer: whose methods are called.
        declared: the losses of a config-only run; None where the Trainer computes them.
        is_single: whether the Trainer defines `loss`, a single term.

    Raises:
        ConfigError: SL101 or SL102, the `phases:` section does not fit.
    """
    config, marks = trainer.config, phases_of(type(trainer))
    if declared is not None and config.phases:
        return [_declared_phase(trainer.loaded, declared, name, section) for name, section in config.phases.items()]
    for name in config.phases:
        if name not in marks:
            there = f"its phases are {', '.join(marks)}" if marks else "it has none: mark methods with `@sl.phase`"
            raise trainer.loaded.error(
                UnknownKey, f"phases.{name}", f"{type(trainer).__name__} has no phase `{name}`", fix=there
            )
    if marks:
        return [_marked_phase(trainer, name, mark) for name, mark in marks.items()]
    source = where_defined(type(trainer).loss if is_single else type(trainer).losses)
    terms = ["loss"] if is_single else [*config.losses, *config.penalties]
    return [PhaseMethod("train", trainer.losses, source, terms, not is_single and declared is None)]


def _marked_phase(trainer: Trainer, name: str, mark: PhaseMark) -> PhaseMethod:
    section = trainer.config.phases.get(name)
    return PhaseMethod(
        name,
        trainer._entering(name),
        where_defined(getattr(type(trainer), name)),
        terms=(),
        is_open=True,
        trains=(section and section.trains) or mark.trains,
        repeat=(section and section.repeat) or mark.repeat,
        every=(section and section.every) or mark.every,
    )


def _declared_phase(loaded: Loaded, declared: Declared, name: str, section: PhaseSection) -> PhaseMethod:
    for key in ("losses", "trains"):
        if getattr(section, key) is None:
            raise loaded.error(
                MissingKey, f"phases.{name}", f"phase `{name}` does not say its `{key}`", fix=f"add `{key}: [...]`"
            )
    names, known = section.losses or (), [*declared.functions, *declared.penalties]
    if strangers := [loss for loss in names if loss not in known]:
        raise loaded.error(
            UnknownKey,
            f"phases.{name}.losses",
            f"phase `{name}` computes `{strangers[0]}`, which is no loss with a `type` or `target`",
            fix=f"the losses are {', '.join(known)}",
        )
    return PhaseMethod(
        name,
        declared.only(names),
        loaded.where(f"phases.{name}"),
        terms=names,
        is_open=False,
        trains=section.trains,
        repeat=section.repeat or 1,
        every=section.every or 1,
    )
