"""Operations that can be differentiated once and not twice, found in the graph before the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safeloop.autograd.second import dead_ends
from safeloop.checks.check import Check
from safeloop.checks.terms.reading import read_terms, where
from safeloop.checks.views import TermsView
from safeloop.faults import Fault

_FIXES = {
    "ScaledDotProduct": "compute the attention inside `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):`",
    "CheckpointFunction": "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    "Cdist": 'call torch.cdist(..., compute_mode="use_mm_for_euclid_dist"), or write the distances out',
    "Pdist": "write the distances out: `torch.linalg.vector_norm(x[i] - x[j], dim=-1)`",
    "EmbeddingBag": "use F.embedding and sum or average its rows",
    "CtcLoss": "leave the CTC loss out of what is differentiated twice: penalise the logits before it",
    "MultiMarginLoss": "write the margins out with `relu`",
    "MultilabelMarginLoss": "write the margins out with `relu`",
    "CudnnRnn": "run the recurrent layer inside `with torch.backends.cudnn.flags(enabled=False):`",
    "MiopenRnn": "run the recurrent layer inside `with torch.backends.cudnn.flags(enabled=False):`",
    "ThnnFused": "write the cell out with torch functions, or run it on the CPU",
    "CompiledFunction": "set `run.compile: false`, or `run.compile: {backend: eager}`",
}
_CUSTOM = (
    "write the backward of this custom function with differentiable torch functions and take "
    "@once_differentiable off, or keep it out of what the penalty differentiates"
)
_GENERIC = (
    "find the operation by its name; for attention use sdpa_kernel(SDPBackend.MATH), for torch.cdist "
    'compute_mode="use_mm_for_euclid_dist", for embedding_bag F.embedding and a sum'
)


class OperationWithoutSecondDerivative(Check):
    """A gradient is to be differentiated again, through an operation that has a first derivative only.

    ## What it does
    Reads the names of the graph's nodes on the first steps, before the backward pass: between the values and the point
    of a penalty, and in the graph of every loss term that contains a gradient. Knows flash attention, `cdist`, `pdist`,
    `embedding_bag`, CTC, cuDNN's recurrent layers, re-entrant checkpoints, compiled functions, and custom functions
    marked `@once_differentiable`.

    ## Why it is bad
    torch raises in the middle of the backward pass, without naming a line of the forward. Through a function marked
    `@once_differentiable` it may not raise at all: where the gradient that enters it is a constant, what comes out is
    one too, and that part of the penalty trains nothing.

    ## Bad
    ```python
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            q = self.mix(x).view(len(x), 1, 3, 4)
            return self.out(F.scaled_dot_product_attention(q, q, q).mean((1, 2)))

    class Run(sl.Trainer):
        def losses(self, batch):
            return {"score": self.model(batch).mean(), "gp": self.penalty(self.model, at=batch)}

    sgd = {"type": "SGD", "lr": 0.1}
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    Run(
        model=Critic(), data=[torch.randn(8, 3, 4)], optimizers=sgd, penalties={"gp": gp}, run={"max_steps": 1}
    ).fit()
    ```
    ## Good
    ```python
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            q = self.mix(x).view(len(x), 1, 3, 4)
            with sdpa_kernel(SDPBackend.MATH):
                mixed = F.scaled_dot_product_attention(q, q, q)
            return self.out(mixed.mean((1, 2)))

    class Run(sl.Trainer):
        def losses(self, batch):
            return {"score": self.model(batch).mean(), "gp": self.penalty(self.model, at=batch)}

    sgd = {"type": "SGD", "lr": 0.1}
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    Run(
        model=Critic(), data=[torch.randn(8, 3, 4)], optimizers=sgd, penalties={"gp": gp}, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Use the form of the operation that is made of differentiable parts; the fault names it.

    ## Source
    https://github.com/pytorch/pytorch/issues/116350; https://github.com/pytorch/pytorch/issues/5261; measured for torch
    2.13.
    """

    code = "SL435"
    title = "operation without a second derivative"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each term whose graph holds a node that will raise."""
        for term in read_terms(view):
            if term.tensor.requires_grad and (names := dead_ends(term.tensor)):
                what = f"the graph of loss term `{term.name}` holds {_quoted(names)}, where torch has no derivative"
                yield cls._fault(what, term.name, names, where(view, term.name))

    @classmethod
    def of(cls, term: str, nodes: Sequence[str], where: str) -> Fault:
        """The fault for a penalty, with the names of the nodes that its gradient runs through."""
        return cls._fault(f"`{term}` differentiates a gradient that runs through {_quoted(nodes)}", term, nodes, where)

    @classmethod
    def _fault(cls, what: str, term: str, nodes: Sequence[str], where: str) -> Fault:
        known = [next((fix for start, fix in _FIXES.items() if node.startswith(start)), None) for node in nodes]
        is_dead_end = any("NotImplemented" in node or "BackwardBackward" in node for node in nodes)
        fixes = [fix or (_GENERIC if is_dead_end else _CUSTOM) for fix in known]
        return cls.fault(
            what,
            where=where,
            why="the backward of an operation on the way has no derivative of its own",
            fix="; ".join(dict.fromkeys(fixes)),
            names=(term,),
        )


def _quoted(nodes: Sequence[str]) -> str:
    return ", ".join(f"`{node}`" for node in nodes)
