"""Where the classes of a model store and use attributes, read from their bytecode: built once, or renewed later."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType

from torch import nn

from safeloop.autograd.sites import code_name
from safeloop.checks.source import Place

_FILLING = frozenset({"append", "appendleft", "extend", "insert", "update", "setdefault", "add"})


@dataclass(frozen=True)
class AttributeUses:
    """Which attributes the modules of a model store when they are built, and which later."""

    built: Mapping[tuple[type, str], Place]
    """(class, attribute) -> the line that stores it while the module is built"""
    renewed: frozenset[str]
    """attributes that some method stores after that: caches, states carried from batch to batch"""
    used: frozenset[str]
    """attributes that some method reads after that"""
    filled: frozenset[str]
    """containers into which some method puts items after that: `self.cache[key] = x`, `self.seen.append(x)`"""
    is_dynamic: bool
    """whether some method calls `setattr`, so that `renewed` may be incomplete"""

    def place(self, module: nn.Module, attribute: str) -> Place | None:
        """The line that builds this attribute, where a class of the module has it."""
        found = (self.built.get((cls, attribute)) for cls in type(module).__mro__)
        return next((place for place in found if place is not None), None)

    def may_be_renewed(self, attribute: str) -> bool:
        """Whether the attribute may be replaced between two batches."""
        return attribute in self.renewed or attribute in self.filled or self.is_dynamic


def stored_by(cls: type) -> frozenset[str]:
    """Attributes that the methods of a class, other than torch's `nn.Module`, store."""
    return frozenset(attribute for code in _all_codes(cls) for attribute, _ in _stores(code))


def read_through_self(model: nn.Module) -> frozenset[str]:
    """Attributes that some class in the model reads as `self.NAME` or further along, `self.encoder.NAME`."""
    classes = {type(module) for module in model.modules()}
    return frozenset(name for cls in classes for code in _all_codes(cls) for name in _loads_through_self(code))


def forward_reads(module: nn.Module) -> frozenset[str]:
    """Attributes that `forward` of this module reads, or a method that it leads to."""
    methods: dict[str, tuple[CodeType, ...]] = {}
    for base in reversed(_own_bases(type(module))):
        methods.update({name: tuple(_codes(value)) for name, value in vars(base).items()})
    reached, waiting, read = set(), ["forward"], set()
    while waiting:
        method = waiting.pop()
        if method in reached:
            continue
        reached.add(method)
        names = {name for code in methods.get(method, ()) for name in code.co_names}
        read |= names
        waiting.extend(names & methods.keys())
    return frozenset(read)


def attribute_uses(model: nn.Module) -> AttributeUses:
    """Read the methods of every class in the model; torch's own `nn.Module` is left out."""
    built: dict[tuple[type, str], Place] = {}
    renewed: set[str] = set()
    used: set[str] = set()
    filled: set[str] = set()
    is_dynamic = False
    for cls in {base for module in model.modules() for base in _own_bases(type(module))}:
        methods = {name: tuple(_codes(value)) for name, value in vars(cls).items()}
        building = _building(methods)
        for name, codes in methods.items():
            for code in codes:
                if name in building:
                    built.update({(cls, attribute): place for attribute, place in _stores(code)})
                    continue
                renewed.update(attribute for attribute, _ in _stores(code))
                used.update(_loads(code))
                filled.update(_fills(code))
                is_dynamic = is_dynamic or (_is_of_user(cls) and "setattr" in code.co_names)
    return AttributeUses(built, frozenset(renewed), frozenset(used), frozenset(filled), is_dynamic)


def _own_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base not in nn.Module.__mro__]


def _all_codes(cls: type) -> Iterator[CodeType]:
    for base in _own_bases(cls):
        for value in vars(base).values():
            yield from _codes(value)


def _is_of_user(cls: type) -> bool:
    return cls.__module__.partition(".")[0] != "torch"


def _codes(value: object) -> Iterator[CodeType]:
    function = getattr(value, "__func__", getattr(value, "fget", value))
    waiting = [function.__code__] if isinstance(function, FunctionType) else []
    while waiting:
        code = waiting.pop()
        yield code
        waiting.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))


def _building(methods: Mapping[str, tuple[CodeType, ...]]) -> set[str]:
    """`__init__` and the methods that it calls and no other method mentions."""
    mentions = {name: {used for code in codes for used in code.co_names} for name, codes in methods.items()}
    building = {"__init__"}
    while True:
        called = {name for name in building & mentions.keys() for name in mentions[name] & methods.keys()}
        elsewhere = {name for method, names in mentions.items() if method not in building for name in names}
        more = called - elsewhere - building - {"forward"}
        if not more:
            return building
        building |= more


def _stores(code: CodeType) -> Iterator[tuple[str, Place]]:
    spans = list(code.co_lines())
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR":
            line = next((n for start, end, n in spans if n and start <= instruction.offset < end), code.co_firstlineno)
            yield str(instruction.argval), Place(code.co_filename, line, code_name(code))


def _loads(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield str(instruction.argval)


def _loads_through_self(code: CodeType) -> Iterator[str]:
    own = code.co_varnames[:1]
    is_own = False
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if is_own:
                yield str(instruction.argval)
        elif instruction.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            loaded = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
            is_own = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded[-1:] == own


def _fills(code: CodeType) -> Iterator[str]:
    recent: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            name = str(instruction.argval)
            if name in _FILLING and recent:
                yield recent[-1]
            recent.append(name)
        elif instruction.opname == "STORE_SUBSCR":
            yield from recent
        if instruction.opname.startswith(("STORE_", "POP_TOP", "RETURN")):
            recent = []
