"""`explain_path`: why a parameter gets no gradient from a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from safeloop.audit.gradients import cause_of
from safeloop.autograd.survey import survey
from safeloop.autograd.tape import Tape
from safeloop.checks.gradients.history import Cause
from safeloop.evaluation import preserved


def explain_path(compute: Callable[[], Tensor], model: nn.Module, parameter: str) -> Cause | None:
    """Why does this parameter get no gradient from this loss? Found by computing the loss once under a tracing mode.

        cause = explain_path(lambda: loss_of(model, batch), model, "encoder.weight")
        print(cause.text, cause.site)

    Random state, modes, buffers and gradients are as before. Cost: a forward, and about 10 us for each call in it.

    Args:
        compute: computes the loss, a tensor of any shape.
        model: has the parameter.
        parameter: its full name.

    Returns:
        The cause and the user's line; None where a gradient path leads from the parameter to the loss.

    Raises:
        KeyError: the model has no trainable parameter of this name.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = parameters[parameter]
    tape = Tape(model)
    with preserved(model), torch.enable_grad():
        tape.begin()
        with tape:
            loss = compute()
    if id(wanted) in survey(loss).leaves:
        return None
    return cause_of(1 << tape.names.index(parameter), tape, [loss])
