"""Which parameter is this tensor, or a part of?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from safeloop.autograd.writes import storage_pointer


class ParameterNames:
    """Names of parameters by identity and by memory, looked up when asked, since parameters move.

    Args:
        parameters: full name -> parameter; the mapping is kept and read anew each time.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def of(self, tensor: Tensor, origin: Tensor | None = None) -> str:
        """The name of the parameter that `origin` is, or whose memory `tensor` begins in; empty where none is."""
        for name, parameter in self._parameters.items():
            if parameter is tensor or parameter is origin:
                return name
        pointer = storage_pointer(tensor)
        if not pointer:
            return ""
        begin = tensor.storage_offset()
        for name, parameter in self._parameters.items():
            first = parameter.storage_offset()
            if storage_pointer(parameter) == pointer and first <= begin < first + max(parameter.numel(), 1):
                return name
        return ""
