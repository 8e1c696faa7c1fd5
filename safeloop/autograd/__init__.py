"""Pure functions of tensors and autograd graphs: norms, walks, products. Nothing here knows a Trainer or a config.

The public names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeloop.autograd.curvature import Eigenvalue as Eigenvalue
    from safeloop.autograd.curvature import Estimate as Estimate
    from safeloop.autograd.curvature import hessian_diagonal as hessian_diagonal
    from safeloop.autograd.curvature import hessian_trace as hessian_trace
    from safeloop.autograd.curvature import power_iteration as power_iteration
    from safeloop.autograd.curvature import top_eigenvalue as top_eigenvalue
    from safeloop.autograd.descent import adapt as adapt
    from safeloop.autograd.descent import displaced as displaced
    from safeloop.autograd.products import HessianProducts as HessianProducts
    from safeloop.autograd.products import gauss_newton_product as gauss_newton_product
    from safeloop.autograd.products import hvp as hvp
    from safeloop.autograd.products import jvp as jvp
    from safeloop.autograd.products import vjp as vjp

_HOMES = {
    "Eigenvalue": "curvature",
    "Estimate": "curvature",
    "HessianProducts": "products",
    "adapt": "descent",
    "displaced": "descent",
    "gauss_newton_product": "products",
    "hessian_diagonal": "curvature",
    "hessian_trace": "curvature",
    "hvp": "products",
    "jvp": "products",
    "power_iteration": "curvature",
    "top_eigenvalue": "curvature",
    "vjp": "products",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safeloop.autograd' has no attribute {name!r}")
    return getattr(import_module(f"safeloop.autograd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys())
