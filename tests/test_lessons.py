"""The situations that safeloop exists for, with the values that plain PyTorch gives, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

SGD = {"type": "SGD", "lr": 0.1}


def trainer(model: nn.Module, loss: Any, data: Any = None, *, optimizers: Any = None, **sections: Any) -> sl.Trainer:
    class Run(sl.Trainer):
        def losses(self, batch: Any) -> Any:
            returned = loss(self.model, batch)
            return returned if isinstance(returned, dict) else {"fit": returned}

    sections = {"run": {"max_steps": 1}, "log": {"sinks": []}, **sections}
    return Run(model=model, data=data or [torch.ones(4, 3)], optimizers=optimizers or SGD, **sections)


def fault_of(run: sl.Trainer) -> Any:
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(sl.FaultError) as caught:
        run.fit()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} changed before the fault"
    return caught.value.fault


class Scalars(nn.Module):
    def __init__(self, **values: float) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(value)))


class PlainTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.tensor(2.0, requires_grad=True)
        self.fc = nn.Linear(3, 1)


def test_row_1_a_plain_tensor_attribute_is_named() -> None:
    fault = fault_of(trainer(PlainTensor(), lambda m, x: (m.w * m.fc(x)).square().mean()))
    assert fault.code == "SL206"
    assert fault.severity == "error"
    assert "w" in fault.names
    assert "Parameter" in str(fault)


def test_row_1_a_plain_tensor_that_a_ready_optimizer_holds_is_trained_with_a_warning() -> None:
    model = PlainTensor()
    optimizer = torch.optim.SGD([model.w, *model.fc.parameters()], lr=0.1)
    run = trainer(model, lambda m, x: (m.w * m.fc(x)).square().mean(), optimizers=optimizer)
    result = run.fit()
    assert model.w.item() != 2.0
    assert "SL206" in {fault.code for fault in result.faults}
    assert {fault.severity for fault in result.faults if fault.code == "SL206"} == {"warning"}


def test_row_2_adding_to_a_leaf_in_place_names_the_line_and_the_fix() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y = torch.tensor(0.0, requires_grad=True)
        y += model(x).mean()
        return y

    fault = fault_of(trainer(nn.Linear(3, 1), loss))
    assert fault.code == "SL301"
    assert "y += model(x).mean()" in fault.where
    assert "test_lessons.py" in fault.where
    assert "sum(terms)" in fault.fix


def test_row_3_a_python_number_is_named_with_the_fix() -> None:
    fault = fault_of(trainer(nn.Linear(3, 1), lambda m, x: min(0, m(x).square().mean())))
    assert fault.code == "SL402"
    assert "fit" in fault.names
    assert "clamp" in fault.fix


def test_row_4_a_constant_term_is_named_and_may_be_allowed() -> None:
    def loss(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"fit": model(x).square().mean(), "margin": min(torch.tensor(0.0), model(x).square().mean())}

    fault = fault_of(trainer(nn.Linear(3, 1), loss))
    assert fault.code == "SL404"
    assert "margin" in fault.what
    assert "losses.margin.may_be_constant" in fault.fix
    allowed = trainer(nn.Linear(3, 1), loss, losses={"margin": {"may_be_constant": True}})
    assert allowed.fit().faults == ()


def test_row_10_ownership_is_checked_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    fault = fault_of(trainer(model, lambda m, x: m(x).square().mean(), optimizers={**SGD, "params": ["1.*"]}))
    assert fault.code == "SL201"
    assert set(fault.names) == {"0.weight", "0.bias"}


def test_row_11_gradients_do_not_accumulate_over_steps() -> None:
    model = Scalars(w=1.0)
    seen = []

    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            seen.append(self.model.w.grad)
            return 5 * self.model.w * batch.mean()

    Run(
        model=model,
        data=[torch.ones(1)],
        optimizers={"type": "SGD", "lr": 1e-9},
        run={"max_steps": 4},
        log={"sinks": []},
    ).fit()
    assert seen == [None] * 4
    assert model.w.grad is not None
    assert model.w.grad.item() == 5


@pytest.mark.parametrize(("weights", "expected"), [((1.0, 2.0), 9.0), ((1.0, 0.0), 5.0), ((0.0, 2.0), 4.0)])
def test_row_12_weighted_terms_give_nine_in_one_backward(weights: tuple[float, float], expected: float) -> None:
    def loss(model: Any, x: Tensor) -> dict[str, Tensor]:
        a, b = model.w + 2.0, model.w + 1.0
        return {"y0": a * b, "y1": a + b}

    model = Scalars(w=1.0)
    sections = {"y0": {"weight": weights[0]}, "y1": {"weight": weights[1]}}
    trainer(model, loss, losses=sections, optimizers={"type": "SGD", "lr": 1e-9}).fit()
    assert model.w.grad is not None
    assert model.w.grad.item() == expected


def test_row_13_a_term_with_weights_is_a_vector_jacobian_product() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    weights = torch.tensor([[1.0, 0.1], [0.01, 0.001]])
    model = Vector()
    trainer(model, lambda m, _: {"z": ((2 * m.x).view(2, 2), weights)}, optimizers={"type": "SGD", "lr": 1e-9}).fit()
    assert torch.allclose(model.x.grad, torch.tensor([2.0, 0.2, 0.02, 0.002]))
    bare = fault_of(trainer(Vector(), lambda m, _: {"z": (2 * m.x).view(2, 2)}))
    assert bare.code == "SL403"
    assert "2, 2" in bare.what
    assert "mean" in bare.fix
    assert "weights" in bare.fix
    wrong = fault_of(trainer(Vector(), lambda m, _: {"z": ((2 * m.x).view(2, 2), torch.ones(4))}))
    assert wrong.code == "SL408"


def test_row_14_plain_torch_needs_create_graph_for_a_second_derivative() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    (first,) = torch.autograd.grad(x**2, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert (first.item(), second.item()) == (6.0, 2.0)
    (constant,) = torch.autograd.grad(x**2, x)
    assert not constant.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(constant, x)


def test_row_14_a_penalty_owns_the_graph_of_its_derivative() -> None:
    """Of w x^2 at x = 3 with w = 1: the slope is 6 w, the penalty (6 w)^2, and its derivative by w is 72."""
    model = Scalars(w=1.0)

    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> Any:
            return {"slope": self.penalty(lambda x: self.model.w * x**2, at=batch)}

    data, tiny = [torch.tensor([3.0])], {"type": "SGD", "lr": 1e-9}
    run = {"max_steps": 1}
    slope = {"type": "gradient"}
    result = Run(model=model, data=data, optimizers=tiny, penalties={"slope": slope}, run=run, log={"sinks": []}).fit()
    assert result.faults == ()
    assert model.w.grad is not None
    assert model.w.grad.item() == pytest.approx(72.0)


def test_row_14_a_second_derivative_is_a_penalty_of_its_own() -> None:
    """Of w x^2 the second derivative is 2 w: its derivative by w is 2."""
    model = Scalars(w=1.0)

    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> Any:
            return {"curve": self.penalty(lambda x: self.model.w * x**2, at=batch)}

    data, tiny = [torch.tensor([3.0])], {"type": "SGD", "lr": 1e-9}
    curve = {"type": "hessian_trace"}
    Run(
        model=model, data=data, optimizers=tiny, penalties={"curve": curve}, run={"max_steps": 1}, log={"sinks": []}
    ).fit()
    assert model.w.grad is not None
    assert model.w.grad.item() == pytest.approx(2.0)


def test_row_20_a_non_leaf_meant_as_a_parameter_is_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.ones(3, requires_grad=True) * 0.5
            self.fc = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * self.w)

    fault = fault_of(trainer(Scaled(), lambda m, x: m(x).square().mean()))
    assert fault.code == "SL207"
    assert "w" in fault.names
    assert "no_grad" in fault.fix
    assert "Parameter" in fault.fix


def test_row_21_scaling_a_leaf_under_no_grad_before_the_forward_is_no_fault() -> None:
    class Exponential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            with torch.no_grad():
                self.w *= 0.5

    model = Exponential()
    result = trainer(model, lambda m, _: m.w.exp().sum(), optimizers={"type": "SGD", "lr": 1e-9}).fit()
    assert result.faults == ()
    assert torch.allclose(model.w.grad, torch.full((2,), 1.6487), atol=1e-4)


def test_a_declared_term_that_never_comes_is_refused_with_the_nearest_name() -> None:
    run = trainer(nn.Linear(3, 1), lambda m, x: {"classify": m(x).square().mean()}, losses={"clasify": {"weight": 2.0}})
    fault = fault_of(run)
    assert fault.code == "SL407"
    assert "classify" in str(fault)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_batch_leaves_every_parameter_bitwise_unchanged(poison: float) -> None:
    x = torch.ones(4, 3)
    x[1, 2] = poison
    fault = fault_of(trainer(nn.Linear(3, 1), lambda m, b: m(b).square().mean(), [x]))
    assert fault.code in {"SL405", "SL501"}


def test_a_finite_loss_with_a_nan_gradient_is_refused() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model(x)
        return torch.where(h > 1e9, h.mul(0).sqrt(), h).mean() + F.mse_loss(h, h.detach())

    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    fault = fault_of(trainer(model, loss))
    assert fault.code == "SL501"
    assert "weight" in fault.what
