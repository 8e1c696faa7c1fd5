"""Gradients that reach an optimizer from a loss that was not meant for it, or twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, GradientUse, LoopState, Update, Zero
from safeloop.checks.source import at
from safeloop.checks.update.passing import between, prepared_for, remedy
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class GradientsMixed(EventCheck):
    """An optimizer steps on gradients of a loss that another optimizer has already stepped for.

    ## What it does
    Looks at the backward passes that a step uses: whether another optimizer was stepped between the first and the last
    of them, for the first one. Speaks at the second such step, if the first loss came through these parameters on its
    way to the other's, or the last loss reaches the other's too. A warning where nothing was stepped between them, but
    each pass followed the `zero_grad()` of one optimizer only, and the second comes through the first one's parameters.
    An encoder that gathers the gradients of several heads, each with an optimizer of its own, is well.

    ## Why it is bad
    The loss that trains one network leaves its gradients in another one on its way. When that one is stepped next, it
    goes a step towards the loss of its opponent: a discriminator learns to be fooled.

    ## Bad
    ```python
    gen, disc = nn.Linear(2, 4), nn.Linear(4, 1)
    opt_g, opt_d = torch.optim.SGD(gen.parameters(), lr=0.01), torch.optim.SGD(disc.parameters(), lr=0.01)
    models, optimizers = {"gen": gen, "disc": disc}, {"opt_g": opt_g, "opt_d": opt_d}
    with sl.audit(model=models, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(6):
            opt_g.zero_grad()
            opt_d.zero_grad()
            F.softplus(-disc(gen(torch.randn(8, 2)))).mean().backward()
            opt_g.step()
            fake = gen(torch.randn(8, 2)).detach()
            (F.softplus(-disc(torch.randn(8, 4))) + F.softplus(disc(fake))).mean().backward()
            opt_d.step()
            audit.step()
    ```
    ## Good
    ```python
    gen, disc = nn.Linear(2, 4), nn.Linear(4, 1)
    opt_g, opt_d = torch.optim.SGD(gen.parameters(), lr=0.01), torch.optim.SGD(disc.parameters(), lr=0.01)
    models, optimizers = {"gen": gen, "disc": disc}, {"opt_g": opt_g, "opt_d": opt_d}
    with sl.audit(model=models, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(6):
            opt_g.zero_grad()
            F.softplus(-disc(gen(torch.randn(8, 2)))).mean().backward()
            opt_g.step()
            opt_d.zero_grad()  # also what the generator's loss has left
            fake = gen(torch.randn(8, 2)).detach()
            (F.softplus(-disc(torch.randn(8, 4))) + F.softplus(disc(fake))).mean().backward()
            opt_d.step()
            audit.step()
    ```
    ## Fix
    Detach what one network made before it enters the loss of the other, and call `zero_grad()` of each optimizer right
    before its own backward pass.

    ## Source
    https://github.com/FoundationVision/OmniTokenizer/issues/15; https://github.com/deepspeedai/DeepSpeed/issues/399.
    """

    code = "SL633"
    title = "gradients of two losses mixed"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._prepared: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second step of an owner on passes between which another owner was stepped."""
        if not isinstance(event, Update) or event.has_closure or not state.is_known or len(state.owners) < 2:
            return
        owned = state.owners[event.owner] & state.held.keys()
        fresh = {n: state.held[n].passes[state.held[n].used :] for n in sorted(owned) if not state.held[n].is_manual}
        mixed = {name: passes for name, passes in fresh.items() if between(passes, event.owner, state)}
        if not mixed:
            yield from self._see_prepared(event, fresh, state)
            return
        self._times[event.owner] += 1
        if self._times[event.owner] != 2:
            return
        passes = next(iter(mixed.values()))
        other = between(passes, event.owner, state)
        assert other is not None
        yield self.fault(
            f"`{event.owner}` steps on gradients of two losses, and `{other.owner}` was stepped between them: "
            f"{listed(mixed)}",
            where=f"{at(event.site, 'its step')}; the first backward pass: {at(passes[0].site, 'unknown')}; the last: "
            f"{at(passes[-1].site, 'unknown')}",
            why=f"the loss that `{other.owner}` is trained by also reaches `{event.owner}`: what it left in `.grad` is "
            "applied together with the loss that was meant",
            fix=remedy(passes[0], event.owner, other.owner, state),
            names=tuple(mixed),
        )

    def _see_prepared(self, event: Update, fresh: dict[str, list[Backward]], state: LoopState) -> Iterator[Fault]:
        found = {name: other for name, p in fresh.items() if (other := prepared_for(p, event.owner, state))}
        self._prepared[event.owner] += bool(found)
        if not found or self._prepared[event.owner] != 2:
            return
        name, other = next(iter(found.items()))
        passes = fresh[name]
        yield self.fault(
            f"`{event.owner}` steps on gradients of two losses, the second of which was for `{other}`: {listed(found)}",
            where=f"{at(event.site, 'its step')}; the first backward pass: {at(passes[0].site, 'unknown')}; the last: "
            f"{at(passes[-1].site, 'unknown')}",
            why=f"the loss that `{other}` is trained by comes through `{event.owner}`: what it leaves in `.grad` there "
            "is applied together with the loss that was meant",
            fix=f"step `{event.owner}` before the second loss, or freeze its parameters for that loss by "
            f"`requires_grad_(False)`; `backward(inputs=...)` fills those of `{other}` only",
            severity="warning",
            names=tuple(found),
        )


