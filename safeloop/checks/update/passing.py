"""Backward passes that a step uses, and whom they were for."""

from __future__ import annotations

from collections.abc import Sequence

from safeloop.checks.events import Backward, LoopState, Update, Zero


def comes_through(passed: Backward, mine: frozenset[str], theirs: frozenset[str]) -> bool:
    """Whether a loss goes through all of one owner's parameters before it comes to some of the other's."""
    near = [low for name, (low, _) in passed.used_at.items() if name in mine]
    far = [high for name, (_, high) in passed.used_at.items() if name in theirs]
    return bool(near and far) and min(near) > min(far)


def between(passes: list[Backward], owner: str, state: LoopState) -> Update | None:
    """The step of another owner between two passes that begin on different lines, the first of which was for it."""
    if len(passes) < 2 or len({p.site for p in passes}) < 2:
        return None
    numbers = {id(e): i for i, e in enumerate(state.recent)}
    if id(passes[0]) not in numbers or id(passes[-1]) not in numbers:
        return None
    last = numbers[id(passes[-1])]
    after = {e.owner for e in state.recent[last + 1 :] if isinstance(e, Update)}
    for event in state.recent[numbers[id(passes[0])] + 1 : last]:
        if not isinstance(event, Update) or event.owner == owner or event.owner in after:
            continue
        theirs = state.owners[event.owner]
        if not passes[0].reached & theirs:
            continue
        if passes[-1].reached & theirs or comes_through(passes[0], state.owners[owner], theirs):
            return event
    return None


def remedy(first: Backward, owner: str, other: str, state: LoopState) -> str:
    """What to write: a loss that must go through the one to train the other is not to be detached."""
    zero = f"call `zero_grad()` of `{owner}` right before its own backward pass"
    if comes_through(first, state.owners[owner], state.owners[other]):
        return f"{zero}, after that of `{other}`"
    return f"detach what `{owner}` made before it enters the loss of `{other}`, or {zero}"


def prepared_for(passes: Sequence[Backward], owner: str, state: LoopState) -> str | None:
    """The other owner that the last of two passes was for: only its gradients were zeroed right before that pass.

    The first pass was for `owner`, whose own were zeroed right before it, and does not reach the other; the last one
    comes through `owner` to it. Two losses that train the same parts together are prepared for together.
    """
    if len(passes) < 2 or len({p.site for p in passes}) < 2:
        return None
    first, last = passes[0], passes[-1]
    places = {id(event): i for i, event in enumerate(state.recent)}
    if id(first) not in places or id(last) not in places:
        return None
    mine = state.owners[owner]
    before = _zeroed_last(state, places[id(first)])
    after = _zeroed_last(state, places[id(last)])
    for other, theirs in state.owners.items():
        is_theirs = bool(after & theirs) and not after & mine and not before & theirs
        is_mine = bool(before & mine) and not first.reached & theirs
        if other != owner and is_theirs and is_mine and comes_through(last, mine, theirs):
            return other
    return None


def _zeroed_last(state: LoopState, place: int) -> frozenset[str]:
    """What was zeroed since the pass or the step before a pass."""
    names: frozenset[str] = frozenset()
    for event in reversed(state.recent[:place]):
        if isinstance(event, (Backward, Update)):
            break
        if isinstance(event, Zero):
            names |= event.parameters
    return names
