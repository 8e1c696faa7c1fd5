"""`target: package.module:Class`: resolved through a list of allowed modules, so that a config cannot run anything."""

from __future__ import annotations

import importlib
import inspect
import keyword
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field

from safeloop.checks.config.document import UnreadableYaml
from safeloop.checks.config.target import TargetArguments, TargetNotAllowed, TargetNotFound, TargetOfWrongClass
from safeloop.checks.config.values import WrongType
from safeloop.component import Component
from safeloop.faults import Fault

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_MODULES = ("torch.nn", "torch.optim", "safeloop")
Bases = type | tuple[type, ...]


class TargetSpec(Component):
    """A class by name, and the arguments to make an object of it."""

    target: str
    """`package.module:Class`; the module must be allowed"""
    args: dict[str, Any] | list[Any] = Field(default_factory=dict)
    """arguments by name, or a list of them in order; a nested `{target:, args:}` is built first"""

    def resolve(self, base: Bases, allow: Collection[str]) -> type[Any]:
        """The class; see `resolve_target`."""
        return resolve_target(self.target, base, allow)

    def build(self, base: Bases, allow: Collection[str]) -> Any:
        """An object of the class. What the class itself raises is left as it is.

        Raises:
            FaultError: SL110 to SL113, before anything was built.
        """
        cls = self.resolve(base, allow)
        for _, fault in argument_faults(cls, self.args):
            raise TargetArguments.error(fault.what, fix=fault.fix)
        args = self.built_args(allow)
        return cls(*args) if isinstance(args, list) else cls(**args)

    def built_args(self, allow: Collection[str]) -> Any:
        """The arguments, with nested targets built."""
        return _built(self.args, allow)


def nested_target(value: Any) -> TargetSpec | None:
    """The target that a nested argument is: a mapping with `target` and at most `args`."""
    if isinstance(value, Mapping) and isinstance(value.get("target"), str) and value.keys() <= {"target", "args"}:
        args = value.get("args", {})
        if isinstance(args, (dict, list)):
            return TargetSpec(target=value["target"], args=args)
    return None


def _built(value: Any, allow: Collection[str]) -> Any:
    spec = nested_target(value)
    if spec is not None:
        return spec.build(object, allow)
    if isinstance(value, dict):
        return {key: _built(inner, allow) for key, inner in value.items()}
    return [_built(inner, allow) for inner in value] if isinstance(value, list) else value


def resolve_target(target: str, base: Bases, allow: Collection[str]) -> type[Any]:
    """The class that a target names.

    Args:
        target: `package.module:Class`.
        base: what it must be a subclass of; a tuple means one of them.
        allow: module prefixes; checked on the text before the import, and on the class's real module after it.

    Raises:
        FaultError: SL110 not allowed, SL111 no such module or class, SL112 of the wrong class.
    """
    module_name, _, name = target.partition(":")
    _refuse_form(target, module_name, name)
    _refuse_module(target, module_name, allow)
    module = _imported(target, module_name)
    found = vars(module).get(name) if name in vars(module) else getattr(module, name, None)
    if found is None:
        near = get_close_matches(name, [n for n in dir(module) if not n.startswith("_")], 1, 0.5)
        raise TargetNotFound.error(
            f"{module_name} has no {name!r}",
            fix=f"did you mean '{module_name}:{near[0]}'?" if near else "name a class of that module",
        )
    bases = base if isinstance(base, tuple) else (base,)
    if not isinstance(found, type) or not issubclass(found, bases):
        wanted = " or ".join(_full_name(one) for one in bases)
        is_what = f"a class ({_full_name(found)})" if isinstance(found, type) else f"a {type(found).__name__}"
        raise TargetOfWrongClass.error(f"{target!r} is {is_what}", fix=f"name a subclass of {wanted}")
    _refuse_module(target, found.__module__, allow)
    return found