class LossCountedTwice(EventCheck):
    """A loss is differentiated alone, and again as a part of a sum.

    ## What it does
    Looks, at each backward pass, whether its graph holds the loss of an earlier pass whose gradients are still in
    `.grad`. Speaks at the second time. Gradients that were zeroed in between, or a pass with `create_graph=True`, are
    left out.

    ## Why it is bad
    backward() adds to `.grad`, and the second loss contains the first: that one trains with twice its weight. The
    `retain_graph=True` that PyTorch asks for on the way is the sign of it.

    ## Bad
    ```python
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            out = model(torch.randn(8, 4))
            first, second = out[:, 0].square().mean(), out[:, 1].square().mean()
            optimizer.zero_grad()
            first.backward(retain_graph=True)
            (first + second).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            out = model(torch.randn(8, 4))
            first, second = out[:, 0].square().mean(), out[:, 1].square().mean()
            optimizer.zero_grad()
            (first + second).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Call backward() once, on the sum of the losses.

    ## Source
    https://github.com/ueoo/AGIS-Net/issues/8.
    """

    code = "SL634"
    title = "loss counted twice"
    severity = "warning"

    def __init__(self) -> None:
        self._times = 0

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second pass whose graph holds the loss of an earlier pass that is still in `.grad`."""
        if not isinstance(event, Backward) or event.makes_graph or not state.is_known:
            return
        still = {b.number: b for name in event.reached & state.held.keys() for b in state.held[name].passes}
        twice = [b for b in still.values() if b.root in event.visited and not b.makes_graph]
        if not twice:
            return
        self._times += 1
        if self._times == 2:
            first = twice[0]
            yield self.fault(
                "a loss was differentiated by itself, and then once more as a part of another: its gradient is in "
                f"`.grad` twice, for {listed(sorted(event.reached & first.reached))}",
                where=f"{at(event.site, 'a backward pass')}; before it, with retain_graph=True: "
                f"{at(first.site, 'a backward pass')}",
                why="backward() adds to `.grad`, and the second loss contains the first",
                fix="call backward() once, on the sum of the losses",
                names=sorted(event.reached & first.reached),
            )


class ClosureKeepsGradients(EventCheck):
    """The closure of LBFGS does not zero the gradients, so that they add up over its evaluations.

    ## What it does
    Looks for a second backward pass on the same line inside one step of `torch.optim.LBFGS` without a zero_grad in it.

    ## Why it is bad
    LBFGS evaluates the closure several times in one step and takes `.grad` for the gradient at each point. With sums of
    gradients its curvature estimates and its line search are wrong, and it diverges or stands still.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, y = torch.randn(16, 4), torch.randn(16, 1)

    def closure():
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(closure)
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, y = torch.randn(16, 4), torch.randn(16, 1)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            optimizer.step(closure)
            audit.step()
    ```
    ## Fix
    Begin the closure with `optimizer.zero_grad()`.

    ## Source
    Documentation of `torch.optim.LBFGS` and of `Optimizer.step(closure)`.
    """

    code = "SL637"
    title = "closure keeps gradients"

    def __init__(self) -> None:
        self._was_told = False
        self._version: int | None = None

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At a backward pass after the weights have moved inside one step, if nothing was zeroed in this step."""
        if isinstance(event, (Update, Zero)) or (isinstance(event, GradientUse) and event.is_write):
            self._version = None
        owner = state.inside
        if self._was_told or not owner or not isinstance(event, Backward) or not state.is_known:
            return
        if type(state.optimizers.get(owner)).__name__ != "LBFGS":
            return
        version = sum(p._version for group in state.optimizers[owner].param_groups for p in group["params"])
        before, self._version = self._version, version
        if before in (None, version) or not any(state.held[n].passes for n in event.reached & state.held.keys()):
            return
        self._was_told = True
        yield self.fault(
            f"the closure of `{owner}` ran backward again without zero_grad: its gradients add up over the evaluations "
            "of one step",
            where=at(event.site, f"closure of `{owner}`"),
            why="LBFGS evaluates the closure several times in one step and takes `.grad` for the gradient at each "
            "point",
            fix=f"begin the closure with `{owner}.zero_grad()`",
            names=sorted(event.reached),
        )
