"""Weights that are kept for later, and go on changing with the live ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from safeloop.checks.check import Check
from safeloop.faults import Fault

_KEPT = re.compile(r"(^|_|\.)(best|initial|init|orig|original|backup|snapshot|previous|prev|before)(_|$|\d)")
_SCANS = 2


class KeptStateIsLive(Check):
    """The best or the first weights are kept as a `state_dict` without a copy: they are always the latest ones.

    ## What it does
    Looks at variables and attributes whose name says that weights are kept (best, initial, backup, snapshot, previous)
    and tells of a dict of tensors that share the memory of the model's own, after it was there at two looks. Functions
    that save to a file are left alone. Cost: a look at the local variables in three of the first 20 iterations.

    ## Why it is bad
    `state_dict()` returns views of the live weights. Every step changes what was kept, so that restoring it restores
    nothing: the "best" model is the last one, and an experiment that rewinds to the first weights does not.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        best_state = model.state_dict()
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    import copy

    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        best_state = copy.deepcopy(model.state_dict())
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    `copy.deepcopy(model.state_dict())`, or `{k: v.detach().clone() for k, v in model.state_dict().items()}`.

    ## Source
    https://github.com/thunlp/OpenKE/pull/131.
    """

    code = "SL720"
    title = "kept weights are the live ones"
    severity = "warning"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._times: Counter[str] = Counter()

    def kept(self, holders: Iterable[tuple[str, Any]]) -> Iterator[Fault]:
        """The faults of values by name, at the second look that finds one."""
        live: dict[int, str] | None = None
        seen: set[int] = set()
        for name, value in holders:
            if id(value) in seen or not _KEPT.search(name.lower()) or not isinstance(value, Mapping):
                continue
            seen.add(id(value))
            live = live or {p.data_ptr(): path for path, p in self._model.named_parameters() if p.numel()}
            shared = _shared(value, live)
            self._times[name] += bool(shared)
            if shared and self._times[name] == _SCANS:
                yield self.fault(
                    f"`{name}` shares memory with the live weights of `{shared[0]}`: each step changes it",
                    where=f"`{name}`",
                    why="state_dict() returns the live tensors, not copies: what was kept is always the latest",
                    fix=f"`{name} = copy.deepcopy(model.state_dict())`",
                    names=(name,),
                )


def _shared(value: Mapping[Any, Any], live: Mapping[int, str], depth: int = 1) -> list[str]:
    """The parameters whose memory the plain tensors of a dict share, where most of its tensors do."""
    tensors = [t for t in value.values() if isinstance(t, Tensor)]
    if not tensors and depth:
        inner = [v for v in value.values() if isinstance(v, Mapping)]
        return next(filter(None, (_shared(v, live, depth - 1) for v in inner)), [])
    plain = [t for t in tensors if not isinstance(t, nn.Parameter) and not t.requires_grad and t.numel()]
    shared = [live[t.data_ptr()] for t in plain if t.data_ptr() in live]
    return shared if 2 * len(shared) >= len(tensors) else []
