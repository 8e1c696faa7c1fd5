"""Parameters that are frozen while the loop runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from safeloop.autograd.sites import Site, is_user_code
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Update, Zero
from safeloop.checks.source import Place, at
from safeloop.checks.update.steps import moves_without_gradient
from safeloop.checks.wording import agree, listed
from safeloop.faults import Fault


class FrozenButMoving(EventCheck):
    """A parameter is frozen, and its optimizer goes on moving it.

    ## What it does
    Looks, at each step, for parameters with `requires_grad=False` whose `.grad` is still there. Speaks at the third
    step that moves them: with the very gradient of the step before, or with zeros that momentum or weight decay act on.

    ## Why it is bad
    `requires_grad_(False)` stops new gradients. The last one stays in `.grad`, or zeros do after
    `zero_grad(set_to_none=False)`, and an optimizer moves every parameter that has a gradient: what was meant to stand
    still drifts.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(10):
            model[0].requires_grad_(i < 2 or i > 7)
            optimizer.zero_grad(set_to_none=False)
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(10):
            model[0].requires_grad_(i < 2 or i > 7)
            optimizer.zero_grad()  # sets them to None
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Set their `.grad` to None when you freeze them, or take them out of the optimizer.

    ## Source
    https://github.com/pytorch/pytorch/issues/1266; documentation of `torch.optim.Optimizer.zero_grad`.
    """

    code = "SL651"
    title = "frozen but moving"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._seen: dict[str, tuple[int, int]] = {}
        self._trained: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step that moves a parameter which does not require grad."""
        if not isinstance(event, Update) or event.was_skipped or event.has_closure:
            return
        self._trained |= state.owners[event.owner] - event.absent - event.frozen
        names = sorted(self._moved(event, state)) if event.frozen_with_gradient else []
        if not names:
            return
        self._times[event.owner] += 1
        if self._times[event.owner] == 3:
            yield self.fault(
                f"{listed(names)} {agree(len(names), 'does', 'do')} not require grad, with a gradient still there: "
                f"every step of `{event.owner}` moves {agree(len(names), 'it', 'them')}",
                where=at(event.site, f"step of `{event.owner}`"),
                why="`requires_grad_(False)` stops new gradients; the last one stays in `.grad`, and momentum and "
                "weight decay act on it",
                fix="set their `.grad` to None when you freeze them, or take them out of the optimizer",
                names=names,
            )

    def _moved(self, event: Update, state: LoopState) -> Iterator[str]:
        movers = moves_without_gradient(state.optimizers[event.owner], self._trained, state.name_of)
        parameters = {
            state.name_of.get(id(p)): p for g in state.optimizers[event.owner].param_groups for p in g["params"]
        }
        for name in event.frozen_with_gradient:
            gradient = parameters[name].grad
            if name in event.zero:
                if name in movers:
                    yield name
                continue
            seen = (id(gradient), gradient._version)
            if self._seen.get(name) == seen:
                yield name
            self._seen[name] = seen


_WARM = 10
"""Steps of training after which a freeze is taken for the end of a warm-up."""


_PASSING = frozenset(
    ("save", "export", "dump", "checkpoint", "evaluate", "eval", "validate", "predict", "infer", "generate")
)
"""First words of functions that have no business with what is trained"""


