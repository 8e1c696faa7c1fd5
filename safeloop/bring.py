"""What a user hands over as live objects, kept apart from what the config describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from safeloop.data.config import DataConfig
from safeloop.data.source import Source, open_source
from safeloop.target import TargetSpec

if TYPE_CHECKING:
    from safeloop.config import Loaded


@dataclass(frozen=True)
class Brought:
    """Live objects; None where the config describes the part."""

    model: nn.Module | None = None
    train: Any = None
    eval: Any = None
    optimizers: Mapping[str, Optimizer] | None = None

    @property
    def names(self) -> set[str]:
        """Which parts are live, by the names that `safeloop.config.load` knows."""
        parts = {"model": self.model, "data": self.train, "eval_data": self.eval, "optimizers": self.optimizers}
        return {name for name, part in parts.items() if part is not None}

    def build_model(self, loaded: Loaded) -> nn.Module:
        """The live model, or the one that the config describes."""
        if self.model is not None:
            return self.model
        assert loaded.config.model is not None, "load() requires a model"
        model = loaded.config.model.build(nn.Module, loaded.allow)
        assert isinstance(model, nn.Module)
        return model

    def train_source(self, loaded: Loaded) -> Source:
        """Training data as batches."""
        data = loaded.config.data or DataConfig.model_validate({})
        train = self.train if self.train is not None else _built(data.train, loaded)
        return open_source(
            train,
            batch_size=data.batch_size,
            seed=loaded.config.run.seed,
            shuffle=data.shuffle,
            drop_last=data.drop_last,
            num_workers=data.num_workers,
        )

    def eval_source(self, loaded: Loaded) -> Source | None:
        """Evaluation data as batches, in its own order; None where there is none."""
        data = loaded.config.data or DataConfig.model_validate({})
        held_out = self.eval if self.eval is not None else _built(data.eval, loaded)
        if held_out is None:
            return None
        size = data.eval_batch_size or data.batch_size
        return open_source(
            held_out, batch_size=size, seed=loaded.config.run.seed, shuffle=False, num_workers=data.num_workers
        )


def bring(
    *, model: Any, data: Any, eval_data: Any, optimizers: Any, sections: Mapping[str, Any]
) -> tuple[Brought, dict[str, Any]]:
    """Tell live objects from config sections; the second result holds the sections alone."""
    rest = dict(sections)
    live_model = model if isinstance(model, nn.Module) else None
    if live_model is None and model is not None:
        rest["model"] = model
    train, held_out = data, eval_data
    if isinstance(data, Mapping) and not isinstance(data, Dataset):
        section = dict(data)
        train = section.pop("train") if _is_live(section.get("train")) else None
        held_out = section.pop("eval") if _is_live(section.get("eval")) else eval_data
        rest["data"] = section
    return Brought(live_model, train, held_out, _ready(optimizers, rest)), rest


def _ready(optimizers: Any, rest: dict[str, Any]) -> Mapping[str, Optimizer] | None:
    if isinstance(optimizers, Optimizer):
        return {"main": optimizers}
    if isinstance(optimizers, Mapping) and optimizers and all(isinstance(o, Optimizer) for o in optimizers.values()):
        return dict(optimizers)
    if optimizers is not None:
        rest["optimizers"] = optimizers
    return None


def _is_live(part: Any) -> bool:
    return part is not None and (isinstance(part, (Dataset, DataLoader)) or not isinstance(part, (Mapping, TargetSpec)))


def _built(target: TargetSpec | None, loaded: Loaded) -> Any:
    return None if target is None else target.build((Dataset, DataLoader), loaded.allow)
