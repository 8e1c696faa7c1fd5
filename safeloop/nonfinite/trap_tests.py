"""What a trap may ask of a birth: the values that the operation was given, and those that the forward had kept."""

from __future__ import annotations

from safeloop.nonfinite.birth import Birth


def any_value(birth: Birth) -> bool:
    """Asks nothing."""
    return True


def is_custom(birth: Birth) -> bool:
    """Born in the backward of a user's own function."""
    return birth.is_custom


def is_second_order(birth: Birth) -> bool:
    """Born at a node that a gradient computation had made."""
    return birth.call in ("grad", "backward")


def is_hidden(birth: Birth) -> bool:
    """The value was masked out."""
    return birth.is_hidden


def is_half(birth: Birth) -> bool:
    """The result is float16, whose largest number is 65504."""
    return birth.dtype == "float16"


def has_no_entries(birth: Birth) -> bool:
    """An input is empty."""
    return any(not reading.size for reading in birth.inputs)


def has_infinity(birth: Birth) -> bool:
    """An input holds infinity."""
    return any(reading.num_inf for reading in birth.inputs)


def has_zero(birth: Birth) -> bool:
    """An input, or what the forward kept, holds a zero."""
    return any(reading.num_zeros for reading in (*birth.inputs, *birth.saved))


def has_zero_divisor(birth: Birth) -> bool:
    """The last input, or what the forward kept of it, holds a zero."""
    return any(reading.num_zeros for reading in (*birth.inputs[-1:], *birth.saved[-1:]))
