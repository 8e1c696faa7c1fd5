"""Gradient scalers that are used in the wrong order, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Clip, Event, LoopState, ScaleUpdate, Unscale, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


def _scaled(names: frozenset[str], state: LoopState) -> list[str]:
    """Parameters whose `.grad` holds scaled gradients that no step has used."""
    held = {name: state.held[name] for name in names & state.held.keys() if not state.held[name].is_manual}
    return sorted(n for n, h in held.items() if any(b.is_scaled for b in h.passes[h.used :]))


class ClippedWhileScaled(EventCheck):
    """Gradients are clipped while they are still multiplied by the scale of the gradient scaler.

    ## What it does
    Follows which gradients come from a loss that `scaler.scale()` multiplied and that `scaler.unscale_()` has not yet
    divided, and looks for a clip of them. Gradients that the loop divides itself are left out.

    ## Why it is bad
    The limit is compared with gradients that are thousands of times too large. Nearly everything is clipped, the more
    the larger the scale: the effective limit is `max_norm / scale`, and training crawls.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            scaler.scale(loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Fix
    Call `scaler.unscale_(optimizer)` before the clip; `scaler.step()` then leaves the gradients as they are.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/issues/9599; documentation of `torch.amp`, "Gradient clipping".
    """

    code = "SL641"
    title = "clipped before unscale"

    def __init__(self) -> None:
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the first clip of scaled gradients."""
        if self._was_told or not isinstance(event, Clip) or event.limit == float("inf"):
            return
        names = [n for n in _scaled(event.parameters, state) if state.owner_of.get(n) not in state.unscaled]
        if not names:
            return
        self._was_told = True
        owner = state.owner_of.get(names[0], "optimizer")
        yield self.fault(
            f"gradients were clipped to {event.limit:g} while the scaler's factor was still in them: {listed(names)}",
            where=at(event.site, "the clip"),
            why="the limit is compared with gradients that are thousands of times too large: nearly everything is "
            "clipped, the more the larger the scale",
            fix=f"call `scaler.unscale_(...)` with the optimizer (`{owner}`) before the clip; scaler.step() then "
            "leaves them as they are",
            names=names,
        )


class ScaledUpdate(EventCheck):
    """An optimizer steps on gradients that are still multiplied by the scale of the gradient scaler.

    ## What it does
    Follows which gradients come from a loss that `scaler.scale()` multiplied, and looks for a step on them that goes
    neither through `scaler.step()` nor after `scaler.unscale_()`.

    ## Why it is bad
    The learning rate is too large by the scale, 65536 at the start; under Adam it is eps and the weight decay that are
    off. An overflow is not skipped, and makes every weight NaN.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            scaler.scale(loss).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Fix
    Replace `optimizer.step()` by `scaler.step(optimizer)`, then `scaler.update()`.

    ## Source
    https://github.com/harubaru/waifu-diffusion/issues/64.
    """

    code = "SL642"
    title = "step on scaled gradients"

    def __init__(self) -> None:
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the first such step."""
        if self._was_told or not isinstance(event, Update) or event.is_scaled_step or event.owner in state.unscaled:
            return
        names = _scaled(state.owners[event.owner], state)
        if not names:
            return
        self._was_told = True
        yield self.fault(
            f"`{event.owner}` stepped on gradients that are still multiplied by the scaler's factor: {listed(names)}",
            where=at(event.site, f"step of `{event.owner}`"),
            why="the loss was scaled, and the step does not go through the scaler: the learning rate, the weight decay "
            "and eps are off by the scale, and an overflow is not skipped",
            fix=f"replace `{event.owner}.step()` by `scaler.step({event.owner})` and `scaler.update()`",
            names=names,
        )


class ScaleUpdatedTooEarly(EventCheck):
    """The scale is adapted between a backward pass and the unscaling of its gradients.

    ## What it does
    Looks, at each `scaler.step()`, for gradients that were scaled before the last `scaler.update()`, and speaks at the
    first one.

    ## Why it is bad
    When that update changes the scale, the gradients are divided by another factor than they were multiplied by: twice
    as large or half as large a step, at rare moments that nobody connects with it.

    ## Bad
    ```python
    body, head = nn.Linear(4, 4), nn.Linear(4, 1)
    opt_body, opt_head = torch.optim.SGD(body.parameters(), lr=0.01), torch.optim.SGD(head.parameters(), lr=0.01)
    models, optimizers = {"body": body, "head": head}, {"opt_body": opt_body, "opt_head": opt_head}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sl.audit(model=models, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(6):
            opt_body.zero_grad()
            opt_head.zero_grad()
            scaler.scale(F.mse_loss(head(body(torch.randn(8, 4))), torch.randn(8, 1))).backward()
            for optimizer in (opt_head, opt_body):
                scaler.step(optimizer)
                scaler.update()
            audit.step()
    ```
    ## Good
    ```python
    body, head = nn.Linear(4, 4), nn.Linear(4, 1)
    opt_body, opt_head = torch.optim.SGD(body.parameters(), lr=0.01), torch.optim.SGD(head.parameters(), lr=0.01)
    models, optimizers = {"body": body, "head": head}, {"opt_body": opt_body, "opt_head": opt_head}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sl.audit(model=models, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(6):
            opt_body.zero_grad()
            opt_head.zero_grad()
            scaler.scale(F.mse_loss(head(body(torch.randn(8, 4))), torch.randn(8, 1))).backward()
            for optimizer in (opt_head, opt_body):
                scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Fix
    Call `scaler.update()` once an iteration, after the last `scaler.step()`.

    ## Source
    https://github.com/huggingface/accelerate/issues/439; documentation of `torch.amp`, "Working with multiple models,
    losses, and optimizers".
    """

    code = "SL644"
    title = "scale updated too early"

    def __init__(self) -> None:
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Where gradients are unscaled that were scaled before the last update of the scale."""
        if self._was_told or not isinstance(event, (Unscale, Update)) or event.owner in state.unscaled:
            return
        if isinstance(event, Update) and not event.is_scaled_step:
            return
        updates = [i for i, e in enumerate(state.recent) if isinstance(e, ScaleUpdate)]
        if not updates:
            return
        names = []
        for name in _scaled(state.owners[event.owner], state):
            held = state.held[name]
            fresh = [state.recent.index(b) for b in held.passes[held.used :] if b in state.recent]
            if fresh and min(fresh) < updates[-1]:
                names.append(name)
        if not names:
            return
        self._was_told = True
        site = state.recent[updates[-1]].site
        yield self.fault(
            f"scaler.update() ran between the backward pass of {listed(names)} and the step of `{event.owner}`",
            where=f"{at(event.site, 'the step')}; update: {at(site, 'scaler.update()')}",
            why="when that update changed the scale, these gradients are divided by another factor than they were "
            "multiplied by",
            fix="call scaler.update() once an iteration, after the last scaler.step()",
            names=names,
        )
