"""Half precision without its gradient scaler: losses that it did not scale, and no scaler at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import torch

from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Unscale, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class LossNotScaled(EventCheck):
    """A gradient scaler unscales gradients of a loss that it has not scaled.

    ## What it does
    Looks, where a scaler unscales the gradients of an optimizer, for backward passes since the step before whose loss
    did not go through `scaler.scale`. What is added after `unscale_` is left out.

    ## Why it is bad
    `scaler.step` divides every gradient by the scale, 65536 at first. The loss that was not multiplied by it counts
    that much less than meant: it does not train, and nothing says so.

    ## Bad
    ```python
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            out = model(torch.randn(8, 4))
            optimizer.zero_grad()
            scaler.scale(out[:, 0].square().mean()).backward(retain_graph=True)
            out[:, 1].square().mean().backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            out = model(torch.randn(8, 4))
            optimizer.zero_grad()
            scaler.scale(out[:, 0].square().mean() + out[:, 1].square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Fix
    Scale every loss: `scaler.scale(loss).backward()`.

    ## Source
    Documentation of `torch.amp`, "Working with multiple losses".
    """

    code = "SL653"
    title = "loss not scaled"

    def __init__(self) -> None:
        self._times = 0

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second unscaling that finds such gradients."""
        if not isinstance(event, Unscale) or event.owner in state.unscaled or not state.is_known:
            return  # a scaler that is switched off unscales nothing
        held = {n: state.held[n] for n in sorted(state.owners[event.owner] & state.held.keys())}
        plain = {n: [b for b in h.passes[h.used :] if not b.is_scaled] for n, h in held.items() if not h.is_manual}
        names = [name for name, passes in plain.items() if passes]
        if not names:
            return
        self._times += 1
        if self._times == 2:
            last = plain[names[0]][-1]
            yield self.fault(
                "a loss was differentiated without `scaler.scale`, and the scaler divides its gradients by the scale "
                f"all the same: {listed(names)}",
                where=f"{at(last.site, 'a backward pass')}; unscaled by {at(event.site, 'scaler.step()')}",
                why="what was not multiplied by the scale counts that many times less than meant, 65536 times at first",
                fix="scale every loss: `scaler.scale(loss).backward()`",
                names=names,
            )


class HalfWithoutScaler(EventCheck, CallCheck):
    """A model trains in float16 and no gradient scaler scales its loss.

    ## What it does
    Listens for layers whose result is float16 and has a gradient path. Speaks at the fifth step of an optimizer on
    backward passes that nobody has scaled: neither a scaler, nor the loop by a factor of its own. bfloat16 needs none.

    ## Why it is bad
    Below 6e-8 a float16 number is zero, and below 6e-5 it loses digits. Gradients of activations are often that small:
    they become zeros, at first in the early layers, and these stop learning. Nothing is reported.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(torch.randn(8, 4))
            out.float().square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(torch.randn(8, 4))
            scaler.scale(out.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Fix
    Use `torch.amp.GradScaler`, or `torch.bfloat16` where the device has it.

    ## Source
    Documentation of `torch.amp`, "Gradient Scaling".
    """

    code = "SL656"
    title = "float16 without a gradient scaler"
    severity = "warning"
    hears: ClassVar[frozenset[str]] = frozenset(
        ("linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "bmm", "addmm", "scaled_dot_product_attention")
    )

    def __init__(self) -> None:
        self._site: Site | None = None
        self._is_half = False
        self._is_scaled = False
        self._times: Counter[str] = Counter()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Notes the first layer that trains in float16."""
        out = call.out
        if not self._is_half and isinstance(out, torch.Tensor) and out.dtype == torch.float16 and out.requires_grad:
            self._is_half, self._site = True, call.site
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the fifth step without any scaling."""
        if isinstance(event, Backward):
            by_hand = event.factor is not None and not event.factor <= 1
            self._is_scaled |= event.is_scaled or by_hand
        if not isinstance(event, Update) or not event.is_deep or not self._is_half:
            return
        if self._is_scaled or event.owner in state.unscaled or event.absent == state.owners[event.owner]:
            return
        self._times[event.owner] += 1
        if self._times[event.owner] == 5:
            yield self.fault(
                f"`{event.owner}` trains through float16, and no GradScaler scales the loss",
                where=f"float16 at {at(self._site, 'a layer')}; stepped at {at(event.site, 'step()')}",
                why="gradients below 6e-8 underflow to zero in float16, and small ones lose their digits",
                fix="scale the loss by `torch.amp.GradScaler`, or use `torch.bfloat16`",
                names=(event.owner,),
            )
