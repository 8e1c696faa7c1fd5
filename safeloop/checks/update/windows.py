"""Micro-batches of one accumulation window that do not count as they should."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Update
from safeloop.checks.source import at
from safeloop.faults import Fault

_UNEVEN = 1.5
"""Micro-batches whose sizes differ by less than this factor are not worth a word."""


def window_of(owner: str, state: LoopState) -> list[Backward]:
    """The backward passes that a step would use now, oldest first."""
    held = [state.held[name] for name in state.owners[owner] & state.held.keys()]
    if any(h.is_manual for h in held):
        return []
    passes = {b.number: b for h in held for b in h.passes[h.used :]}
    return [passes[number] for number in sorted(passes)]


def is_tail(left: Sequence[Backward], full: Sequence[Backward]) -> bool:
    """Whether micro-batches that are left are the beginning of another window like `full`."""
    return 0 < len(left) < len(full) and len({p.site for p in (*full, *left)}) == 1


class UnevenMicroBatches(EventCheck):
    """Micro-batches with different numbers of values are averaged as if they were of one size.

    ## What it does
    Notes over how many targets each `cross_entropy` or `nll_loss` takes its mean (those with `ignore_index` do not
    count), and compares the micro-batches of a step that all come from one line with one weight. Speaks at the second
    step in a row in which these numbers differ by half or more.

    ## Why it is bad
    A mean of means gives a token of a short micro-batch more weight than one of a long one. The gradient is not that of
    the whole batch, and depends on how the samples fell into micro-batches.

    ## Bad
    ```python
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            for length in (3, 20, 5, 12):
                text = torch.randint(0, 8, (length,))
                (F.cross_entropy(model(text[:-1]), text[1:]) / 4).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            for length in (3, 20, 5, 12):
                text = torch.randint(0, 8, (length,))
                (F.cross_entropy(model(text[:-1]), text[1:], reduction="sum") / 36).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Sum the loss (`reduction="sum"`) and divide by the number of targets of the whole window. In a Trainer
    `accumulate.weight_by: tokens` does it.

    ## Source
    https://github.com/huggingface/transformers/pull/34191; https://github.com/huggingface/transformers/issues/37766.
    """

    code = "SL649"
    title = "uneven micro-batches weighted equally"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second window in a row of means over numbers of values that differ by half or more."""
        if not isinstance(event, Update) or event.has_closure or not state.is_known:
            return
        passes = window_of(event.owner, state)
        counts = _counts(passes)
        if counts is None or max(counts) < _UNEVEN * min(counts):
            self._times[event.owner] = 0  # the last, shorter micro-batch of an epoch is not worth a word
            return
        self._times[event.owner] += 1
        if self._times[event.owner] != 2:
            return
        yield self.fault(
            f"the {len(passes)} micro-batches of one step average their loss over {', '.join(map(str, counts))} "
            "tokens or samples, and count the same",
            where=at(passes[-1].site, f"step of `{event.owner}`"),
            why="a mean of means gives a token of a short micro-batch more weight than one of a long one; the "
            "gradient is not that of the whole batch",
            fix='sum the loss (`reduction="sum"`) and divide by the number of tokens of the whole window; in a Trainer '
            "`accumulate.weight_by: tokens` does it",
            names=(event.owner,),
        )


def _counts(passes: Sequence[Backward]) -> list[int] | None:
    """The number of values that each micro-batch averaged over, where all did it on one line with one weight."""
    if len(passes) < 2 or len({p.site for p in passes}) > 1:
        return None
    if any(len(p.counts) != 1 or (p.factor is not None and math.isnan(p.factor)) for p in passes):
        return None
    if len({p.factor for p in passes}) > 1 or len({p.counts[0][0] for p in passes}) > 1:
        return None
    return [p.counts[0][1] for p in passes]


class TailWindow(EventCheck):
    """The last, shorter accumulation window is divided by the length of a full one.

    ## What it does
    Notes the number that each loss is divided by, and how many micro-batches a step uses. Speaks at the first step with
    fewer than that number, after one with exactly as many, if all come from one line and reach the same parameters. A
    half is often a mere weight: there it must have been two passes three times in a row.

    ## Why it is bad
    The last window of an epoch is shorter. Its gradient comes out too small by the missing share: with 1 of 8
    micro-batches it is an eighth, and those samples hardly count.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(6)]
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i, (x, y) in enumerate(batches):
            (F.mse_loss(model(x), y) / 4).backward()
            if i % 4 == 3 or i == len(batches) - 1:
                optimizer.step()
                optimizer.zero_grad()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(6)]
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i, (x, y) in enumerate(batches):
            first = i - i % 4
            (F.mse_loss(model(x), y) / min(4, len(batches) - first)).backward()
            if i % 4 == 3 or i == len(batches) - 1:
                optimizer.step()
                optimizer.zero_grad()
            audit.step()
    ```
    ## Fix
    Divide by the number of micro-batches that the window really has.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/issues/19987; https://github.com/timoschick/pet/issues/36.
    """

    code = "SL652"
    title = "short window divided by the full length"
    severity = "warning"

    def __init__(self) -> None:
        self._full: dict[str, tuple[int, frozenset[str]]] = {}
        self._times: Counter[str] = Counter()
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the first window that has fewer micro-batches than the number that each loss is divided by."""
        if self._was_told or not isinstance(event, Update) or event.has_closure or not state.is_known:
            return
        passes = window_of(event.owner, state)
        if not passes or len({p.factor for p in passes}) > 1 or len({p.site for p in passes}) > 1:
            return
        factor = passes[0].factor
        if factor is None or not 0 < factor <= 0.5:
            return
        length, reached = round(1 / factor), {p.reached for p in passes}
        kind = (length, next(iter(reached)))
        if len(reached) > 1 or abs(factor * length - 1) > 1e-9 or self._full.get(event.owner, kind) != kind:
            return
        if len(passes) == length:
            self._full[event.owner] = kind
            self._times[event.owner] += 1
            return
        times = self._times.pop(event.owner, 0)
        if len(passes) >= 2 * length or times < (1 if length > 2 else 3):
            return
        self._was_told = True
        ratio = length / len(passes)
        is_short = ratio > 1
        yield self.fault(
            f"this step of `{event.owner}` has {len(passes)} micro-batches, and each loss is divided by {length}",
            where=f"{at(event.site, 'the step')}; the loss: {at(passes[-1].site, 'unknown')}",
            why=f"the last window of an epoch is shorter: its gradient comes out {ratio:.3g} times too small"
            if is_short
            else "the micro-batches that an epoch had left were neither stepped on nor zeroed: they count in the first "
            f"window of the next epoch, whose gradient comes out {1 / ratio:.3g} times too large",
            fix="divide by the number of micro-batches that the window really has"
            if is_short
            else "step on the last, shorter window of an epoch too, divided by its own length",
            names=(event.owner,),
        )
