"""Loss terms that train nothing, or something else than declared: what their graph reaches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from safeloop.autograd.walk import Reach, reach
from safeloop.checks.check import Check
from safeloop.checks.terms.reading import read_terms, where
from safeloop.checks.views import TermsView
from safeloop.checks.wording import listed, suggestion
from safeloop.faults import Fault


class TermHasNoGradientPath(Check):
    """A loss term has no graph: it is a constant on this batch, or was cut off from the model.

    ## What it does
    Looks at `requires_grad` of every returned tensor, and quotes the lines of the loss function that make the term.

    ## Why it is bad
    The term trains nothing. Beside other terms nobody notices: the loss still goes down. Alone it ends in "element 0
    of tensors does not require grad", on the batches where it happens. The causes are `detach()`, `no_grad`, `.data`,
    `.item()`, numpy, `argmax`, a comparison, or a branch such as `min(torch.tensor(0.0), y)` that returned the
    constant.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return F.mse_loss(self.model(batch).detach(), batch)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return F.mse_loss(self.model(batch), batch.detach())

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Keep the path from the model to the term in torch functions that have a derivative, with grad mode on.
    `torch.minimum`, `torch.clamp` and `F.relu` keep the graph where `min` and `max` drop it. Where a term is rightly
    a constant on some batches, set `losses.NAME.may_be_constant: true`: then it is left out there, and counted. What
    is only to be looked at belongs in `metrics`.

    ## Source
    https://github.com/isayev/ReLeaSE/issues/39; documentation of `torch.Tensor.requires_grad`.
    """

    code = "SL404"
    title = "loss term has no gradient path"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each such term."""
        is_off = not torch.is_grad_enabled()
        for term in read_terms(view):
            if (
                not term.tensor.dtype.is_floating_point
                or term.tensor.requires_grad
                or term.name in view.constants_allowed
            ):
                continue
            value = f", value {float(term.tensor):.4g}" if term.tensor.numel() == 1 else ""
            yield cls.fault(
                f"loss term `{term.name}` does not require grad and has no grad_fn{value}"
                + ("; grad mode is off" * is_off),
                where=where(view, term.name),
                why="something called torch.set_grad_enabled(False) and did not switch it on again"
                if is_off
                else "it is a constant on this batch (a branch like `min(torch.tensor(0.0), y)` returned it, or it "
                "does not use the model), or was cut off by detach(), no_grad, .data, .item(), numpy, argmax or a "
                "comparison",
                fix="use `with torch.no_grad():`, which ends by itself"
                if is_off
                else "keep the path to the model in differentiable torch functions (torch.minimum or torch.clamp in "
                f"place of min), or set `losses.{term.name}.may_be_constant: true` where it is rightly constant on "
                "some batches",
                names=(term.name,),
            )


