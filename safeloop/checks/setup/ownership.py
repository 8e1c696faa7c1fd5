"""Who updates which parameter: each trainable one has exactly one owner, or is declared frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from safeloop.checks.check import Check
from safeloop.checks.views import Ownership, SetupView
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault


class UnownedParameter(Check):
    """A trainable parameter belongs to no optimizer and is not declared frozen.

    ## What it does
    Compares the model's parameters that require grad with what the optimizers own, by name, before the first step. In
    a loop that is not ours it waits until such a parameter gets a gradient: a target network that is only ever run
    under no_grad is left out, and so is what another optimizer of the process holds.

    ## Why it is bad
    The parameter gets gradients and keeps its initial value for ever. The loss still goes down, through the others.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {"type": "SGD", "lr": 0.1, "params": ["0.*"]}
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {"type": "SGD", "lr": 0.1, "params": ["0.*"]}
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, frozen=["1.*"], run={"max_steps": 1}).fit()
    ```
    ## Fix
    Add a pattern that matches the parameter to `optimizers.NAME.params` (`rest` takes what no other pattern took),
    hand it to the ready optimizer, or say that it stays as it is: list it under `frozen:`.

    ## Source
    https://github.com/pytorch/pytorch/issues/20089; safeloop's own rule.
    """

    code = "SL201"
    title = "parameter without an owner"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for all of them."""
        unowned, owners = view.ownership.unowned, owners_of(view.ownership)
        if unowned and (owners or view.ownership.empty):
            trainable = sum(p.requires_grad for p in view.model.parameters())
            yield cls.fault(
                f"{len(unowned)} of {counted(trainable, 'trainable parameter')} in no optimizer: {listed(unowned)}",
                where=f"optimizers: {listed([*owners, *view.ownership.empty])}",
                why="they get gradients, but nothing ever updates them",
                fix=f"add a pattern that matches them to {_paths(view.ownership)} (`rest` takes what no other took), "
                "hand them to the ready optimizer, or list them under `frozen:`",
                names=unowned,
            )

    @classmethod
    def in_a_loop(cls, names: Sequence[str], trainable: int, owners: Sequence[str]) -> Fault:
        """The fault of a loop that is not ours, in which these have got gradients."""
        return cls.fault(
            f"{len(names)} of {counted(trainable, 'trainable parameter')} in no optimizer: {listed(names)}",
            where=f"optimizers: {listed(owners)}",
            why="they get gradients, but nothing ever updates them",
            fix="hand them to an optimizer, or freeze them by `requires_grad_(False)`",
            names=names,
        )


class ParameterOwnedTwice(Check):
    """A parameter belongs to more than one optimizer.

    ## What it does
    Looks for parameters that several optimizers claim: by patterns that overlap, or by being handed to two ready
    optimizers. In a loop of your own, once two of them have stepped on the same gradient: Adam that hands over to
    LBFGS, or an optimizer for each loss with a backward pass of its own, is well.

    ## Why it is bad
    Each optimizer moves the parameter, with a state and a learning rate of its own: it takes two steps where one was
    meant, the second one with a gradient that belonged to the weights before the first.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {
        "body": {"type": "SGD", "lr": 0.1, "params": ["*"]},
        "head": {"type": "SGD", "lr": 0.01, "params": ["1.*"]},
    }
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {
        "body": {"type": "SGD", "lr": 0.1, "params": "rest"},
        "head": {"type": "SGD", "lr": 0.01, "params": ["1.*"]},
    }
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Make the patterns disjoint, or write `params: rest` for the optimizer that takes what is left. Of two ready
    optimizers, one must not be given the parameter.

    ## Source
    https://github.com/pytorch/pytorch/issues/40967; https://github.com/siddancha/streaming-flow-policy/pull/15.
    """

    code = "SL202"
    title = "parameter with two owners"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each group of optimizers."""
        shared: dict[tuple[str, ...], list[str]] = {}
        for name, owners in view.ownership.duplicated.items():
            shared.setdefault(owners, []).append(name)
        for owners, names in shared.items():
            unowned = view.ownership.unowned
            rest = f"; {listed(unowned)}: in no optimizer at all" if unowned else ""
            if len(set(owners)) == 1:
                yield cls._twice_in_one(owners[0], names, rest)
                continue
            paths = " and ".join(f"`optimizers.{owner}.params`" for owner in dict.fromkeys(owners))
            has = "has" if len(names) == 1 else "have"
            yield cls.fault(
                f"{counted(len(names), 'parameter')} {has} {len(owners)} optimizers: {listed(names)}{rest}",
                where=f"optimizers {' and '.join(f'`{owner}`' for owner in owners)}",
                why="each of them would move these parameters, so that they take several steps where one is meant",
                fix=f"make {paths} disjoint, write `rest` for one, or hand them to one ready optimizer only",
                names=names,
            )

    @classmethod
    def _twice_in_one(cls, owner: str, names: Sequence[str], rest: str) -> Fault:
        return cls.fault(
            f"{counted(len(names), 'parameter')} of optimizer `{owner}`, listed there more than once: "
            f"{listed(names)}{rest}",
            where=f"optimizer `{owner}`",
            why="it steps each of them as often as it is listed, where one step is meant; often another module was "
            "meant in one of the places",
            fix="list each parameter once, and the other module where it was meant",
            names=names,
        )


class ParameterAppearedLate(Check):
    """A parameter was registered after the optimizers were built.

    ## What it does
    Compares the model's parameters after a forward pass with those from before the first step.

    ## Why it is bad
    A layer that `forward` creates on its first call is in no optimizer: it keeps its initial weights. A second run that
    loads a checkpoint does not have it yet.

    ## Bad
    ```python
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), None

        def forward(self, x):
            h = torch.relu(self.body(x))
            if self.head is None:
                self.head = nn.Linear(h.shape[1], 1)
            return self.head(h)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = Late()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizer, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = Early()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizer, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Create every layer in `__init__`. Where a size is only known from the data, call the model on one batch before the
    optimizer is built, or use a lazy layer (`nn.LazyLinear`), whose parameters exist from the start.

    ## Source
    https://github.com/LaurentMazare/ocaml-torch/issues/36; documentation of `torch.nn.modules.lazy`.
    """

    code = "SL209"
    title = "parameter appeared after the optimizers were built"

    @classmethod
    def find(cls, view: SetupView, appeared: Collection[str] | None = None) -> Iterator[Fault]:
        """One fault for the trainable ones among `appeared`; by default, those that the ownership does not know."""
        known = {*view.ownership.owner_of, *view.ownership.frozen, *view.ownership.unowned}
        late = [
            name
            for name, parameter in view.model.named_parameters()
            if parameter.requires_grad and (name not in known if appeared is None else name in appeared)
        ]
        if late:
            yield cls.fault(
                f"{counted(len(late), 'parameter')} appeared in the forward, after the optimizers were built: "
                f"{listed(late)}",
                where=f"model {type(view.model).__name__}, in {_creators(view.model, late)}",
                why="no optimizer holds them, so that they would keep their initial values",
                fix="create the layer in `__init__` (nn.LazyLinear where its size is only known from data), or call "
                "the model on one batch before the optimizers are built",
                names=late,
            )


def owners_of(ownership: Ownership) -> list[str]:
    """Every optimizer that holds something, in order."""
    claims = [owner for owners in ownership.duplicated.values() for owner in owners]
    return list(dict.fromkeys([*ownership.owner_of.values(), *claims, *ownership.foreign]))


def _paths(ownership: Ownership) -> str:
    owners = dict.fromkeys([*owners_of(ownership), *ownership.empty])
    return " or ".join(f"`optimizers.{owner}.params`" for owner in owners) or "`optimizers.main.params`"


def _creators(model: nn.Module, names: list[str]) -> str:
    parents = dict.fromkeys(name.rsplit(".", 1)[0] if "." in name else "" for name in names)
    return ", ".join(f"`{path}` ({type(model.get_submodule(path)).__name__})" for path in parents)
