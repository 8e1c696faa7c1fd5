"""Weights that were meant to be tied, and are only equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from safeloop.checks.check import Check
from safeloop.checks.setup.patterned import is_patterned
from safeloop.checks.setup.roles import is_apart
from safeloop.checks.views import SetupView
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENTRIES = 8
"""entries of a fingerprint"""
_CLONES = 4
"""weights that are compared among clones; a thousand experts that begin alike cost no million comparisons"""


@dataclass(frozen=True)
class _Weight:
    name: str
    parameter: nn.Parameter
    module: nn.Module

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


class TiedByCopy(Check):
    """Two weights begin with the same values, as tied weights would, and are separate parameters.

    ## What it does
    Compares the trainable matrices of the model, as they are and transposed, before the first step: an embedding
    copied into the output layer, a decoder initialised with the encoder's transposed weights. Copies of a module
    (layers of an `nn.TransformerEncoder`, twin networks, a target network) hold the same weight under the same name in
    the same class and are left alone, and so are weights whose values follow a pattern (constants, identities,
    sinusoids), which any two modules may start from; and a bare matrix beside the transposed one of the same module.

    ## Why it is bad
    `nn.Parameter(emb.weight.clone())` and `out.weight.data.copy_(emb.weight)` tie nothing: the two weights part at the
    first step. The model has more parameters than was meant, and each gets half of the gradient.

    ## Bad
    ```python
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(10, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = nn.Parameter(self.emb.weight.detach().clone())

        def forward(self, words):
            return self.out(self.emb(words))

    class Run(sl.Trainer):
        def loss(self, batch):
            return F.cross_entropy(self.model(batch), batch)

    words = torch.arange(8)
    Run(model=Words(), data=[words], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(10, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.emb.weight

        def forward(self, words):
            return self.out(self.emb(words))

    class Run(sl.Trainer):
        def loss(self, batch):
            return F.cross_entropy(self.model(batch), batch)

    words = torch.arange(8)
    Run(model=Words(), data=[words], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Assign the parameter itself, `self.out.weight = self.emb.weight`; use a transposed one in `forward`,
    `F.linear(h, self.encoder.weight.t())`. Where equal starting values are meant, accept them:
    `audit.accept: {SL211: ["out.*", "emb.*"]}`.

    ## Source
    https://github.com/unslothai/unsloth/pull/3711.
    """

    code = "SL211"
    title = "tied by copy"
    severity = "warning"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each pair. Cost: a few values of each matrix whose shape occurs twice, then a comparison."""
        for group in _alike(_weights(view)):
            for first, second in combinations(group, 2):
                kind = _likeness(first, second)
                if kind:
                    yield cls._fault(first, second, kind)

    @classmethod
    def _fault(cls, first: _Weight, second: _Weight, kind: str) -> Fault:
        names = (first.name, second.name)
        is_one = first.parameter.data_ptr() == second.parameter.data_ptr()
        transposed = " transposed" if kind == "transposed" else ""
        return cls.fault(
            f"{listed(names)} {list(first.parameter.shape)} hold the same values{transposed}, and are two parameters"
            + (" over the same memory" if is_one else ""),
            where=f"`{second.name}` ({type(second.module).__name__}), `{first.name}` ({type(first.module).__name__})",
            why="each has a gradient and an optimizer state of its own"
            + (", and each step moves both" if is_one else ": they part at the first step, so that nothing is tied"),
            fix=f"use `{first.name}` transposed in `forward`, and drop `{second.name}`"
            if transposed
            else f"assign the parameter itself, not its values: `{second.name} = {first.name}`",
            names=names,
        )


def _weights(view: SetupView) -> Iterator[_Weight]:
    frozen = set(view.ownership.frozen)
    for path, module in view.model.named_modules():
        for leaf, parameter in module._parameters.items():
            name = f"{path}.{leaf}" if path else leaf
            if parameter is None or name in frozen or not parameter.requires_grad or is_apart(name.replace(".", "_")):
                continue
            if _is_plain(parameter) and parameter.dim() >= 2 and parameter.numel() >= 16:
                yield _Weight(name, parameter, module)


def _is_plain(parameter: nn.Parameter) -> bool:
    if is_lazy(parameter):
        return False
    data = parameter.data
    return not data.is_meta and type(data) is Tensor and data.layout == torch.strided and data.is_floating_point()


def _alike(weights: Iterator[_Weight]) -> Iterator[list[_Weight]]:
    """Groups with the same shape, or its transpose, and the same values where both are looked at."""
    shapes: dict[tuple[int, ...], dict[int, _Weight]] = {}
    for weight in weights:
        shape = weight.parameter.shape
        key = tuple(sorted(shape)) if len(shape) == 2 else tuple(shape)
        shapes.setdefault(key, {}).setdefault(id(weight.parameter), weight)
    for bucket in shapes.values():
        if not any(_may_be_tied(a, b) for a, b in combinations(bucket.values(), 2)):
            continue
        groups: dict[tuple[float, ...], list[_Weight]] = {}
        for weight in bucket.values():
            groups.setdefault(_fingerprint(weight.parameter), []).append(weight)
        for values, group in groups.items():
            if len(group) > 1 and len(set(values)) > 1:
                yield list(_few_clones(group))


def _few_clones(group: list[_Weight]) -> Iterator[_Weight]:
    seen: Counter[tuple[type, str]] = Counter()
    for weight in group:
        kind = (type(weight.module), weight.leaf)
        seen[kind] += 1
        if seen[kind] <= _CLONES:
            yield weight


def _may_be_tied(first: _Weight, second: _Weight) -> bool:
    return len(first.parameter.shape) == 2 or not _are_copies(first, second)


def _are_copies(first: _Weight, second: _Weight) -> bool:
    """Whether these are one weight of two modules of the same kind."""
    kinds = type(first.module), type(second.module)
    return first.leaf == second.leaf and (issubclass(kinds[0], kinds[1]) or issubclass(kinds[1], kinds[0]))


def _fingerprint(parameter: nn.Parameter) -> tuple[float, ...]:
    """A few values; of a matrix its diagonal, which transposing leaves where it is."""
    data = parameter.detach()
    few = data.diagonal()[:_ENTRIES] if data.dim() == 2 and min(data.shape) > 1 else data.flatten()[:_ENTRIES]
    return tuple(few.tolist())


@torch.no_grad()
def _likeness(first: _Weight, second: _Weight) -> str:
    a, b = first.parameter, second.parameter
    kind = ""
    if a.device == b.device and a.dtype == b.dtype:
        if a.shape == b.shape and torch.equal(a, b):
            kind = "" if _are_copies(first, second) else "equal"
        elif a.dim() == 2 and a.shape == b.shape[::-1] and torch.equal(a, b.t()):
            # two bare matrices of one module, as in a sparse autoencoder, are started alike on purpose
            is_start = first.module is second.module and a.data_ptr() != b.data_ptr()
            kind = "" if is_start else "transposed"
    return kind if kind and not is_patterned(a) else ""
