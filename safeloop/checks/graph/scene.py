"""Where one of torch's own errors was raised: the user's line, the module, the tensors that the line names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor, nn

from safeloop.autograd.saved_changes import SavedTensorChange
from safeloop.checks.setup.scan import items_of
from safeloop.checks.source import Place, frames, is_user_code, user_frame

_CHAIN = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Scene:
    """An error of torch's, with what its traceback tells."""

    message: str
    model: nn.Module
    terms_source: str
    frame: FrameType | None
    place: Place | None
    module: str
    """the innermost module of the model that was running: `` `0` (MaskedLinear)``; empty where none was"""
    inference: tuple[str, ...]
    """inference tensors among the local variables of the user's functions"""
    change: SavedTensorChange | None = None
    """what a guard of saved tensors knows of it, where one was on"""

    @property
    def where(self) -> str:
        """The user's line, the module and the loss function, as far as they are known."""
        if self.place is None:
            forward = "" if self.change is not None else "; torch keeps no forward line"
            return f"backward pass of the loss terms of {self.terms_source}{forward}"
        module = f"; module {self.module}" if self.module else ""
        # a loop that is not ours has no loss function: there the line itself is given
        source = "" if self.terms_source == str(self.place) else f"; loss function {self.terms_source}"
        return f"{self.place}{module}{source}"

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the user's line names, by the expression that names them; looked up without running code."""
        if self.frame is None or self.place is None:
            return {}
        chains = (_resolve(chain.split("."), self.frame) for chain in _CHAIN.findall(self.place.text))
        return dict(filter(None, chains))

    def parameter_name(self, tensor: Tensor) -> str:
        """The full name of a parameter of the model; empty for any other tensor."""
        return next((name for name, p in self.model.named_parameters() if p is tensor), "")


def scene_of(error: BaseException, terms_source: str, model: nn.Module) -> Scene:
    """Read the traceback of `error`, which must still be attached."""
    found = user_frame(error.__traceback__)
    frame, place = found if found is not None else (None, None)
    return Scene(
        message=str(error),
        model=model,
        terms_source=terms_source,
        frame=frame,
        place=place,
        module=_module(error.__traceback__, model),
        inference=tuple(dict.fromkeys(_inference(error.__traceback__))),
        change=getattr(error, "change", None),
    )


def _module(traceback: TracebackType | None, model: nn.Module) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    running = [frame.f_locals.get("self") for frame, _ in frames(traceback)]
    inner = next((m for m in reversed(running) if isinstance(m, nn.Module) and id(m) in names), None)
    return f"`{names[id(inner)]}` ({type(inner).__name__})" if inner is not None and names[id(inner)] else ""


def _inference(traceback: TracebackType | None) -> Iterator[str]:
    for frame in (frame for frame, _ in frames(traceback) if is_user_code(frame)):
        for name, value in frame.f_locals.items():
            for key, item in items_of(value):
                if isinstance(item, Tensor) and item.is_inference():
                    yield f"{name}[{key!r}]"
            if isinstance(value, Tensor) and value.is_inference():
                yield name


def _resolve(parts: list[str], frame: FrameType) -> tuple[str, Tensor] | None:
    missing = object()
    value: Any = frame.f_locals.get(parts[0], frame.f_globals.get(parts[0], missing))
    for count, part in enumerate([*parts[1:], ""], 1):
        if isinstance(value, Tensor):
            return ".".join(parts[:count]), value
        held = getattr(value, "__dict__", {})
        if isinstance(value, nn.Module):
            held = {**held, **value._modules, **value._buffers, **value._parameters}
        value = held.get(part, missing)
    return None
