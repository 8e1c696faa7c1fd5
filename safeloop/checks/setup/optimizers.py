"""Optimizers that do not fit the model: they hold what it does not have, or nothing of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor

from safeloop.checks.check import Check
from safeloop.checks.setup.ownership import owners_of
from safeloop.checks.setup.scan import unregistered
from safeloop.checks.views import SetupView
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault


class StaleOptimizer(Check):
    """A ready optimizer holds tensors that are no parameter of the model.

    ## What it does
    Compares what ready `torch.optim` objects hold with the model's parameters, by identity. It is an error where
    parameters of the model are left without an owner, which is what a stale optimizer looks like; else a warning. In a
    loop of your own only the error is told, once gradients reach the model's parameters and not those tensors.

    ## Why it is bad
    The model was copied, or a layer of it replaced, after the optimizer was built: the optimizer updates the old
    tensors, which no loss reaches any more, and the new ones never move.

    ## Bad
    ```python
    import copy

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = copy.deepcopy(model)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizer, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    import copy

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = copy.deepcopy(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizer, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Build the optimizer after the last change of the model, or give its config instead of the object: then safeloop
    builds it from the model that it trains. Tensors outside of the model that are meant to train belong in it, as
    parameters.

    ## Source
    https://github.com/skorch-dev/skorch/issues/317; https://github.com/meta-pytorch/opacus/issues/432.
    """

    code = "SL204"
    title = "optimizer holds what the model does not have"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each such optimizer; what SL206 or SL208 names is left to them."""
        known = unregistered(view.model) if view.ownership.foreign else {}
        for owner, tensors in view.ownership.foreign.items():
            strangers = [tensor for tensor in tensors if tensor not in known]
            if strangers:
                yield cls._fault(view, owner, strangers)

    @classmethod
    def _fault(cls, view: SetupView, owner: str, strangers: list[Tensor]) -> Fault:
        own = sum(
            owner in (first, *view.ownership.duplicated.get(n, ())) for n, first in view.ownership.owner_of.items()
        )
        return cls.of(owner, strangers, own, view.ownership.unowned, has_same_shapes=_has_same_shapes(view, strangers))

    @classmethod
    def of(
        cls, owner: str, strangers: Sequence[Tensor], own: int, unowned: Sequence[str], *, has_same_shapes: bool
    ) -> Fault:
        """The fault of an optimizer that holds `strangers`, beside `own` parameters, while `unowned` have none."""
        one = len(strangers) == 1
        missing = (
            f"; {counted(len(unowned), 'parameter')} of the model {'is' if len(unowned) == 1 else 'are'} in no "
            f"optimizer: {listed(unowned)}"
        )
        return cls.fault(
            f"optimizer `{owner}` holds {counted(len(strangers), 'tensor')} that {'is' if one else 'are'} no parameter "
            "of the model"
            + (
                f", beside {counted(own, 'parameter')} that {'is' if own == 1 else 'are'}"
                if own
                else ", and none that is"
            )
            + (missing if unowned else "")
            + ("; the shapes are the same: a stale copy" if has_same_shapes else ""),
            where=f"optimizer `{owner}`",
            why="the model was copied, or a layer replaced, after the optimizer was built"
            if unowned
            else "they are updated, but the model does not list them: they are not saved, moved or named",
            fix="build the optimizer after the last change of the model, or give its config (`type`, `lr`, ...) instead"
            if unowned
            else "make them parameters of the model, or take them out of the optimizer",
            severity="error" if unowned else "warning",
            names=unowned or (owner,),
        )


class NothingToTrain(Check):
    """There is nothing to train: no trainable parameter, or an optimizer that owns none.

    ## What it does
    Counts the parameters that require grad, of the model and of each optimizer, before the first step. In a loop of
    your own, at its end: an optimizer's part may thaw later.

    ## Why it is bad
    The run would take its time and leave every weight as it was.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Linear(4, 1).requires_grad_(False)
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Linear(4, 1)
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Leave the parameters that should train with `requires_grad=True` and out of `frozen:`, correct
    `optimizers.NAME.params`, or take the optimizer out.

    ## Source
    safeloop's own rule.
    """

    code = "SL205"
    title = "nothing to train"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for the model, or one for each idle optimizer."""
        ownership, parameters = view.ownership, dict(view.model.named_parameters())
        frozen = [
            name for name, parameter in parameters.items() if name in ownership.frozen or not parameter.requires_grad
        ]
        if len(frozen) == len(parameters) and not ownership.foreign:
            yield cls.fault(
                f"{counted(len(parameters), 'parameter')} in the model, {len(frozen)} frozen: none is left to train",
                where=f"model {type(view.model).__name__}",
                fix="leave what should train with `requires_grad=True` and out of `frozen:`; give the model parameters",
                names=frozen,
            )
            return
        busy = {ownership.owner_of[name] for name in ownership.owner_of if name in parameters and name not in frozen}
        busy |= {owner for owners in ownership.duplicated.values() for owner in owners} | set(ownership.foreign)
        for owner in dict.fromkeys([*owners_of(ownership), *ownership.empty]):
            if owner not in busy:
                yield cls.fault(
                    f"optimizer `{owner}` owns no parameter that trains",
                    where=f"`optimizers.{owner}.params`",
                    why="its patterns match nothing, only frozen parameters, or what another optimizer took"
                    if owner in ownership.empty
                    else "every parameter that it holds has `requires_grad=False`",
                    fix=f"correct `optimizers.{owner}.params`, or take the optimizer out",
                    names=(owner,),
                )


def _has_same_shapes(view: SetupView, strangers: Sequence[Tensor]) -> bool:
    parameters = dict(view.model.named_parameters())
    return are_copies([parameters[name] for name in view.ownership.unowned if name in parameters], strangers)


def are_copies(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether there are any, and both have the same shapes."""
    shapes = Counter(tensor.shape for tensor in tensors)
    return bool(shapes) and shapes == Counter(tensor.shape for tensor in others)


def is_stale(view: SetupView) -> bool:
    """Whether some optimizer holds what looks like a copy of parameters that are in none."""
    return any(_has_same_shapes(view, tensors) for tensors in view.ownership.foreign.values())
