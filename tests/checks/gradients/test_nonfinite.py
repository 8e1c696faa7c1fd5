from __future__ import annotations

import torch
from torch import nn

from safeloop.checks.stages import gradient_faults
from safeloop.checks.views import GradientsView


def view_of(model, **terms):
    return GradientsView(dict(model.named_parameters()), {n: torch.tensor(v) for n, v in terms.items()}, 3, "step 3")


def filled(model, value=1.0):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return model


def test_finite_gradients_are_right():
    assert gradient_faults(view_of(filled(nn.Linear(3, 2)), fit=1.0)) == []


def test_a_parameter_without_a_gradient_is_right():
    assert gradient_faults(view_of(nn.Linear(3, 2), fit=1.0)) == []


def test_gradients_whose_norm_alone_overflows_are_right():
    model = filled(nn.Linear(3, 2), 1e30)
    assert torch.linalg.vector_norm(model.weight.grad).isinf()
    assert gradient_faults(view_of(model, fit=1.0)) == []


def test_the_entries_that_are_not_finite_are_counted_by_parameter():
    model = filled(nn.Linear(3, 2))
    model.weight.grad[0, :2] = torch.tensor([float("nan"), float("inf")])
    (fault,) = gradient_faults(view_of(model, fit=1.0, aux=0.25))
    assert (fault.code, fault.names) == ("SL501", ("weight",))
    assert "1 of 2 gradients hold NaN or infinity: `weight`, 2 of 6 entries" in fault.what
    assert "step 3" in fault.where
    assert "`fit` = 1, `aux` = 0.25" in fault.where
    assert "born in the backward pass" in fault.why


def test_a_sparse_gradient_is_looked_at():
    model = nn.Embedding(4, 2, sparse=True)
    (model(torch.tensor([1, 2])).sum() * float("inf")).backward()
    (fault,) = gradient_faults(view_of(model, fit=1.0))
    assert "`weight`, 4 of 4 entries" in fault.what


def test_a_term_that_is_not_finite_is_told_first():
    faults = gradient_faults(view_of(filled(nn.Linear(3, 2), float("nan")), fit=float("nan"), aux=0.5))
    assert [fault.code for fault in faults] == ["SL405", "SL501"]
    assert "loss term `fit` is nan; finite: `aux` = 0.5" in faults[0].what
    assert faults[0].names == ("fit",)
    assert "a loss term is not finite itself" in faults[1].why


def test_many_parameters_are_cut():
    model = filled(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), float("inf"))
    (fault,) = gradient_faults(view_of(model, fit=1.0))
    assert fault.what.startswith("8 of 8 gradients")
    assert fault.what.endswith("; 4 more")
    assert len(fault.names) == 8
