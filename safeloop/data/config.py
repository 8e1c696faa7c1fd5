"""The `data` section of a config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from safeloop.component import Bool, Component, Int
from safeloop.target import TargetSpec


class DataConfig(Component):
    """Which data a run trains on and how it is batched."""

    train: TargetSpec | None = Field(
        None, description="training data: a Dataset, a DataLoader or any iterable of micro-batches"
    )
    eval: TargetSpec | None = Field(None, description="evaluation data, of the same kinds")
    batch_size: Annotated[Int, Field(ge=1)] = Field(
        32, description="samples in a micro-batch; only where safeloop builds the loader"
    )
    eval_batch_size: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="the same for evaluation; null: batch_size"
    )
    shuffle: Bool = Field(
        True, description="a new order in each epoch, a function of (seed, epoch); evaluation is never shuffled"
    )
    drop_last: Bool = Field(False, description="leave out a last training batch that is not full")
    num_workers: Annotated[Int, Field(ge=0)] = Field(
        0, description="processes that read samples; 0: the training process itself"
    )
