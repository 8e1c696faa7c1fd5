"""Who updates which parameter: by patterns over full names, or by the identity of what a ready optimizer holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.checks.views import Ownership

Patterns = Sequence[str] | Literal["rest"]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether some pattern matches the full parameter name; `*` crosses dots."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter name -> all its names, its own first; a tied parameter has several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {all_names[0]: tuple(all_names) for all_names in names.values()}


def owned_by_patterns(
    model: nn.Module,
    patterns: Mapping[str, Patterns],
    frozen: Sequence[str] = (),
    *,
    further: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Ownership:
    """Ownership as a config declares it.

    Args:
        model: its parameters are looked at, not changed; those with `requires_grad=False` count as frozen on purpose.
        patterns: owner -> `fnmatchcase` patterns over full parameter names, or `rest`: what no other pattern took.
            A tied parameter is matched by any of its names.
        frozen: patterns of parameters that nobody updates.
        further: config path -> patterns that own nothing, and yet should match something.
    """
    names = aliases(model)
    parameters = dict(model.named_parameters())
    claims: dict[str, list[str]] = {name: [] for name in names}
    still = {name for name, all_names in names.items() if any(matches(n, frozen) for n in all_names)}
    still |= {name for name in names if not parameters[name].requires_grad}
    for owner, wanted in patterns.items():
        for name in claims:
            if wanted != "rest" and name not in still and any(matches(n, wanted) for n in names[name]):
                claims[name].append(owner)
    rest = next((owner for owner, wanted in patterns.items() if wanted == "rest"), None)
    if rest is not None:
        for name, owners in claims.items():
            if not owners and name not in still:
                owners.append(rest)
    everything = [name for all_names in names.values() for name in all_names]
    written = {f"optimizers.{owner}.params": wanted for owner, wanted in patterns.items() if wanted != "rest"}
    wanted_somewhere = {**written, **further, "frozen": frozen}
    return _ownership(names, claims, still, patterns, unmatched=_unmatched(everything, wanted_somewhere))


def owned_by_identity(model: nn.Module, optimizers: Mapping[str, Optimizer], frozen: Sequence[str] = ()) -> Ownership:
    """Ownership as ready optimizers have it: each owns the tensors that its param groups hold.

    Tensors that are no parameter of the model are listed as foreign.
    """
    names = aliases(model)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    claims: dict[str, list[str]] = {name: [] for name in names}
    foreign: dict[str, tuple[Tensor, ...]] = {}
    for owner, optimizer in optimizers.items():
        held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        for tensor in held:
            if tensor in name_of:
                claims[name_of[tensor]].append(owner)
        if strangers := tuple(tensor for tensor in held if tensor not in name_of):
            foreign[owner] = strangers
    still = {name for name, all_names in names.items() if any(matches(n, frozen) for n in all_names)}
    still |= {name for parameter, name in name_of.items() if not parameter.requires_grad}
    everything = [name for all_names in names.values() for name in all_names]
    return _ownership(
        names, claims, still, optimizers, foreign=foreign, unmatched=_unmatched(everything, {"frozen": frozen})
    )


def _ownership(
    names: Mapping[str, tuple[str, ...]],
    claims: Mapping[str, Sequence[str]],
    still: Collection[str],
    owners: Iterable[str],
    *,
    foreign: Mapping[str, tuple[Tensor, ...]] = MappingProxyType({}),
    unmatched: Mapping[str, tuple[str, ...]],
) -> Ownership:
    taken = {owner for claimants in claims.values() for owner in claimants} | set(foreign)
    return Ownership(
        owner_of={name: claimants[0] for name, claimants in claims.items() if claimants},
        frozen=tuple(name for name in names if name in still and not claims[name]),
        unowned=tuple(name for name, claimants in claims.items() if not claimants and name not in still),
        duplicated={name: tuple(claimants) for name, claimants in claims.items() if len(claimants) > 1},
        tied={name: all_names[1:] for name, all_names in names.items() if len(all_names) > 1},
        foreign=foreign,
        empty=tuple(owner for owner in owners if owner not in taken),
        unmatched=unmatched,
    )


def _unmatched(names: Collection[str], patterns: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    found = {
        path: tuple(pattern for pattern in wanted if not any(fnmatchcase(name, pattern) for name in names))
        for path, wanted in patterns.items()
    }
    return {path: missing for path, missing in found.items() if missing}
