"""A model that goes on training in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.evaluation.modes import restless
from safeloop.checks.events import Backward, Event, LoopState
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class LeftInEvalMode(CallCheck, EventCheck):
    """The model was put into eval mode during training, and goes on training in it.

    ## What it does
    Looks at the mode of dropout and of batch and instance normalisation at each backward pass, and tells where modules
    that have trained in train mode are in eval mode at the passes of two iterations after it, the whole model with
    them. A model that was evaluated under no_grad before the first pass, and is in eval mode since, is told as a
    warning. Parts that are put into eval mode alone, such as normalisation that is frozen late, are left alone. Cost: a
    walk over the modules.

    ## Why it is bad
    An evaluation called `model.eval()` and nothing called `model.train()` after it. From then on dropout is off, and
    batch normalisation uses statistics that no longer move: training goes on as another model.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                error = model(torch.randn(8, 4)).square().mean()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                error = model(torch.randn(8, 4)).square().mean()
            model.train()
            audit.step()
    ```
    ## Fix
    Call `model.train()` after each evaluation, or at the start of each epoch.

    ## Source
    https://github.com/wkentaro/pytorch-fcn/pull/56.
    """

    code = "SL703"
    title = "left in eval mode"
    hears = frozenset(("linear", "conv1d", "conv2d", "conv3d", "embedding", "layer_norm", "batch_norm", "dropout"))

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._was_training: set[str] = set()
        self._at_first = {name for name, module in restless(model).items() if module.training}
        self._is_begun = False
        """whether a backward pass has run"""
        self._is_early = False
        """whether the model had been evaluated before the first one"""
        self._iterations: set[int] = set()
        self._was_told = False

    def hear(self, call: Call) -> Iterator[Fault]:
        """Whether the model is evaluated before it is trained."""
        if not self._is_begun and not call.grad_mode and not self._model.training:
            self._is_early = True
            self._was_training = self._at_first
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At a backward pass in eval mode of the second iteration after one in train mode."""
        if not isinstance(event, Backward) or self._was_told:
            return
        self._is_begun = True
        modules = restless(self._model)
        now = {name for name, module in modules.items() if module.training}
        containers = dict(self._model.named_modules())
        stopped = [
            name
            for name in sorted(self._was_training - now)
            if name in modules and _is_part(name, containers, event.reached)
        ]
        self._was_training = self._was_training | now
        self._is_early = self._is_early and not now
        self._iterations = self._iterations | {event.iteration} if stopped else set()
        if len(self._iterations) < 2:
            return
        self._was_told = True
        yield self.fault(
            f"the model was in train mode and now trains in eval mode (training=False): {listed(stopped)} no longer "
            + ("does what it does in training" if len(stopped) == 1 else "do what they do in training"),
            where=f"iteration {event.iteration}; {at(event.site, 'the backward pass')}",
            why="an evaluation called model.eval() and nothing called model.train() after it: dropout is off, and "
            "batch normalisation uses its running statistics",
            fix="call model.train() after each evaluation, or at the start of each epoch",
            severity="warning" if self._is_early else None,
            names=stopped,
        )


def _is_part(name: str, containers: Mapping[str, nn.Module], reached: Iterable[str]) -> bool:
    """Whether the module around this one is in eval mode as a whole, and is being trained."""
    around = name.rpartition(".")[0]
    prefix = f"{around}." if around else ""
    return not containers[around].training and any(parameter.startswith(prefix) for parameter in reached)
