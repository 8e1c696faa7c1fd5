"""Random states as tensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safeloop.step.randomness import HostState, RandomState


def packed_state(state: RandomState, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`state` as JSON; its larger parts go into `tensors`."""
    if state.cpu is not None:
        tensors["random/cpu"] = state.cpu.clone()
    for index, one in state.cuda:
        tensors[f"random/cuda/{index}"] = one.clone()
    packed: dict[str, Any] = {"cuda": [index for index, _ in state.cuda]}
    if state.host is None:
        return packed
    version, words, gauss = state.host.python
    name, keys, position, has_gauss, cached = state.host.numpy
    tensors["random/python"] = torch.tensor(words, dtype=torch.int64, device="cpu")
    tensors["random/numpy"] = torch.from_numpy(keys.astype(np.int64))
    return packed | {"python": [version, gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}


def unpacked_state(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RandomState:
    """What `packed_state` was given; of CUDA devices, those that this machine has.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    cpu = tensors.get("random/cpu")
    if cpu is not None and cpu.dtype != torch.uint8:
        raise ValueError("no random state as a bundle writes it")
    here = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    cuda = tuple((index, tensors[f"random/cuda/{index}"]) for index in packed["cuda"] if index in here)
    return RandomState(cpu, cuda, _host(packed, tensors) if "python" in packed else None)


def _host(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HostState:
    version, gauss = packed["python"]
    name, position, has_gauss, cached = packed["numpy"]
    words = tuple(tensors["random/python"].tolist())
    keys = tensors["random/numpy"].numpy().astype(np.uint32)
    if name != "MT19937" or len(words) != 625 or keys.shape != (624,):
        raise ValueError("no random state as a bundle writes it")
    return HostState((version, words, gauss), (name, keys, int(position), int(has_gauss), float(cached)))
