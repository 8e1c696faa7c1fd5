"""The lessons that are about graphs and what they save: rows 9, 14 to 19 and 23.

Each on both sides: the value or error of plain PyTorch, and what safeloop says, in a Trainer and around a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl

Compute = Callable[[Any], Tensor]
SIGMOID_AT_1 = 0.1966


class Scalars(nn.Module):
    def __init__(self, **values: float) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(value)))


def plain(compute: Compute, model: nn.Module) -> None:
    compute(model).backward()


def train(compute: Any, model: nn.Module, max_steps: int = 1, **sections: Any) -> sl.RunResult:
    class Run(sl.Trainer):
        def losses(self, batch: Any) -> Any:
            returned = compute(self.model)
            return returned if isinstance(returned, dict) else {"fit": returned}

    sections = {"optimizers": {"type": "SGD", "lr": 1e-9}, "log": {"sinks": []}, **sections}
    return Run(model=model, data=[0], run={"max_steps": max_steps}, **sections).fit()


def refused(compute: Any, model: nn.Module, **sections: Any) -> sl.Fault:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(sl.FaultError) as caught:
        train(compute, model, **sections)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "changed before the fault"
    return caught.value.fault


ACCEPTED = {"SL657": ["*"]}
"""that no weight changes: the rate is so small that the numbers of the lessons stay"""


def audited(compute: Compute, model: nn.Module, steps: int = 1) -> tuple[tuple[sl.Fault, ...], Exception | None]:
    """What an audit around a plain loop finds, and the error that ended the loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    audit = sl.audit(model=model, optimizers=optimizer, on_fault="collect", level="full", accept=ACCEPTED)
    try:
        with audit:
            for _ in range(steps):
                optimizer.zero_grad()
                compute(model).backward()
                optimizer.step()
                audit.step()
    except RuntimeError as error:
        return audit.faults, error
    return audit.faults, None


# ------------------------------------------------------------------------------------------------------------- row 9


def in_place(m: Any) -> Tensor:
    b = m.a**2 * m.c**2
    b += 1
    b *= m.c + m.a
    d = b.exp_()
    d *= 5
    return b


def two() -> Scalars:
    return Scalars(a=1.0, c=2.0)


def test_row_9_plain_torch_names_no_line_of_the_forward() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        plain(in_place, two())
    assert "in_place" not in str(caught.value)


def test_row_9_the_fault_has_the_operation_and_both_lines() -> None:
    (found,), error = audited(in_place, two())
    assert isinstance(error, RuntimeError)
    for fault in (refused(in_place, two()), found):
        assert fault.code == "SL303"
        assert "`ExpBackward0` (its `result`)" in fault.what
        assert "in in_place: `d = b.exp_()`" in fault.where
        assert "mul_ at " in fault.where
        assert "in in_place: `d *= 5`" in fault.where


def test_row_9_a_step_that_is_not_looked_at_carries_no_guard_and_lists_the_lines_that_write() -> None:
    guarded = []

    class Run(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            guarded.append(torch._C._autograd._top_saved_tensors_default_hooks(False) is not None)
            d = self.model.a.exp()
            if len(guarded) > 25:
                d *= 5
            return d

    rest: dict[str, Any] = {"optimizers": {"type": "SGD", "lr": 1e-9}, "run": {"max_steps": 30}, "log": {"sinks": []}}
    with pytest.raises(sl.FaultError) as caught:
        Run(model=Scalars(a=1.0), data=[0], audit={"budget": 1e-9}, **rest).fit()
    assert guarded == [True] * 20 + [False] * 6
    assert caught.value.fault.code == "SL303"
    assert "output 0 of `Exp`" in caught.value.fault.what
    assert "lines that write in place: " in caught.value.fault.where
    assert "Run.loss: `d *= 5`" in caught.value.fault.where


# ------------------------------------------------------------------------------------------------------------ row 14


def slope_of(model: nn.Module, **options: bool) -> tuple[Tensor, Tensor]:
    x = torch.ones(4, 3, requires_grad=True)
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, **options)
    return out.square().mean(), slope.square().sum(1).mean()


