"""Where a NaN or an infinity comes from: the first operation that made one, in forward or backward, and why."""

from safeloop.nonfinite.birth import Birth, Reading
from safeloop.nonfinite.locator import Locator

__all__ = ["Birth", "Locator", "Reading"]