def argument_faults(cls: type[Any], args: Mapping[str, Any] | Sequence[Any]) -> Iterator[tuple[str | None, Fault]]:
    """What of `args` does not fit the signature of `cls`: the argument (None: something is missing) and the fault."""
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):  # a class written in C without a signature
        return
    parameters = signature.parameters.values()
    if isinstance(args, Mapping) and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        meant = {name: value for name, value in args.items() if name in names}
        for name in [name for name in args if name not in names]:
            near = get_close_matches(str(name), names, 1, 0.5)
            fix = (f"did you mean {near[0]!r}? " if near else "") + f"accepted: {', '.join(names) or 'none'}"
            yield name, TargetArguments.fault(f"{cls.__qualname__} has no argument {name!r}", fix=fix)
            meant |= dict.fromkeys(near)
        args = meant
    try:
        signature.bind(**args) if isinstance(args, Mapping) else signature.bind(*args)
    except TypeError as error:
        yield (
            None,
            TargetArguments.fault(
                f"{cls.__qualname__}: {error}", fix=f"its signature is {cls.__qualname__}{_short(signature)}"
            ),
        )


def allowed_modules(extra: Collection[str] = (), start: Path | None = None) -> tuple[str, ...]:
    """Module prefixes that targets may name: safeloop's own, `extra`, and those of the nearest pyproject.toml.

    Args:
        extra: from code or the command line.
        start: where to look for pyproject.toml, there and above; the current directory if None.

    Raises:
        FaultError: SL107 or SL103, where that file is broken.
    """
    _, ours = _project(start)
    return tuple(dict.fromkeys((*DEFAULT_MODULES, *ours, *extra)))


def _project(start: Path | None = None) -> tuple[Path | None, tuple[str, ...]]:
    """The folder of the nearest pyproject.toml if it has a `[tool.safeloop]` table, and the modules allowed there."""
    start = (start or Path.cwd()).resolve()
    file = next((f for folder in (start, *start.parents) if (f := folder / "pyproject.toml").is_file()), None)
    if file is None:
        return None, ()
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("safeloop")
    except (OSError, ValueError) as error:
        raise UnreadableYaml.error(f"not TOML: {error}", where=str(file)) from None
    if not isinstance(table, dict):
        return None, ()
    modules = table.get("allow_modules", [])
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        fix = 'write a list: allow_modules = ["mypackage"]'
        raise WrongType.error(f"tool.safeloop.allow_modules is {modules!r}", where=str(file), fix=fix)
    return file.parent, tuple(modules)


@contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    if folder is None or str(folder) in sys.path:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _imported(target: str, module_name: str) -> Any:
    try:
        with _importable(_project()[0]):
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            fix = "correct the name, or start in the folder of the package or of a pyproject.toml with [tool.safeloop]"
            raise TargetNotFound.error(f"no module named {error.name!r}", fix=fix) from None
        raise _import_failed(target, module_name, error) from error
    except Exception as error:
        raise _import_failed(target, module_name, error) from error


def _import_failed(target: str, module_name: str, error: Exception) -> Exception:
    what = f"importing {module_name} fails: {type(error).__name__}: {error}"
    return TargetNotFound.error(what, fix=f"run `python -c 'import {module_name}'` to see the whole traceback")


def _refuse_form(target: str, module_name: str, name: str) -> None:
    parts = [*module_name.split("."), name]
    if any(part.startswith("_") for part in parts):
        raise TargetNotAllowed.error(f"{target!r} names something private", fix="name a public class")
    if "." in name or not all(part.isascii() and part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise TargetNotAllowed.error(
            f"{target!r} is not of the form package.module:Class", fix="write 'package.module:Class'"
        )


def _refuse_module(target: str, module_name: str, allow: Collection[str]) -> None:
    if any(module_name == prefix or module_name.startswith(prefix + ".") for prefix in allow):
        return
    shown = (
        f"module {module_name!r}"
        if target.startswith(module_name + ":")
        else f"{target!r} really lives in {module_name!r}, which"
    )
    top = module_name.partition(".")[0]
    fix = f'add "{top}" to [tool.safeloop] allow_modules in pyproject.toml, or pass --allow-module {top}'
    fix += f"; allowed: {', '.join(allow)}"
    raise TargetNotAllowed.error(f"{shown} is not allowed", fix=fix)


def _full_name(cls: type[Any]) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _short(signature: inspect.Signature) -> str:
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
