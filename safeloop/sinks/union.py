"""The sinks by name. A new sink is one file and one name in each of these."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from safeloop.sinks.console import Console
from safeloop.sinks.jsonl import JsonLines
from safeloop.sinks.tensorboard import TensorBoard

SinkName = Literal["tensorboard", "console", "jsonl"]
SinkSpec = Annotated[TensorBoard | Console | JsonLines, Field(discriminator="type")]

DEFAULTS: dict[SinkName, TensorBoard | Console | JsonLines] = {
    "tensorboard": TensorBoard(),
    "console": Console(),
    "jsonl": JsonLines(),
}
"""What a bare name in `log.sinks` stands for."""
