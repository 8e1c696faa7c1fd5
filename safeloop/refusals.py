"""What only the whole of a run shows to be wrong: phases, closures, epochs that never end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from safeloop.checks.config.training import ScheduleNeverMoves
from safeloop.checks.setup.watch import WatchRefused
from safeloop.checks.update.balance import NothingToBalance
from safeloop.checks.update.closure import ClosureRefused, ObjectiveNotFixed
from safeloop.checks.update.phases import OptimizerNeverTrained, PhaseTrainsNoOptimizer
from safeloop.checks.wording import suggestion
from safeloop.faults import Fault
from safeloop.ingredients import Ingredients, PhaseMethod
from safeloop.optim.owner import Owner

_RESTLESS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def closure_faults(given: Ingredients, owners: Mapping[str, Owner]) -> list[Fault]:
    """What is wrong around optimizers that need a closure."""
    faults = []
    for name in [name for name, owner in owners.items() if owner.needs_closure]:
        where = given.loaded.where(f"optimizers.{name}") or f"optimizers.{name}"
        phases = [phase for phase in given.phases if phase.trains is None or name in phase.trains]
        reasons = [
            (
                len(phase.trains or owners) > 1,
                f"phase `{phase.name}` trains other optimizers beside it",
                "give it a phase of its own",
            )
            for phase in phases
        ]
        reasons += [(phase.repeat > 1, f"phase `{phase.name}` repeats", "set its `repeat` to 1") for phase in phases]
        reasons.append((given.config.combine is not None, "the gradients of its terms are combined", "drop `combine`"))
        reasons.append((owners[name].clipping is not None, "its gradients are clipped", "take the clipping out"))
        reasons.append(
            (given.config.run.precision == "fp16", "the run is in fp16", "use `run.precision: bf16` or fp32")
        )
        for is_so, what, fix in reasons:
            if is_so:
                faults.append(
                    ClosureRefused.fault(f"`{name}` is LBFGS, and {what}", where=where, fix=fix, names=[name])
                )
        restless = [n for n, m in given.model.named_modules() if m.training and isinstance(m, _RESTLESS)]
        if restless:
            faults.append(
                ObjectiveNotFixed.fault(
                    f"`{name}` is LBFGS, and its loss changes between evaluations: {', '.join(restless[:6])}",
                    where=where,
                    fix="take them out, put them into eval mode, or train with another optimizer",
                    names=restless,
                )
            )
    return faults


def untrained(phases: Sequence[PhaseMethod], owners: Sequence[str]) -> list[Fault]:
    """Phases that train what is no optimizer, and optimizers that no phase trains."""
    faults = []
    for phase in phases:
        if strangers := [name for name in phase.trains or () if name not in owners]:
            near = get_close_matches(strangers[0], owners, 1)
            faults.append(
                PhaseTrainsNoOptimizer.fault(
                    f"phase `{phase.name}` trains `{strangers[0]}`; the optimizers are {', '.join(owners)}",
                    where=phase.source,
                    fix=(f"did you mean `{near[0]}`? " if near else "")
                    + "name optimizers of the `optimizers:` section",
                    names=strangers,
                )
            )
    trained = {name for phase in phases for name in (owners if phase.trains is None else phase.trains)}
    if idle := [name for name in owners if name not in trained]:
        faults.append(
            OptimizerNeverTrained.fault(
                f"no phase trains `{idle[0]}`",
                where=f"optimizers.{idle[0]}",
                why="its parameters would keep their initial values for ever",
                fix=f"add `{idle[0]}` to the `trains` of a phase, or list its parameters under `frozen:`",
                names=idle,
            )
        )
    return faults


def refuse_epochs(given: Ingredients, owners: Mapping[str, Owner]) -> None:
    """Raise SL122 where a schedule moves by epochs and the data has one only."""
    by_epoch = [name for name, owner in owners.items() if owner.pace == "epoch"]
    if by_epoch and given.data.is_one_shot:
        raise given.loaded.error(
            ScheduleNeverMoves,
            f"optimizers.{by_epoch[0]}.scheduler.per",
            "the schedule moves after each epoch, and the data can be read only once",
            fix="set `per: step`, or pass a list, a Dataset or a DataLoader, which can be read again",
        )


def watched_modules(given: Ingredients) -> dict[str, nn.Module]:
    """The modules of `log.watch`, by name.

    Raises:
        ConfigError: SL447, a pattern matches no module, or the model is compiled.
    """
    patterns, modules = given.config.log.watch, dict(given.model.named_modules())
    if patterns and given.config.run.compile_backend is not None:
        raise given.loaded.error(
            WatchRefused,
            "log.watch",
            "`log.watch` beside `run.compile`: a compiled model has no outputs of modules inside",
            fix="take one of the two out, or call `self.watch(name, tensor)` in the loss function",
        )
    names = [name for name in modules if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise given.loaded.error(
                WatchRefused,
                "log.watch",
                f"`{pattern}` matches none of {len(names)} modules",
                fix=f"name modules as `model.named_modules()` does: {', '.join(names[:6])}"
                + suggestion(pattern, names),
            )
    return {name: modules[name] for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def refuse_balance(given: Ingredients) -> None:
    """Raise SL626 where `balance` stands beside what it cannot measure."""
    config = given.config
    if config.balance is None:
        return
    is_cut = config.balance.at == "cut"
    beside = [
        (given.custom is not None, "a `custom_step`", "take `balance` out"),
        (is_cut and config.combine is not None, "`combine`, with `at: cut`", "set `balance.at: parameters`"),
        (is_cut and config.simultaneous, "`simultaneous`, with `at: cut`", "set `balance.at: parameters`"),
    ]
    for is_so, what, fix in beside:
        if is_so:
            raise given.loaded.error(NothingToBalance, "balance", f"`balance` beside {what}", fix=fix)
