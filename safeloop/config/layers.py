"""Layers of a config: what is written later or nearer wins, section by section, and every value keeps its origin."""

from __future__ import annotations

from safeloop.config.nodes import Node, Origin, Path

CAPITALS = ("T_0", "T_max", "T_mult")
"""Arguments of torch with capital letters; environment variables are usually written in capitals throughout."""


def merge(base: Node, over: Node) -> Node:
    """`over` laid on `base`.

    Sections are merged key by key; another `type` or `target` replaces the whole section. Lists are replaced, except
    that a section of indices (from an override `a.0=x`) sets single items.
    """
    if isinstance(base.value, list) and isinstance(over.value, dict) and _are_indices(over.value, len(base.value)):
        items = list(base.value)
        for index, node in over.value.items():
            items[int(index)] = merge(items[int(index)], node)
        return Node(items, base.at, base.key)
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or _is_another(base, over):
        return over
    merged = dict(base.value)
    for name, node in over.value.items():
        merged[name] = merge(merged[name], node) if name in merged else node
    nearer = over if over.at.line or not base.at.line else base
    return Node(merged, nearer.at, nearer.key)


def name_the_optimizer(layer: Node, base: Node | None = None) -> Node:
    """The layer with a single, nameless optimizer put under `main`; a layer on such a one may say `optimizers.lr`."""
    section = layer.child("optimizers")
    if section is None or not isinstance(section.value, dict):
        return layer
    if not _is_nameless(section) and not _is_main_alone(base):
        return layer
    own = {key: node for key, node in section.value.items() if _is_nameless(section) or not _is_named(key, node)}
    if not own:
        return layer
    named = {key: node for key, node in section.value.items() if key not in own}
    optimizers = Node({"main": Node(own, section.at, section.key), **named}, section.at, section.key)
    return Node({**layer.value, "optimizers": optimizers}, layer.at, layer.key)


def name_the_optimizers(layer: Node, base: Node | None = None) -> Node:
    """The layer with every nameless optimizer under `main`, those of stages included."""
    layer = name_the_optimizer(layer, base)
    stages = layer.child("stages")
    if stages is None or not isinstance(stages.value, dict):
        return layer
    named = {
        name: name_the_optimizer(stage, base.find(("stages", name)) if base is not None else None)
        for name, stage in stages.value.items()
    }
    return Node({**layer.value, "stages": Node(named, stages.at, stages.key)}, layer.at, layer.key)


def nested(parts: Path, value: Node, key: Origin) -> Node:
    """Sections around a value: `("run", "seed")` gives `{run: {seed: value}}`."""
    node = Node(value.value, value.at, key)
    for part in reversed(parts):
        node = Node({str(part): node}, value.at, key)
    return node


def spelled(parts: list[str], base: Node) -> list[str]:
    """The parts of an environment variable's name as the config spells them: as `base` does, or in torch's capitals."""
    found: list[str] = []
    node: Node | None = base
    for part in (part.lower() for part in parts):
        known = list(node.value) if node is not None and isinstance(node.value, dict) else []
        name = part if part in known else next((name for name in (*known, *CAPITALS) if name.lower() == part), part)
        found.append(name)
        node = (
            node.child(int(name) if isinstance(node.value, list) and name.isdecimal() else name)
            if node is not None
            else None
        )
    return found


def without(node: Node, path: Path) -> Node:
    """The node without what stands at a path."""
    first, *rest = path
    inner = node.child(first)
    if inner is None or not isinstance(node.value, dict):
        return node
    others = {key: value for key, value in node.value.items() if key != first}
    return Node({**others, first: without(inner, tuple(rest))} if rest else others, node.at, node.key)


def _are_indices(section: dict[str, Node], length: int) -> bool:
    return bool(section) and all(key.isdecimal() and int(key) < length for key in section)


def _is_another(base: Node, over: Node) -> bool:
    tags = [tag for tag in ("type", "target") if tag in over.value]
    return bool(tags and base.value.keys() & {"type", "target"}) and any(
        tag not in base.value or base.value[tag].plain() != over.value[tag].plain() for tag in tags
    )


def _is_nameless(section: Node) -> bool:
    kinds = [section.child("type"), section.child("target")]
    return any(kind is not None and not isinstance(kind.value, dict) for kind in kinds)


def _is_named(key: str, node: Node) -> bool:
    return key == "main" or (key not in ("scheduler", "args") and isinstance(node.value, dict) and _is_nameless(node))


def _is_main_alone(base: Node | None) -> bool:
    optimizers = base.child("optimizers") if base is not None else None
    if optimizers is None or not isinstance(optimizers.value, dict) or optimizers.value.keys() != {"main"}:
        return False
    main: Node = optimizers.value["main"]
    return main.key == optimizers.key
