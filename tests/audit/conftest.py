"""What tests of a foreign loop share: a watch that also looks at our own errors and at what is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack

import safeloop as sl
from safeloop.audit import Audit

Watch = Callable[..., AbstractContextManager[Audit]]


@contextmanager
def _watched(model: Any, optimizers: Any = None, **options: Any) -> Iterator[Audit]:
    """An audit that collects; on exit nothing of it may be left, and no listener of ours may have failed."""
    options.setdefault("on_fault", "collect")
    audit = sl.audit(model=model, optimizers=optimizers, **options)
    broken: list[Exception] = []
    try:
        with audit:
            assert audit._watch is not None
            broken = audit._watch._open.tape.broken
            yield audit
    finally:
        assert broken == []
        assert not _get_current_function_mode_stack()
        assert not modules._global_forward_pre_hooks
        assert not modules._global_forward_hooks
        for optimizer in audit.optimizers.values():
            assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)
            assert not getattr(optimizer, "_optimizer_step_post_hooks", None)


@pytest.fixture
def watched() -> Watch:
    """A watch over a loop, to be used with `with`."""
    return _watched