def test_row_14_the_second_derivative_needs_create_graph() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    (first,) = torch.autograd.grad(x**2, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert (first.item(), second.item()) == (6.0, 2.0)
    (first,) = torch.autograd.grad(x**2, x)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(first, x)
    (x**2 + 10 * first**2).backward()
    assert x.grad is not None
    assert x.grad.item() == 6.0


def test_row_14_a_penalty_by_hand_without_it_is_a_constant_term() -> None:
    def terms(m: nn.Module) -> dict[str, Tensor]:
        fit, penalty = slope_of(m, retain_graph=True)
        return {"fit": fit, "penalty": penalty}

    fault = refused(terms, nn.Linear(3, 1))
    assert fault.code == "SL404"
    assert "`penalty`" in fault.what
    assert "torch.autograd.grad(out.sum(), x, **options)" in fault.where


def test_row_14_it_is_found_even_when_summed_into_one_loss() -> None:
    def total(m: nn.Module) -> Tensor:
        fit, penalty = slope_of(m, retain_graph=True)
        return fit + 10 * penalty

    (found,), error = audited(total, nn.Linear(3, 1))
    assert error is None
    for fault in (refused(total, nn.Linear(3, 1)), found):
        assert fault.code == "SL422"
        assert "create_graph=True" in fault.fix
        assert "torch.autograd.grad(out.sum(), x, **options)" in fault.where


def test_row_14_with_create_graph_the_penalty_trains() -> None:
    def total(m: nn.Module) -> Tensor:
        fit, penalty = slope_of(m, create_graph=True)
        return fit * 0.0 + penalty

    model = nn.Linear(3, 1)
    weight = model.weight.detach().clone()
    assert train(total, model).faults == ()
    assert torch.allclose(model.weight.grad, 2 * weight)


# ------------------------------------------------------------------------------------------------------------ row 15


def halves(m: Any) -> tuple[Tensor, Tensor]:
    square = m.x**2
    with torch.no_grad():
        cube = m.x**3
    return square, cube


def test_row_15_plain_torch_gives_half_of_the_gradient() -> None:
    model = Scalars(x=1.0)
    plain(lambda m: sum(halves(m)), model)
    assert model.x.grad.item() == 2.0


def test_row_15_the_cut_term_and_the_line_that_cut_it_are_named() -> None:
    fault = refused(lambda m: dict(zip(("square", "cube"), halves(m), strict=True)), Scalars(x=1.0))
    assert fault.code == "SL404"
    assert fault.names == ("cube",)
    assert "no_grad" in fault.where
    assert "cube = m.x**3" in fault.where


def test_row_15_a_parameter_whose_contribution_to_a_sum_is_cut_is_named_with_the_line() -> None:
    def cut(m: Any) -> Tensor:
        square = m.x**2
        with torch.no_grad():
            cube = m.z**3
        return square + cube

    def both(m: Any) -> Tensor:
        return m.x**2 + m.z**3

    faults, error = audited(cut, Scalars(x=1.0, z=1.0), 25)
    assert error is None
    assert [fault.code for fault in faults] == ["SL425", "SL502"]
    found = faults[1]
    assert found.names == ("z",)
    assert "cube = m.z**3" in found.where
    assert audited(both, Scalars(x=1.0, z=1.0), 25) == ((), None)


def test_row_15_a_cut_half_of_a_sum_over_the_same_parameter_is_found() -> None:
    (found,), _ = audited(lambda m: sum(halves(m)), Scalars(x=1.0), 25)
    assert (found.code, found.names) == ("SL425", ("x",))
    assert "no_grad" in found.why


# ---------------------------------------------------------------------------------------------------- rows 16 to 19


def doubled_and_written(m: Any) -> Tensor:
    y = 2 * m.x
    m.x.data *= 100
    return y


def written_after_addition(m: Any) -> Tensor:
    b = m.x + 1
    c = b.detach()
    c.zero_()
    return b.sum()


def written_after_sum(m: Any) -> Tensor:
    b = m.x.sigmoid().sum()
    c = b.data
    c.zero_()
    return b


@pytest.mark.parametrize(
    ("compute", "gradient"),
    [
        pytest.param(doubled_and_written, 2.0, id="row 16"),
        pytest.param(written_after_addition, 1.0, id="row 19, an addition"),
        pytest.param(written_after_sum, SIGMOID_AT_1, id="row 19, a sum"),
    ],
)
def test_rows_16_and_19_a_write_into_what_backward_does_not_need_is_no_fault(compute: Any, gradient: float) -> None:
    def models() -> Iterator[Scalars]:
        model = Scalars(x=1.0)
        yield model
        assert model.x.grad.item() == pytest.approx(gradient, abs=5e-5)

    for model in models():
        plain(compute, model)
    for model in models():
        assert audited(compute, model) == ((), None)
    for model in models():
        assert train(compute, model, audit={"level": "full"}).faults == ()


def written_seen(m: Any) -> Tensor:
    b = m.x.sigmoid()
    c = b.detach()
    c.zero_()
    return b.sum()


def written_unseen(m: Any) -> Tensor:
    b = m.x.sigmoid()
    c = b.data
    c.zero_()
    return b.sum()


def says_both_lines(fault: sl.Fault, function: str) -> None:
    assert "`SigmoidBackward0` (its `result`)" in fault.what
    assert f"in {function}: `b = m.x.sigmoid()`" in fault.where
    assert "written by zero_ at " in fault.where
    assert f"in {function}: `c.zero_()`" in fault.where


def test_row_17_a_write_that_torch_counts_is_named_with_the_operation_and_both_lines() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain(written_seen, Scalars(x=1.0))
    (found,), error = audited(written_seen, Scalars(x=1.0))
    assert "modified by an inplace operation" in str(error)
    for fault in (refused(written_seen, Scalars(x=1.0)), found):
        assert fault.code == "SL303"
        says_both_lines(fault, "written_seen")


def test_row_18_a_write_that_torch_does_not_count_is_reported_and_not_applied() -> None:
    model = Scalars(x=1.0)
    plain(written_unseen, model)
    assert model.x.grad.item() == 0.0
    sound = Scalars(x=1.0)
    plain(lambda m: m.x.sigmoid(), sound)
    assert sound.x.grad.item() == pytest.approx(SIGMOID_AT_1, abs=5e-5)
    (found,), error = audited(written_unseen, Scalars(x=1.0))
    assert error is None
    rate: dict[str, Any] = {"optimizers": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}}
    for fault in (refused(written_unseen, Scalars(x=1.0), **rate), found):
        assert fault.code == "SL308"
        says_both_lines(fault, "written_unseen")


# ------------------------------------------------------------------------------------------------------------ row 23


def written_late(m: Any) -> Tensor:
    loss = m.w.square()
    m.w.add_(1)
    return loss


def test_row_23_plain_torch_refuses_a_write_to_a_leaf_and_safeloop_names_line_and_parameter() -> None:
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        plain(written_late, Scalars(w=1.0))
    (found,), error = audited(written_late, Scalars(w=1.0))
    assert isinstance(error, RuntimeError)
    assert found.code == "SL301"
    fault = refused(written_late, Scalars(w=1.0))
    assert fault.code == "SL301"
    assert fault.names == ("w",)
    assert "`m.w.add_(1)`" in fault.where
    assert "no_grad" in fault.fix


def test_row_23_around_a_plain_loop_the_line_is_named_too() -> None:
    (found,), _ = audited(written_late, Scalars(w=1.0))
    assert "`m.w.add_(1)`" in found.where
