"""Gradients and steps of an evaluation that change what is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class TrainedInEvaluation(EventCheck):
    """An evaluation differentiates its loss: its gradients are left for the next step, or it steps by itself.

    ## What it does
    Looks at the mode of the modules whose parameters are trained. Tells where a step uses gradients of a pass in eval
    mode and of one in train mode, when other steps use only those of train mode; and, as a warning, where steps in eval
    mode stand between steps in train mode for the second time. Cost: two flags at each step.

    ## Why it is bad
    The model is trained on validation data: the score no longer says how it does on data that it has not seen. A
    backward pass in an evaluation that was copied from the training loop is enough, where gradients are zeroed after
    the step: what it leaves in `.grad` goes into the next one.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if i % 3 == 2:
                model.eval()
                model(torch.randn(8, 4)).square().mean().backward()
                model.train()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if i % 3 == 2:
                model.eval()
                with torch.no_grad():
                    error = model(torch.randn(8, 4)).square().mean()
                model.train()
            audit.step()
    ```
    ## Fix
    Evaluate under `with torch.no_grad():`, without backward() and step(). Where training in eval mode is meant, accept
    the code: `accept={"SL708": ["*"]}`.

    ## Source
    safeloop's own rule; https://github.com/OrderLab/TrainCheck-Evaluation-Workloads has loops of this kind.
    """

    code = "SL708"
    title = "training in an evaluation"

    def __init__(self, model: nn.Module) -> None:
        self._holders = {
            f"{path}.{key}" if path else key: module
            for path, module in model.named_modules()
            for key in module._parameters
        }
        self._ends: dict[str, list[nn.Module]] = {}
        """owner -> the modules that hold its first and its last parameter"""
        self._in_eval: dict[int, bool] = {}
        self._plain: Counter[str] = Counter()
        self._turns: Counter[str] = Counter()
        self._was_training: dict[str, bool] = {}
        self._told: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At a step, by what its passes and its modules were in."""
        if isinstance(event, Backward):
            self._in_eval[event.number] = self._is_in_eval(event.reached)
        elif isinstance(event, Update) and event.owner not in self._told and not event.has_closure:
            if event.is_deep and state.is_known:
                yield from self._mixed(event, state)
            yield from self._alternating(event, state)

    def _mixed(self, event: Update, state: LoopState) -> Iterator[Fault]:
        held = {name: state.held[name] for name in sorted(state.owners[event.owner] & state.held.keys())}
        fresh = {name: one.passes[one.used :] for name, one in held.items()}
        passes = {p.number: p for each in fresh.values() for p in each if p.number in self._in_eval}
        evaluated = [p for number, p in passes.items() if self._in_eval[number]]
        self._in_eval.clear()
        if not passes or len(evaluated) == len(passes):
            return
        if not evaluated:
            self._plain[event.owner] += 1
            return
        if not self._plain[event.owner]:
            return
        self._told.add(event.owner)
        names = [name for name, each in fresh.items() if evaluated[0] in each]
        yield self.fault(
            f"a step of `{event.owner}` uses gradients of a pass in eval mode beside those of training: "
            f"{listed(names)}",
            where=f"{at(event.site, 'the step')}; the backward pass in eval mode: {at(evaluated[0].site, 'unknown')}",
            why="an evaluation called backward(), and what it left in `.grad` was not zeroed: the model is trained on "
            "the data of the evaluation",
            fix="evaluate under `with torch.no_grad():`, without backward()",
            names=names,
        )

    def _alternating(self, event: Update, state: LoopState) -> Iterator[Fault]:
        if event.owner not in self._ends:
            names = sorted(state.owners[event.owner] & self._holders.keys())
            self._ends[event.owner] = [self._holders[name] for name in {*names[:1], *names[-1:]}]
        ends = self._ends[event.owner]
        is_training = not ends or any(module.training for module in ends)
        if self._was_training.get(event.owner, False) and not is_training:
            self._turns[event.owner] += 1
        self._was_training[event.owner] = is_training
        if is_training or self._turns[event.owner] < 2:
            return
        self._told.add(event.owner)
        yield self.fault(
            f"`{event.owner}` steps while the model is in eval mode (training=False), between steps in train mode, for "
            "the second time",
            where=at(event.site, f"step() of `{event.owner}`"),
            why="an evaluation that steps trains the model on its own data: dropout is off and batch normalisation "
            "uses its running statistics, as nowhere else in this training",
            fix="evaluate under `with torch.no_grad():`, without backward() and step()",
            severity="warning",
            names=(event.owner,),
        )

    def _is_in_eval(self, names: Iterable[str]) -> bool:
        modules = [self._holders[name] for name in names if name in self._holders]
        return bool(modules) and not any(module.training for module in modules)
