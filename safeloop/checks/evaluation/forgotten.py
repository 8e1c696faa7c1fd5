"""Evaluations of a model that nobody has ever put into eval mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from safeloop.autograd.lineage import Mark
from safeloop.autograd.sites import Site, site_of, sites_above
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.evaluation.dropout import DROPOUTS, drops
from safeloop.checks.events import Event, Iteration, LoopState
from safeloop.checks.source import at
from safeloop.checks.wording import agree, listed
from safeloop.faults import Fault

_LOSSES = frozenset(
    (
        *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "ctc_loss"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
    )
)
_COMPARED = _LOSSES | {"eq", "__eq__"}
"""What an evaluation ends in: its outputs beside what they should have been."""
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_ENOUGH = 2
"""Evaluations, or batches of one evaluation."""


class EvaluatedInTrainMode(CallCheck, EventCheck):
    """The model is evaluated with its dropout active, and has never been in eval mode.

    ## What it does
    Follows what comes out of active dropout under `no_grad` or `inference_mode`, and speaks where it is compared with
    targets (a loss function, `==`) in at least two iterations, or for several batches of one. What a loss of the
    training uses afterwards (teachers, weights, chosen samples), batches that the iteration also trains on, passes of
    one input after another (Monte Carlo dropout), and models that are evaluated in eval mode too are left alone; batch
    normalisation in the same model is SL702. Cost: none beyond the tape of calls.

    ## Why it is bad
    The result is that of a thinned network: it is worse than the model is, random, and the best checkpoint and the
    early stop are chosen by that noise.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            with torch.no_grad():
                error = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            model.train()
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                error = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            audit.step()
    ```
    ## Fix
    Call `model.eval()` before the evaluation and `model.train()` after it.

    ## Source
    https://pytorch.org/docs/stable/notes/autograd.html#evaluation-mode-nn-module-eval.
    """

    code = "SL709"
    title = "evaluated in train mode"
    severity = "warning"
    hears = DROPOUTS | _RECURRENT | _COMPARED | {"multi_head_attention_forward", "batch_norm", "backward"}

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ours: dict[int, str] = {}
        self._is_excused = False
        """whether the model is evaluated in eval mode as well, or another check tells of its evaluations"""
        self._pass_of: dict[int, int] = {}
        """id of a mark -> the pass through the model that it was set in, of this iteration"""
        self._compared: dict[int, tuple[tuple[Site, ...], frozenset[str]]] = {}
        """pass -> where its output was compared, and from where that was called; and the modules that dropped values"""
        self._trained: set[int] = set()
        """passes in grad mode"""
        self._last = 0
        """the last pass with dropout, in either mode"""
        self._repeated: set[int] = set()
        """those with the input of the one before, or of one in grad mode"""
        self._times: Counter[tuple[Site, ...]] = Counter()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note passes with dropout under no_grad, and which of them are compared, or used by a loss."""
        tape = call.tape
        if self._is_excused:
            return iter(())
        if call.name == "backward":
            used = {self._pass_of.get(id(m), -1) for tensor in call.tensors for m in tape.marks_of(tensor)}
            self._compared = {number: kept for number, kept in self._compared.items() if number not in used}
        elif call.name in _COMPARED:
            self._compare(call)
        elif tape.running is not None and self._is_ours(tape.running):
            self._pass(call, tape.running)
        return iter(())

    def _is_ours(self, module: nn.Module) -> bool:
        if not self._ours:
            self._ours = {id(one): name for name, one in self._model.named_modules()}
        return id(module) in self._ours

    def _pass(self, call: Call, module: nn.Module) -> None:
        """A module with dropout, or batch normalisation, runs."""
        tape, number = call.tape, call.tape.num_passes
        if number != self._last:
            alike = tape.passes_like(number)
            if self._last in alike or self._trained.intersection(alike):
                self._repeated |= {self._last, number}
            self._last = number
        if call.grad_mode:
            self._trained.add(number)
            return
        if not module.training or call.name == "batch_norm":
            self._is_excused = True
        elif call.out is not None and _is_active(call, module):
            mark = Mark("dropout", call.name, "", call.site, self._ours[id(module)], 0)
            out = call.out[0] if isinstance(call.out, tuple) else call.out
            tape.mark(out, mark)
            self._pass_of[id(mark)] = number

    def _compare(self, call: Call) -> None:
        if call.grad_mode or call.frame is None:
            return
        found = [m for tensor in call.tensors for m in call.tape.marks_of(tensor) if id(m) in self._pass_of]
        numbers = {self._pass_of[id(m)] for m in found}
        names = Counter(name for name, _ in {(m.module, self._pass_of[id(m)]) for m in found})
        if not found or max(names.values()) > 1:  # one module in several passes: their results are combined
            return
        self._compared[max(numbers)] = (site_of(call.frame), *sites_above(call.frame, 1)), frozenset(names)

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of an iteration: what no loss has used was an evaluation."""
        if not isinstance(event, Iteration):
            return
        left = [kept for number, kept in self._compared.items() if number not in self._repeated]
        has_trained = bool(self._trained)
        self._compared, self._pass_of, self._last, self._ours = {}, {}, 0, {}
        self._trained, self._repeated = set(), set()
        if self._is_excused or not has_trained:
            return
        for sites, names in left:
            self._times[sites] += 1
            if self._times[sites] >= _ENOUGH:
                self._is_excused = True
                yield self._fault_of(sites, sorted(names))
                return

    def _fault_of(self, sites: tuple[Site, ...], names: list[str]) -> Fault:
        return self.fault(
            f"dropout in {listed(names)} {agree(len(names), 'was', 'were')} active in the evaluation, under no_grad: "
            "the model was in train mode there, and never in eval mode so far",
            where=", called from ".join(at(site, "") for site in sites),
            why="the result is that of a thinned network, worse than the model is, and random: the best checkpoint is "
            "chosen by noise",
            fix="call model.eval() before the evaluation and model.train() after it",
            names=names,
        )


def _is_active(call: Call, module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout) and module.num_layers > 1
    if isinstance(module, (_DropoutNd, nn.MultiheadAttention)):
        return bool(module.dropout if isinstance(module, nn.MultiheadAttention) else module.p)
    return call.name in DROPOUTS and drops(call)
