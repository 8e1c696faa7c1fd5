"""Running statistics of batch normalisation that take in what they should not."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import swa_utils

from safeloop.autograd.lineage import Mark
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, Iteration, LoopState
from safeloop.checks.graph.recomputed import updates_statistics
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_COMPARED = frozenset(
    ("argmax", "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits")
)
"""What a validation does with an output; statistics that are estimated again throw theirs away."""


class StatisticsFromValidation(CallCheck, EventCheck):
    """Batch normalisation takes data into its running statistics that nothing is trained on.

    ## What it does
    Follows what comes out of batch normalisation in train mode under `no_grad` or `inference_mode`, and tells where no
    loss of that iteration used it: in at least two iterations, or in one in which several batches were compared with
    something (`cross_entropy`, `argmax`), as in a validation at the end of an epoch. Teachers and generated samples,
    from which a loss is computed, and statistics that are estimated again on purpose (`update_bn`,
    `reset_running_stats`) are left alone. In a Trainer `metrics` runs in eval mode by itself. Cost: none beyond the
    tape of calls.

    ## Why it is bad
    The model was evaluated without `model.eval()`: each result depends on the batch that it is in, and the statistics
    of the validation data leak into the model that is trained and saved.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                error = model(torch.randn(8, 4)).square().mean()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
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
    Call `model.eval()` before the evaluation and `model.train()` after it.

    ## Source
    https://github.com/princeton-vl/pytorch_stacked_hourglass/issues/44.
    """

    code = "SL702"
    title = "validation data in running statistics"
    hears = frozenset(("batch_norm", "backward", "zero_", "fill_", "copy_")) | _COMPARED

    def __init__(self) -> None:
        self._trained: set[str] = set()
        self._open: dict[int, Mark] = {}
        self._statistics: dict[int, str] = {}
        self._fresh: set[str] = set()
        self._times: Counter[str] = Counter()
        self._told: set[str] = set()
        self._compared: set[int] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note forwards in train mode under no_grad, and which of them a loss uses."""
        tape = call.tape
        if call.name in _COMPARED:
            self._compared |= {
                id(mark) for tensor in call.tensors for mark in tape.marks_of(tensor)
            } & self._open.keys()
            return iter(())
        if call.name == "backward":
            used = {id(mark) for tensor in call.tensors for mark in tape.marks_of(tensor)}
            self._open = {key: mark for key, mark in self._open.items() if key not in used}
        elif call.name != "batch_norm":
            if (written := self._statistics.get(id(call.tensors[0]) if call.tensors else 0)) is not None:
                self._fresh.add(written)
        elif updates_statistics(call):
            module, path = tape.running, tape.module
            self._statistics[id(getattr(module, "running_mean", None))] = path
            if call.grad_mode:
                self._trained.add(path)
            elif path in self._trained and getattr(module, "momentum", None) is not None and not _is_refresh():
                mark = Mark("statistics", "batch_norm", "", call.site, path, 0)
                tape.mark(call.out, mark)
                self._open[id(mark)] = mark
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of an iteration: what no loss has used was validation."""
        if not isinstance(event, Iteration):
            return
        left, self._open = self._open, {}
        fresh, self._fresh = self._fresh, set()
        compared, self._compared = self._compared, set()
        batches = Counter(mark.module for key, mark in left.items() if key in compared)
        modules = {mark.module: mark for mark in left.values() if mark.module not in fresh}
        self._times.update(modules.keys())
        times = {module: max(self._times[module], batches[module]) for module in modules}
        names = [module for module in modules if times[module] >= 2 and module not in self._told]
        if names:
            self._told |= set(names)
            yield self.fault(
                f"running_mean and running_var of {listed(names)} took in data under no_grad, in train mode, that no "
                "loss was computed from",
                where=at(modules[names[0]].site, f"forward of `{names[0]}`"),
                why="the model was evaluated without model.eval(): the statistics of validation data leak into the "
                "model, and the result depends on the batch",
                fix="call model.eval() before the evaluation and model.train() after it",
                names=names,
            )


def _is_refresh() -> bool:
    """Whether torch's own `update_bn` runs, whose purpose this is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == swa_utils.__file__:
            return True
        frame = frame.f_back
    return False


