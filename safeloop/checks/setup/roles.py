"""What the name of a network says that it is for: a target or teacher, the one that is trained, or neither."""

from __future__ import annotations

import re

# fmt: off
_APART = frozenset({
    "target", "targ", "targets", "teacher", "ema", "momentum", "old", "frozen", "reference", "ref", "slow",
    "shadow", "averaged", "avg", "lagged", "delayed", "polyak", "prev", "previous", "snapshot",
})
_TRAINED = frozenset({
    "online", "policy", "local", "current", "curr", "main", "live", "student", "learner", "base", "eval",
    "behavior", "behaviour", "new", "active", "train", "training", "trained", "trainable", "predict", "prediction",
    "primary", "actor", "critic", "value", "agent", "model", "net", "network", "dqn", "q", "qf", "qnet", "qnetwork",
    "encoder", "backbone",
})
_NOT_OF_THE_FORWARD = frozenset({
    "loss", "losses", "criterion", "metric", "metrics", "trainer", "logger", "config", "cfg", "perceptual", "lpips",
    "reward", "judge", "disc", "discriminator", "critic", "generator", "parent", "owner",
})
_WHOLE = frozenset({"model", "policy", "net", "network", "actor", "critic", "agent"})
_VAGUE = frozenset({"ref", "reference", "prev", "previous", "slow"})
# fmt: on
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def words(name: str) -> tuple[str, ...]:
    """The words of a Python name, in small letters: `targetQ_net` has `target`, `q`, `net`."""
    return tuple(word.lower() for word in _CAMEL.findall(name))


def is_apart(name: str) -> bool:
    """Whether the name is that of a network kept apart from the trained one: target, teacher, average, old, ..."""
    return bool(_APART.intersection(words(name)))


def is_kept_out(name: str) -> bool:
    """Whether the name is that of something which a model uses and does not own: a teacher, a loss, a trainer."""
    return is_apart(name) or bool(_NOT_OF_THE_FORWARD.intersection(words(name)))


def is_counterpart(name: str, other: str) -> bool:
    """Whether `name` says that it is kept apart from `other`: `target_net` of `policy_net`, `old_actor` of `actor`.

    `ref_encoder` is no counterpart of `encoder`, and `target_encoder` is none of `text_encoder` or `source_encoder`:
    these share weights for good reasons.
    """
    if not is_apart(name) or is_apart(other):
        return False
    stem = set(words(name)) - _APART
    rest = set(words(other)) - stem
    if _VAGUE.intersection(words(name)) and not stem <= _WHOLE:
        return False
    return rest <= _TRAINED
