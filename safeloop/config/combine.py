"""What the models cannot see of the `combine` section: what is installed, and what stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from safeloop.checks.config.combine import CombineRefused, PackageMissing
from safeloop.config.errors import Problem
from safeloop.config.nodes import Node, Path, dotted
from safeloop.optim.combining import COMBINE


def combine_problems(root: Node) -> Iterator[Problem]:
    """Everything that is wrong with a `combine` section that is written."""
    section = root.child("combine")
    if section is None or not isinstance(section.value, dict):
        return
    kind = section.child("type")
    spec = COMBINE.get(kind.value) if kind is not None and isinstance(kind.value, str) else None
    missing = [name for name in spec.packages if find_spec(name) is None] if spec is not None else []
    if spec is not None and kind is not None and missing:
        what = f"combine by `{kind.value}` needs {', '.join(missing)}, not installed here"
        yield Problem(PackageMissing.fault(what, fix=spec.install), kind.at, "combine.type")
    for path, node, what, fix in _beside(root):
        yield Problem(CombineRefused.fault(f"`combine` beside {what}", fix=fix), node.at, dotted(path))


def _beside(root: Node) -> Iterator[tuple[Path, Node, str, str]]:
    refused: list[tuple[Path, Any, str, str]] = [
        (("run", "precision"), lambda value: value == "fp16", "fp16", "use bf16 or fp32, or take `combine` out"),
        (
            ("accumulate", "micro_batches"),
            lambda value: isinstance(value, int) and value > 1,
            "accumulation",
            "set it to 1 and raise `data.batch_size`, or take `combine` out",
        ),
        (("simultaneous",), lambda value: value is True, "a simultaneous step", "take one of the two out"),
    ]
    optimizers = root.child("optimizers")
    for name in optimizers.value if optimizers is not None and isinstance(optimizers.value, dict) else ():
        path: Path = ("optimizers", "type") if name == "type" else ("optimizers", name, "type")
        refused.append((path, lambda value: value == "LBFGS", "LBFGS", "use another optimizer, or take `combine` out"))
    for path, is_refused, what, fix in refused:
        node = root.find(path)
        if node is not None and is_refused(node.value):
            yield path, node, what, fix