class FrozenDuringTraining(CallCheck, EventCheck):
    """Parameters that were trained are frozen in the middle, and stay frozen.

    ## What it does
    Notes which parameters had gradients in some steps and do not require grad in later ones. Speaks when the watch ends
    with parameters that were frozen for the last 3 steps or more, and never restored before: an alternation is well.
    Who sets the gradients of just these to None has frozen them on purpose, and is left alone.
    Parameters that had trained for 10 steps or more were frozen for good by plan, a warm-up that is over: no fault,
    unless it was seen that a function did it which saves or evaluates by its name, or that one which had frozen them
    for a backward pass then set again what it had noted too late.

    ## Why it is bad
    Something set `requires_grad` to False during training, a probe or a phase of alternating training, and did not
    restore it: that part of the model has stopped learning, while the loss still falls.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            if i == 3:
                model[0].requires_grad_(False)  # for a probe of the head
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            model[0].requires_grad_(i not in (3, 4))
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Restore `requires_grad_(True)` after the phase, in `finally`. Where they are frozen on purpose, accept this warning:
    `sl.audit(..., accept={"SL650": ["backbone.*"]})`.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/pull/5574.
    """

    code = "SL650"
    title = "frozen during training"
    severity = "warning"
    hears = frozenset(("requires_grad_", ".requires_grad="))

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._since: Counter[str] = Counter()
        self._first: dict[str, int] = {}
        self._trained: Counter[str] = Counter()
        self._warm: set[str] = set()
        self._alternates: set[str] = set()
        self._were_frozen: set[str] = set()
        self._meant: set[str] = set()
        self._passes = 0
        self._frozen_at: dict[str, tuple[Site | None, int]] = {}
        """the line that has frozen a parameter last, and the backward passes until then"""
        self._slips: dict[str, Site | None] = {}
        """parameters that nobody has frozen by plan, and the line that has"""
        self._restored: set[str] = set()
        """those of them that somebody meant to restore"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note who freezes a parameter."""
        name = self._names.get(id(call.args[0])) if call.args else None
        if name is None:
            return iter(())
        if call.args[0].requires_grad:
            self._frozen_at.pop(name, None)
            self._slips.pop(name, None)
            return iter(())
        site, passes = self._frozen_at.get(name, (None, -1))
        if passes < 0:
            if _is_in_passing(call):
                self._slips[name] = call.site
        elif passes < self._passes and _restores(site, call.site):
            self._slips[name] = call.site
            self._restored.add(name)
        if passes < 0 or call.site == site:
            self._frozen_at[name] = call.site, self._passes
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Only notes."""
        if isinstance(event, Update):
            self._trained.update(state.owners[event.owner] - event.absent - event.frozen - self._warm)
            if len(self._warm) < len(self._trained):
                self._warm = {name for name, times in self._trained.items() if times >= _WARM}
            for name in event.frozen & self._trained.keys():
                self._since[name] += 1
                self._first.setdefault(name, event.iteration)
            thawed = (state.owners[event.owner] - event.frozen) & self._were_frozen
            self._alternates |= thawed
            for name in thawed & self._since.keys():
                del self._since[name]
            self._were_frozen |= event.frozen
        elif isinstance(event, Backward):
            self._passes += 1
            self._alternates |= event.reached & self._since.keys()  # frozen for the step alone
        elif isinstance(event, Zero) and event.parameters <= set(self._trained):
            # who clears the gradients of what is frozen knows that it stays so
            self._meant |= event.parameters if not _trainable(event.parameters, state) else set()
        return iter(())

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends with parameters that were frozen for at least 3 steps."""
        well = self._alternates | (self._meant - self._restored) | (self._warm - self._slips.keys())
        names = sorted(name for name, times in self._since.items() if times >= 3 and name not in well)
        if not names:
            return
        yield self.fault(
            f"{listed(names)} {agree(len(names), 'was', 'were')} trained until iteration {self._first[names[0]]}, then "
            "frozen, and never trained again",
            where=", ".join(filter(None, (at(self._slips.get(names[0]), ""), f"iteration {self._first[names[0]]}"))),
            why="something set `requires_grad` to False during training (a probe, an alternating phase) and did not "
            "restore it",
            fix="restore `requires_grad_(True)` after the phase, in `finally`; accept this warning where they are "
            "frozen on purpose",
            names=names,
        )


def _is_in_passing(call: Call) -> bool:
    """Whether a function that saves or evaluates freezes, and none that says that it does."""
    frame, found = call.frame, False
    while frame is not None and not found:
        name = frame.f_code.co_name.lower()
        if "free" in name or "froz" in name:
            return False
        found = name.strip("_").partition("_")[0] in _PASSING and is_user_code(frame.f_code)
        frame = frame.f_back
    return found


def _restores(first: Site | None, again: Site | None) -> bool:
    """Whether a function sets `requires_grad` at two lines, the second time to what it has kept."""
    if first is None or again is None or first == again or (first.path, first.name) != (again.path, again.name):
        return False
    return "False" not in Place(*again).text


def _trainable(names: frozenset[str], state: LoopState) -> bool:
    groups = (group for optimizer in state.optimizers.values() for group in optimizer.param_groups)
    return any(p.requires_grad for group in groups for p in group["params"] if state.name_of.get(id(p)) in names)
