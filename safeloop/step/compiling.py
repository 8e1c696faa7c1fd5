"""Compiles a model in place, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from safeloop.checks.setup.compiling import CompileRefused
from safeloop.faults import FaultError


def compiled_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> what is compiled: the model; of a container without a `forward`, the modules that it holds."""
    if _has_forward(model):
        return {"the model": model}
    parts: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        inner = compiled_parts(child)
        parts |= {name if _has_forward(child) else f"{name}.{below}": module for below, module in inner.items()}
    return parts


def compile_model(model: nn.Module, backend: str, trial: Callable[[], object], *, keeps_buffers: bool = False) -> None:
    """Compile the model in place: same module, same parameters, `state_dict` as before.

    Args:
        model: what the loss functions call.
        backend: a name of `torch.compile`'s.
        trial: runs the model once, so that a refusal comes before the first step.
        keeps_buffers: whether several passes go through one graph. A compiled backward pass otherwise reuses the memory
            of what was saved for it, and torch refuses to run it twice.

    Raises:
        FaultError: SL615, torch refuses.
    """
    try:
        for part in compiled_parts(model).values():
            call = torch.compile(_call_of(part), backend=backend)
            part._compiled_call_impl = _keeping_buffers(call) if keeps_buffers else call
        from torch._dynamo.exc import TorchDynamoException
    except (RuntimeError, ImportError) as error:
        raise _refused(error, backend) from error
    try:
        trial()
    except TorchDynamoException as error:
        raise _refused(error, backend) from error


def _call_of(module: nn.Module) -> Callable[..., Any]:
    """What a call of the module does, as a function of ours with code of its own.

    `Module.compile` gives torch its own `_call_impl`, which it leaves uncompiled, without a word, where the `forward`
    is torch's too (`nn.Sequential`). Compiled variants are kept, and their number limited, by code object.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    call.__code__ = call.__code__.replace()
    return call


def _keeping_buffers(call: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever is compiled within a call keeps what its backward pass reads; torch's setting is as before after it."""
    from torch._functorch import config

    def call_keeping(*args: Any, **kwargs: Any) -> Any:
        with config.patch(donated_buffer=False):
            return call(*args, **kwargs)

    return call_keeping


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _refused(error: Exception, backend: str) -> FaultError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CompileRefused.error(
        f"torch refuses to compile the model with `{backend}`: {' '.join(lines[:3])[:600]}",
        where="run.compile",
        why="the backend is not there, a tool that it needs is missing, or it cannot trace the model",
        fix="choose another `run.compile.backend`, or set `run.compile: false`",
    )
