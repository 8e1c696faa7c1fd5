"""State of a module that an evaluation moves."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from safeloop.autograd.lineage import Mark
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call, Tape
from safeloop.autograd.writes import storage_pointer
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.wording import agree, listed
from safeloop.faults import Fault

_RELATIVE = frozenset(
    (
        *("mul_", "add_", "sub_", "div_", "lerp_", "addcmul_", "index_add_", "scatter_add_"),
        *("__imul__", "__iadd__", "__isub__", "__itruediv__"),
    )
)
"""Writes that keep a part of what was there, as a moving average does."""
_OTHER = frozenset(("copy_", "fill_", "zero_", "normal_", "uniform_", "__setitem__", ".data="))
_LAYERS = frozenset(
    ("linear", "conv1d", "conv2d", "conv3d", "embedding", "layer_norm", "matmul", "__matmul__", "cdist")
)
_LOSSES = frozenset(
    (
        *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
    )
)
_RANGES = re.compile(r"min|max|scale|range|zero_point|observer|calib|quant_?param", re.IGNORECASE)
"""Names of what observers of a quantisation keep, which look at every batch on purpose."""
_PHASES = 2
"""Evaluations that must have left something before it is told."""


@dataclass(slots=True)
class _Buffer:
    """One persistent buffer of a module of the user's."""

    name: str
    module: nn.Module
    key: str
    kept: Any = None
    """the tensor that it was when it was written in eval mode"""
    site: Site | None = None
    evaluated: int = 0
    """averages taken in eval mode, which nothing has undone"""
    phases: int = 0
    """evaluations after which training went on with what they had left"""
    is_compared: bool = False
    """whether a loss was computed without grad mode since"""
    matters: bool = False
    """whether a loss that is differentiated depends on it"""
    is_state: bool = False
    """whether its own forward sets it back: what a sequence carries from step to step"""


class BufferMovesInEvaluation(CallCheck):
    """A moving average of a module also takes in the data of evaluations.

    ## What it does
    Notes who writes the persistent buffers of modules of your own, in which mode. Speaks where the forward of a module
    moves a buffer (`mul_`, `add_`, `lerp_`) in train mode and in eval mode, the evaluation computed a loss without
    gradient, training goes on with what it had left, and the loss of the training depends on that module's buffers.
    State that is restored after the evaluation, or set back by the forward itself, observers of a quantisation, single
    numbers, and modules that are always in eval mode are left alone. Cost: none beyond the tape of calls.

    ## Why it is bad
    The codebook, the centre or the statistics follow the validation data: the score is that of a model that has seen
    it, evaluating twice gives two results, and training goes on from another state.

    ## Bad
    ```python
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return x - self.mean.clone()

    model = nn.Sequential(Centred(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                error = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            model.train()
            audit.step()
    ```
    ## Good
    ```python
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            if self.training:
                self.mean.lerp_(x.detach().mean(0), 0.1)
            return x - self.mean.clone()

    model = nn.Sequential(Centred(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                error = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            model.train()
            audit.step()
    ```
    ## Fix
    Guard the update with `if self.training:`.

    ## Source
    https://github.com/zalandoresearch/pytorch-vq-vae, whose codebook moves only `if self.training`.
    """

    code = "SL723"
    title = "buffer moves in evaluation"
    severity = "warning"
    hears = _RELATIVE | _OTHER | _LAYERS | _LOSSES | {"backward"}

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._buffers: dict[str, _Buffer] = {}
        self._by_memory: dict[int, _Buffer] = {}
        self._step = -1
        self._told: set[int] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """At an average in train mode that goes on with what an evaluation has left."""
        tape = call.tape
        if tape.first_node != self._step:
            self._step = tape.first_node
            self._begin(tape)
        if not self._by_memory or not call.tensors or call.name in _LAYERS:
            return
        if call.name == "backward":
            for mark in (mark for root in call.tensors for mark in tape.marks_of(root) if mark.kind == "buffer"):
                self._buffers[mark.name].matters = True
        elif call.name in _LOSSES:
            for buffer in self._by_memory.values() if not call.grad_mode else ():
                buffer.is_compared = buffer.is_compared or buffer.evaluated > 0
        elif (found := self._by_memory.get(storage_pointer(call.tensors[0]))) is not None:
            yield from self._written(found, call)

    def _begin(self, tape: Tape) -> None:
        """Take stock of the buffers, and follow their values."""
        self._by_memory.clear()
        for path, module in self._model.named_modules():
            if not module._buffers or type(module).__module__.startswith("torch.") or id(module) in self._told:
                continue
            for key, tensor in module._buffers.items():
                name = f"{path}.{key}" if path else key
                if key in module._non_persistent_buffers_set or not _is_statistic(tensor, name, module):
                    continue
                buffer = self._buffers.setdefault(name, _Buffer(name, module, key))
                self._by_memory[storage_pointer(tensor)] = buffer
                tape.mark(tensor, Mark("buffer", name, "", None, path, 0))

    def _written(self, buffer: _Buffer, call: Call) -> Iterator[Fault]:
        module = buffer.module
        if call.tape.running is not module:
            buffer.evaluated, buffer.is_compared = 0, False  # somebody restores it, or sets it back
            return
        if call.name not in _RELATIVE:
            buffer.is_state |= call.name in ("zero_", "fill_")
            return
        now = module._buffers.get(buffer.key)
        if not module.training:
            buffer.evaluated += 1
            buffer.site, buffer.kept = call.site, None if now is None else weakref.ref(now)
            return
        if buffer.is_compared and buffer.kept is not None and buffer.kept() is now:
            buffer.phases += 1
            if buffer.phases >= _PHASES and not buffer.is_state and self._matters(module):
                yield from self._tell(buffer)
        buffer.evaluated, buffer.is_compared = 0, False

    def _matters(self, module: nn.Module) -> bool:
        own = [buffer for buffer in self._buffers.values() if buffer.module is module]
        return id(module) not in self._told and any(buffer.matters for buffer in own)

    def _tell(self, buffer: _Buffer) -> Iterator[Fault]:
        module = buffer.module
        path = buffer.name.rpartition(".")[0] or type(module).__name__
        self._told.add(id(module))
        names = [b.name for b in self._buffers.values() if b.module is module and (b.phases or b is buffer)]
        yield self.fault(
            f"{listed(names)} {agree(len(names), 'is', 'are')} moved by each forward, in eval mode too: evaluations "
            f"have changed {agree(len(names), 'it', 'them')}, and training went on with that",
            where=f"module `{path}`; {at(buffer.site, 'its forward')}",
            why="the validation data goes into the state that the model is trained with and saved: its score is not "
            "that of unseen data",
            fix="guard the update with `if self.training:`",
            names=names,
        )


def _is_statistic(tensor: Tensor | None, name: str, module: nn.Module) -> bool:
    """Whether a buffer may be an average over data: several numbers, and not the range of a quantisation."""
    if tensor is None or tensor.is_meta or not tensor.is_floating_point() or tensor.numel() < 2:
        return False
    return not _RANGES.search(f"{name.rpartition('.')[2]} {type(module).__name__}")
