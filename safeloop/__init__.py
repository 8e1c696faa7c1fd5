"""A PyTorch training loop in which a gradient bug cannot stay silent.

The names are loaded when they are first used, so that `import safeloop` costs nothing and needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeloop import autograd as autograd
    from safeloop.audit import audit as audit
    from safeloop.derivatives import derivatives as derivatives
    from safeloop.evaluation import needs_grad as needs_grad
    from safeloop.faults import Fault as Fault
    from safeloop.faults import FaultError as FaultError
    from safeloop.outcome import RunResult as RunResult
    from safeloop.penalties.points import interpolate as interpolate
    from safeloop.phases import phase as phase
    from safeloop.replay import replay as replay
    from safeloop.trainer import Trainer as Trainer

__version__ = "0.1.0"

__all__ = [
    "Fault",
    "FaultError",
    "RunResult",
    "Trainer",
    "__version__",
    "audit",
    "autograd",
    "derivatives",
    "interpolate",
    "needs_grad",
    "phase",
    "replay",
]

_HOMES = {
    "Fault": "safeloop.faults",
    "FaultError": "safeloop.faults",
    "RunResult": "safeloop.outcome",
    "Trainer": "safeloop.trainer",
    "audit": "safeloop.audit",
    "interpolate": "safeloop.penalties.points",
    "derivatives": "safeloop.derivatives",
    "needs_grad": "safeloop.evaluation",
    "phase": "safeloop.phases",
    "replay": "safeloop.replay",
}


def __getattr__(name: str) -> Any:
    if name == "autograd":  # a module, whose names are loaded when they are first used
        return import_module("safeloop.autograd")
    if name not in _HOMES:
        raise AttributeError(f"module 'safeloop' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys() | {"autograd"})


class _Package(ModuleType):
    """Keeps a public name for its object where a folder is called the same.

    The import system binds a folder on its package once it is imported; `safeloop.audit` would then be the folder.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
