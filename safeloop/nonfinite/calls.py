"""Maps each autograd node to the call that made it: the user's line and the module that was running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from safeloop.checks.source import Place
from safeloop.nonfinite.frames import user_place
from safeloop.nonfinite.modules import ModuleStack
from safeloop.nonfinite.reading import tensors_in

_GETTERS = ("__get__", "__set__")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a torch function."""

    name: str
    place: Place | None
    module: str


class CallMap(TorchFunctionMode):
    """Watches torch functions while it is entered. `calls` holds every node that they made.

    A function may make several nodes (`cross_entropy` makes two): all those between its results and its arguments
    count as its own, found by a walk that never goes over a known node again.
    """

    def __init__(self, modules: ModuleStack, top: FrameType | None = None) -> None:
        super().__init__()
        self.calls: dict[Node, Call] = {}
        self._modules = modules
        self._top = top

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _GETTERS:
            return func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        before = {tensor.grad_fn for tensor in given}
        result = func(*args, **kwargs)
        made = [tensor.grad_fn for tensor in (*tensors_in(result), *given)]
        new = [node for node in made if node is not None and node not in before and node not in self.calls]
        if new:
            call = Call(name, user_place(self._top, skip=2), self._modules.path)
            self._claim(new, before, call)
        return result

    def _claim(self, waiting: list[Node], before: set[Node | None], call: Call) -> None:
        while waiting:
            node = waiting.pop()
            if node in self.calls or node in before or hasattr(node, "variable"):
                continue
            self.calls[node] = call
            waiting += [following for following, _ in node.next_functions if following is not None]