class TermIgnoresTheModel(Check):
    """A loss term has a graph, but no parameter that some optimizer updates is in it.

    ## What it does
    Walks the graph of every term to its leaves and looks for owned parameters. Cost: about 2 us for each node.

    ## Why it is bad
    backward() succeeds and every `.grad` stays None. The usual cause is a cure that hides the error:
    `torch.tensor(0.0, requires_grad=True)` as a start value or a branch, or a loss value wrapped in a new tensor.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            error = F.mse_loss(self.model(batch), batch)
            return torch.tensor(error.item(), requires_grad=True)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return F.mse_loss(self.model(batch), batch)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Return what was computed from the model, not a new tensor with its value; start sums from a plain 0 or use
    `sum(terms)`. Where a term rightly does not reach the model on some batches, set
    `losses.NAME.may_be_constant: true`.

    ## Source
    https://github.com/speechbrain/speechbrain/issues/735.
    """

    code = "SL409"
    title = "loss term does not reach the model"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each such term."""
        owned = {view.parameters[name] for name in view.owned if name in view.parameters}
        for term in read_terms(view):
            if not (term.is_well_formed and term.tensor.requires_grad) or term.name in view.constants_allowed:
                continue
            found = reach(term.tensor)
            if not found.is_complete or not owned.isdisjoint(found.leaves):
                continue
            names = [name for name, parameter in view.parameters.items() if parameter in found.leaves]
            is_leaf = term.tensor.is_leaf
            yield cls.fault(
                f"loss term `{term.name}` "
                + (
                    "is a leaf, a tensor made with `requires_grad=True`"
                    if is_leaf
                    else f"has a graph that ends in {_leaves(found, names)}"
                )
                + ": no parameter that an optimizer updates is reached",
                where=where(view, term.name),
                why="a new tensor has no history: what its value was computed from gets no gradient"
                if is_leaf
                else "the loss is computed from something else than the model's output, or every path to the model "
                "is cut",
                fix="return what was computed from the model, not a new tensor with its value, and start sums from "
                f"a plain 0; or set `losses.{term.name}.may_be_constant: true` where this is right on some batches",
                names=(term.name,),
            )


class TermReachesWhatItDoesNotTrain(Check):
    """A loss term reaches other parameters than its `trains:` says, or not those that it says.

    ## What it does
    Walks the graph of every term that declares `trains:` and compares the trainable parameters that it reaches with the
    patterns. The patterns assert, they never reroute a gradient. Cost: about 2 us for each node.

    ## Why it is bad
    A target, an advantage or a generated sample that was not detached trains the wrong network: a term pulls at
    weights that were not meant to follow it, and the loss goes down by moving the target.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            online, target = self.model
            return {"td": F.mse_loss(online(batch), target(batch))}

    model = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    losses = {"td": {"trains": ["0.*"]}}
    optimizers = {"type": "SGD", "lr": 0.1}
    Run(model=model, data=[torch.randn(8, 4)], losses=losses, optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            online, target = self.model
            return {"td": F.mse_loss(online(batch), target(batch).detach())}

    model = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    losses = {"td": {"trains": ["0.*"]}}
    optimizers = {"type": "SGD", "lr": 0.1}
    Run(model=model, data=[torch.randn(8, 4)], losses=losses, optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Detach what must not be trained by this term, or correct its patterns. A parameter that is named but not reached
    is cut off in the forward (`detach()`, `no_grad`, `.item()`), unused, or frozen (`nn.Embedding.from_pretrained`
    freezes by default).

    ## Source
    https://github.com/philtabor/Deep-Q-Learning-Paper-To-Code/issues/9;
    https://github.com/huggingface/optimum-graphcore/pull/304.
    """

    code = "SL410"
    title = "loss term does not train what it declares"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for what a term reaches beyond its patterns, and one for each pattern that it does not reach."""
        for term in read_terms(view):
            patterns = view.trains.get(term.name)
            if patterns and term.is_well_formed and term.tensor.requires_grad:
                found = reach(term.tensor)
                yield from cls._beyond(view, term.name, patterns, found.leaves)
                for pattern in patterns:
                    yield from cls._missed(view, term.name, pattern, found)

    @classmethod
    def _beyond(cls, view: TermsView, term: str, patterns: Sequence[str], leaves: set[Tensor]) -> Iterator[Fault]:
        named = {p for name, p in view.parameters.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
        beyond = {p: name for name, p in reversed(list(view.parameters.items())) if p in leaves and p not in named}
        if beyond:
            names = list(reversed(beyond.values()))
            yield cls.fault(
                f"loss term `{term}` is declared to train {listed(patterns)} and also reaches {listed(names)}",
                where=where(view, term),
                why="a path from these parameters to the term is not cut: their optimizer would follow it",
                fix=f"detach what comes from them, or add them to `{view.section(term)}.trains`",
                names=names,
            )

    @classmethod
    def _missed(cls, view: TermsView, term: str, pattern: str, found: Reach) -> Iterator[Fault]:
        named = {name: p for name, p in view.parameters.items() if fnmatchcase(name, pattern)}
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        if not found.leaves.isdisjoint(named.values()) or (trainable and not found.is_complete):
            return
        path = f"`{view.section(term)}.trains`"
        if not named:
            what = f"pattern `{pattern}` of {path} matches no parameter{suggestion(pattern, list(view.parameters))}"
            why, fix = "", f"correct `{pattern}`"
        elif not trainable:
            what = (
                f"loss term `{term}` is declared to train `{pattern}`, but {listed(named)} do not require grad: frozen"
            )
            why = "they were made so (`nn.Embedding.from_pretrained` freezes by default), or are listed under `frozen:`"
            fix = f"switch them on by `requires_grad_(True)`, or take `{pattern}` out of {path}"
        else:
            what = f"loss term `{term}` is declared to train `{pattern}`, but reaches none of {listed(trainable)}"
            why = "they are unused in this term, or cut off by detach(), no_grad, .data, .item(), numpy or argmax"
            fix = f"restore the path to them, or take `{pattern}` out of {path}"
        yield cls.fault(what, where=where(view, term), why=why, fix=fix, names=tuple(named) or (pattern,))


def _leaves(found: Reach, names: Sequence[str]) -> str:
    if names:
        return f"{listed(names)}, which no optimizer updates"
    shapes = ", ".join(str(list(leaf.shape)) for leaf in list(found.leaves)[:3])
    return f"{len(found.leaves)} other tensor(s) of shape {shapes}" if found.leaves else "no leaf"