class FrozenStatistics(CallCheck):
    """The running statistics of a frozen module keep moving.

    ## What it does
    Tells batch normalisation in train mode whose parameters, and all those of the module that it is a part of, were
    frozen from the start. Where only its own are frozen, statistics may follow the new data on purpose. Cost: none
    beyond the tape of calls.

    ## Why it is bad
    `requires_grad=False` stops gradients, not the statistics, which follow train mode. The frozen features drift: the
    backbone is no longer the one that was loaded.

    ## Bad
    ```python
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "head": nn.Linear(4, 1)})
    model["body"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["head"].parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            model.train()
            optimizer.zero_grad()
            model["head"](model["body"](torch.randn(8, 4))).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "head": nn.Linear(4, 1)})
    model["body"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["head"].parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            model.train()
            model["body"].eval()
            optimizer.zero_grad()
            model["head"](model["body"](torch.randn(8, 4))).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Keep it in eval mode: call `.eval()` on the frozen module after each `model.train()`, or in an overridden
    `train()`.

    ## Source
    https://github.com/pytorch/pytorch/issues/86590.
    """

    code = "SL706"
    title = "statistics of a frozen module move"
    severity = "warning"
    hears = frozenset(("batch_norm",))

    def __init__(self, model: nn.Module, frozen: frozenset[int]) -> None:
        self._frozen = frozen
        self._told: set[str] = set()
        self._parents = _parents(model)

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where batch normalisation with frozen weights, inside a frozen module, trains in grad mode."""
        module, name = call.tape.running, call.tape.module
        if not isinstance(module, _NormBase) or name in self._told or not updates_statistics(call):
            return
        around = self._parents.get(name, [])
        if not around or not call.grad_mode or not all(id(p) in self._frozen and not p.requires_grad for p in around):
            return
        self._told.add(name)
        yield self.fault(
            f"every parameter of `{name.rpartition('.')[0] or name}` is frozen, and running_mean and running_var of "
            f"`{name}` ({type(module).__name__}) still change",
            where=f"module `{name}`; {at(call.site, 'its forward')}",
            why="requires_grad=False stops gradients, not the statistics, which follow train mode: the frozen features "
            "drift",
            fix=f"keep it in eval mode: call `.eval()` on `{name.rpartition('.')[0] or name}` after model.train()",
            names=(name,),
        )


def _parents(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Path of a normalisation -> the parameters of the module that it is a part of."""
    modules = dict(model.named_modules())
    norms = [name for name, module in modules.items() if name and isinstance(module, _NormBase)]
    return {name: list(modules[name.rpartition(".")[0]].parameters()) for name in norms}


class StatisticsLeftBehind(CallCheck):
    """The weights of an averaged copy follow the model, and its running statistics do not.

    ## What it does
    Looks at batch normalisation in eval mode whose weights do not require grad, and tells where these weights change
    from iteration to iteration while the running statistics are still those of a new module, mean 0 and variance 1.
    Cost: a few numbers read on the steps that are looked at in depth.

    ## Why it is bad
    A target network or a teacher is moved towards the model by a loop over `parameters()`, which leaves out buffers.
    In eval mode it normalises with statistics that nobody has ever updated, and gives values that mean nothing.

    ## Bad
    ```python
    import copy

    online = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    target = copy.deepcopy(online).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    with sl.audit(model={"online": online, "target": target}, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            x = torch.randn(8, 4)
            with torch.no_grad():
                goal = target(x)
            optimizer.zero_grad()
            (online(x) - goal - 1).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), online.parameters()):
                    slow.lerp_(fast, 0.1)
            audit.step()
    ```
    ## Good
    ```python
    import copy

    online = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    target = copy.deepcopy(online).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    with sl.audit(model={"online": online, "target": target}, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            x = torch.randn(8, 4)
            with torch.no_grad():
                goal = target(x)
            optimizer.zero_grad()
            (online(x) - goal - 1).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), online.parameters()):
                    slow.lerp_(fast, 0.1)
                for slow, fast in zip(target.buffers(), online.buffers()):
                    slow.copy_(fast)
            audit.step()
    ```
    ## Fix
    Copy the buffers as well, or keep the copy in train mode where its own statistics are wanted.

    ## Source
    https://github.com/DLR-RM/stable-baselines3/pull/1004.
    """

    code = "SL721"
    title = "running statistics left behind"
    severity = "warning"
    hears = frozenset(("batch_norm",))

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._times: Counter[str] = Counter()

    def hear(self, call: Call) -> Iterator[Fault]:
        """At the third change of the weights of such a module."""
        module, path = call.tape.running, call.tape.module
        if not isinstance(module, _NormBase) or module.training or not _is_untouched(module):
            return
        if not module.affine or module.weight.requires_grad:
            return
        weight = module.weight
        before = self._weights.get(path)
        if before is not None and not torch.equal(before, weight):
            self._times[path] += 1
        self._weights[path] = weight.detach().clone()
        if self._times[path] == 3:
            self._times[path] += 1
            yield self.fault(
                f"the weights of `{path}` are moved, and its running_mean and running_var are still 0 and 1, as in a "
                "new module",
                where=at(call.site, f"forward of `{path}`"),
                why="a moving average over parameters() leaves out buffers: in eval mode this copy normalises with "
                "statistics that nobody has ever updated",
                fix="copy the buffers too: `for t, b in zip(target.buffers(), model.buffers()): t.copy_(b)`",
                names=(path,),
            )


def _is_untouched(module: _NormBase) -> bool:
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None or mean.is_meta:
        return False
    return not bool(mean.any()) and bool((variance == 1).all())
