"""What torch calls its functions, and which of them end a gradient path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ASKS = frozenset(
    [
        ".shape",
        ".dtype",
        ".device",
        ".requires_grad",
        ".grad_fn",
        ".is_leaf",
        ".ndim",
        ".layout",
        ".is_nested",
        ".is_sparse",
        ".is_sparse_csr",
        ".is_cuda",
        ".is_cpu",
        ".is_meta",
        ".is_quantized",
        ".is_mkldnn",
        ".is_mps",
        ".is_xpu",
        ".names",
        ".itemsize",
        ".nbytes",
        "._version",
        "._base",
        "._backward_hooks",
        ".output_nr",
        ".name",
        ".volatile",
        ".retains_grad",
        ".is_ipu",
        ".is_xla",
        ".is_vulkan",
        ".is_maia",
        ".is_mtia",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "data_ptr",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "is_inference",
        "is_signed",
        "is_same_size",
        "is_conj",
        "is_neg",
        "is_pinned",
        "is_shared",
        "is_coalesced",
        "element_size",
        "get_device",
        "__len__",
        "__hash__",
        "__repr__",
        "__format__",
        "__dir__",
        "__reduce_ex__",
        "storage",
        "untyped_storage",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "result_type",
        "can_cast",
        "broadcast_shapes",
        "is_tensor",
        "is_nonzero",
        "_record_function_enter_new",
        "_record_function_exit._RecordFunction",
        "__get__",
    ]
)
"""Questions about a tensor: they carry no value from one to another."""

ESCAPES = frozenset(
    [
        "item",
        "__float__",
        "__int__",
        "__bool__",
        "__index__",
        "__complex__",
        "tolist",
        "numpy",
        "__array__",
        "__dlpack__",
        "__contains__",
    ]
)
"""Functions whose result is no tensor: a value that leaves torch."""

SHAPES_ONLY = frozenset(
    [
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"),
    ]
)
"""Functions that ask a tensor for its shape alone: nothing of its value is in their result."""

COMPARISONS = frozenset(
    [
        *("eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
        *("isnan", "isinf", "isfinite", "isclose", "allclose", "equal", "all", "any", "__bool__", "__contains__"),
    ]
)
"""Functions that a program also calls to look at a value, as in an assertion."""

_REASONS = {
    "detach": "`detach()`",
    "detach_": "`detach_()`",
    ".data": "`.data`",
    "item": "`.item()`, which returns a Python number",
    "__float__": "`float()`, which returns a Python number",
    "__int__": "`int()`, which returns a Python number",
    "__bool__": "a Python condition (`if`, `and`, `max`), which only reads the value",
    "__index__": "an index, which is a Python number",
    "tolist": "`.tolist()`, which returns Python numbers",
    "numpy": "`.numpy()`, which leaves torch",
    "__array__": "numpy, which leaves torch",
    "__dlpack__": "DLPack, which leaves torch",
    "tensor": "`torch.tensor(...)`, which copies the value into a new leaf",
    "as_tensor": "`torch.as_tensor(...)`, which copies the value into a new leaf",
    "new_tensor": "`new_tensor(...)`, which copies the value into a new leaf",
}


def name_of(func: Any) -> str:
    """The name of a torch function; `.data` and `.data=` for an attribute that is read or set."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        return f".{getattr(func.__self__, '__name__', '?')}"
    if name == "__set__":
        return f".{getattr(func.__self__, '__name__', '?')}="
    return name


def cut_reason(name: str, result: Any) -> str:
    """Why a result of this function has no gradient path although an argument has one."""
    if name in _REASONS:
        return _REASONS[name]
    if isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex()):
        return f"`{name}`, whose result is {str(result.dtype).removeprefix('torch.')}: it has no derivative"
    if torch.is_inference_mode_enabled():
        return f"inference mode: `{name}` ran under torch.inference_mode()"
    if not torch.is_grad_enabled():
        return f"no_grad: `{name}` ran with grad mode off"
    return f"`{name}`, which is not differentiable here"


def writes_to(name: str) -> bool:
    """Whether a function writes into its first argument, or gives out memory that can be written unseen."""
    if name.endswith("_"):
        return not name.endswith("__") or name == "__setitem__" or name == "__dlpack__"
    return name in ("numpy", "numpy_", ".data=") or (name.startswith("__i") and name != "__invert__")
