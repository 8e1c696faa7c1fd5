"""What a bundle holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from safeloop.step.randomness import RandomState

FORMAT = 1
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
TENSORS = "tensors.safetensors"
FILES = (CONFIG, TENSORS)
"""what the manifest has checksums of; nothing else in the folder is ever opened"""


@dataclass(frozen=True)
class Bundle:
    """A turn that was refused or that failed, read back."""

    path: Path
    step: int
    phase: str
    fault: str
    """the text of the fault, or of another error, on the machine where it happened"""
    is_failed: bool
    """whether it ended the turn before there were gradients to look at"""
    needs: tuple[str, ...]
    """live objects that the run was given in code, and that the config cannot build"""
    weights: Mapping[str, Tensor]
    """parameters and buffers by name, from before the update"""
    eval_modules: Sequence[str]
    """names of the modules in eval mode"""
    window: Sequence[Any] | None
    """the micro-batches; None where they could not be written"""
    refused: str
    """why they could not"""
    random: RandomState
    terms: Mapping[str, Tensor]
    """loss term -> its value, 0-d"""
    scale: float | None
    """gradient scale of fp16"""
    versions: Mapping[str, str]
    """of safeloop and torch"""
