"""What is caught before the first update, with what was measured; and what must raise no alarm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import safeloop as sl
from safeloop.autograd.second import dead_ends, nodes_between, obstacles, without_second_derivative

OFF: dict[str, Any] = {"sinks": []}
SGD = {"type": "SGD", "lr": 1e-3}
Terms = Callable[[sl.Trainer, Tensor], dict[str, Any]]


def run_of(model: nn.Module, terms: Terms, kind: Any = "r1", data: Any = None, **sections: Any) -> sl.Trainer:
    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            return terms(self, batch)

    penalty = {"type": kind} if isinstance(kind, str) else kind
    sections = {"penalties": {"p": penalty}, "run": {"max_steps": 2}, "log": OFF, "optimizers": SGD, **sections}
    return Run(model=model, data=data or [torch.randn(6, 4)], **sections)


def apart(run: Any, x: Tensor) -> dict[str, Any]:
    """The penalty of the whole model, beside a loss."""
    return {"fit": run.model(x).square().mean(), "p": run.penalty(run.model, at=x)}


def fault_of(run: sl.Trainer) -> sl.Fault:
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(sl.FaultError) as caught:
        run.fit()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} changed before the fault"
    return caught.value.fault


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), *(middle or (nn.Tanh(),)), nn.Linear(8, 1))


# ------------------------------------------------------------------------------------------------------ declarations


def test_a_penalty_without_a_section_names_the_call_and_the_nearest_section() -> None:
    run = run_of(mlp(), apart, penalties={"q": {"type": "r1"}})
    fault = fault_of(run)
    assert fault.code == "SL430"
    assert "`penalties.p`" in fault.what
    assert 'return {"fit": run.model(x).square().mean(), "p": run.penalty(run.model, at=x)}' in fault.where
    assert "type: gradient, target: 1.0" in fault.fix
    near = fault_of(run_of(mlp(), apart, penalties={"pp": {"type": "r1"}}))
    assert "the nearest name is `pp`" in near.what


def test_a_penalty_without_any_section_is_refused_too() -> None:
    assert fault_of(run_of(mlp(), apart, penalties={})).code == "SL430"


def test_a_declared_penalty_that_no_phase_returns_is_refused_in_the_first_step() -> None:
    class Phases(sl.Trainer):
        @sl.phase(trains="a")
        def first(self, x: Tensor) -> dict[str, Any]:
            return {"one": self.model[0](x).square().mean(), "p": self.penalty(self.model[0], at=x)}

        @sl.phase(trains="b", every=3)
        def second(self, x: Tensor) -> dict[str, Any]:
            return {"two": self.model(x).square().mean()}

    optimizers = {"a": {**SGD, "params": ["0.*"]}, "b": {**SGD, "params": ["2.*"]}}

    def phases(penalties: dict[str, Any]) -> sl.Trainer:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        data = [torch.randn(6, 4)]
        return Phases(model=model, data=data, optimizers=optimizers, penalties=penalties, run={"max_steps": 2}, log=OFF)

    assert phases({"p": {"type": "r1"}}).fit().faults == ()
    with pytest.raises(sl.FaultError, match="SL439") as caught:
        phases({"p": {"type": "r1"}, "other": {"type": "r2"}}).fit()
    assert caught.value.fault.names == ("other",)


# ------------------------------------------------------------------------------------------------- points and shapes


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        (lambda run, x: {"p": run.penalty(lambda x: run.model(x).mean(), at=x)}, "have shape [], of 6 samples"),
        (lambda run, x: {"p": run.penalty(lambda x: run.model(x)[:3], at=x)}, "shape [3, 1], `at` has [6, 4]"),
        (lambda run, x: {"p": run.penalty(lambda x: {"y": run.model(x)}, at=x)}, "of a dict, not of a tensor"),
        (lambda run, x: {"p": run.penalty(lambda x: run.model(x).argmax(1), at=x)}, "are int64"),
        (lambda run, x: {"p": run.penalty(run.model, at=x.long())}, "dtype int64 and shape [6, 4]"),
        (lambda run, x: {"p": run.penalty(run.model, at=x.sum())}, "dtype float32 and shape []"),
    ],
    ids=["scalar", "rows", "dict", "integers", "integer-point", "0-d-point"],
)
def test_what_a_penalty_cannot_be_computed_from_is_described(terms: Terms, says: str) -> None:
    fault = fault_of(run_of(mlp(), terms))
    assert fault.code in ("SL432", "SL433")
    assert says in fault.what or fault.code == "SL433"


def test_targets_must_have_the_shape_of_the_point() -> None:
    def forces(run: Any, x: Tensor) -> dict[str, Any]:
        return {"p": run.penalty(run.model, at=x, targets=x[:, :2])}

    assert "have shape [6, 2], `at` has [6, 4]" in fault_of(run_of(mlp(), forces, "forces")).what
    missing = fault_of(run_of(mlp(), apart, "forces"))
    assert "have nothing" in missing.what


def test_an_output_that_does_not_exist_is_named_with_those_that_do() -> None:
    def terms(run: Any, x: Tensor) -> dict[str, Any]:
        return {"p": run.penalty(lambda x: {"logits": run.model(x)}, at=x)}

    fault = fault_of(run_of(mlp(), terms, {"type": "output_jacobian", "output": "logit"}))
    assert fault.code == "SL432"
    assert "has no `logit`; it has logits" in fault.what
    assert run_of(mlp(), terms, {"type": "output_jacobian", "output": "logits"}).fit().faults == ()


@pytest.mark.parametrize(
    "terms",
    [
        lambda run, x: {"p": run.penalty(of=run.model(x), at=x)},
        lambda run, x: {"p": run.penalty(of=run.model(x), at=run.leaf(x))},
        lambda run, x: {"p": run.penalty(lambda y: run.model(x), at=x)},
        lambda run, x: {"p": run.penalty(lambda y: run.model(y.detach()), at=x)},
    ],
    ids=["no-leaf", "another-leaf", "ignored-argument", "detached"],
)
def test_values_that_were_not_computed_from_the_point_are_refused(terms: Terms) -> None:
    fault = fault_of(run_of(mlp(), terms))
    assert fault.code == "SL433"
    assert "self.leaf(x)" in fault.fix


def test_values_made_under_no_grad_are_refused() -> None:
    def terms(run: Any, x: Tensor) -> dict[str, Any]:
        x = run.leaf(x)
        with torch.no_grad():
            score = run.model(x)
        return {"p": run.penalty(of=score, at=x)}

    assert "no_grad" in fault_of(run_of(mlp(), terms)).what


def test_unequal_batches_cannot_be_interpolated() -> None:
    with pytest.raises(sl.FaultError, match=r"shape \[6, 4\], generated ones \[5, 4\]"):
        sl.interpolate(torch.randn(6, 4), torch.randn(5, 4))


@pytest.mark.parametrize("bad", [torch.arange(3), [1.0]], ids=["integers", "list"])
def test_a_leaf_of_what_has_no_gradient_is_refused(bad: Any) -> None:
    run = run_of(mlp(), apart)
    with pytest.raises(sl.FaultError, match="SL432"):
        run.leaf(bad)


def test_interpolated_points_lie_between_with_one_share_for_each_sample() -> None:
    real, fake = torch.zeros(50, 3, 4), torch.ones(50, 3, 4, requires_grad=True) * 1
    found = sl.interpolate(real, fake)
    assert not found.requires_grad
    assert bool((found == found[:, :1, :1]).all())
    shares = found[:, 0, 0]
    assert len(set(shares.tolist())) == 50
    assert 0 <= shares.min() < 0.2 < 0.8 < shares.max() <= 1
    assert sl.interpolate(real, fake.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- lost gradients


@pytest.mark.parametrize(
    ("frozen", "says"), [(nn.Linear(4, 1), "is a constant"), (mlp(), "reaches no parameter that this phase trains")]
)
def test_a_penalty_of_frozen_weights_is_refused(frozen: nn.Module, says: str) -> None:
    model = nn.ModuleDict({"net": mlp(), "old": frozen.requires_grad_(False)})

    def terms(run: Any, x: Tensor) -> dict[str, Any]:
        return {"fit": run.model["net"](x).square().mean(), "p": run.penalty(run.model["old"], at=x)}

    fault = fault_of(run_of(model, terms))
    assert fault.code == "SL434"
    assert says in fault.what


def test_a_penalty_of_what_another_optimizer_trains_is_refused() -> None:
    extra = nn.Parameter(torch.ones(4))

    def terms(run: Any, x: Tensor) -> dict[str, Any]:
        return {"fit": run.model(x).square().mean(), "p": run.penalty(lambda x: (extra * x).sin().sum(1), at=x)}

    fault = fault_of(run_of(mlp(), terms))
    assert fault.code == "SL434"
    assert "reaches no parameter that this phase trains" in fault.what


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.SiLU()], ids=str)
def test_r1_of_relus_whose_biases_get_nothing_raises_no_alarm(activation: nn.Module) -> None:
    model = mlp(activation)

    def only(run: Any, x: Tensor) -> dict[str, Any]:
        return {"p": run.penalty(run.model, at=x)}

    result = run_of(model, only).fit()
    assert result.faults == ()
    bias = model[0].bias.grad
    assert isinstance(activation, nn.SiLU) or bias is None or not bool(bias.any())


def traced(run: Any, x: Tensor) -> dict[str, Any]:
    x = run.leaf(x)
    values = run.model(x)
    return {"fit": values.square().mean(), "p": run.penalty(of=values, at=x)}


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.Identity()], ids=str)
def test_a_laplacian_that_is_zero_everywhere_is_refused(activation: nn.Module) -> None:
    fault = fault_of(run_of(mlp(activation), traced, "hessian_trace"))
    assert fault.code == "SL437"
    assert "nn.SiLU" in fault.fix


def test_a_laplacian_of_a_smooth_net_is_right_also_when_its_last_layer_begins_at_zero() -> None:
    assert run_of(mlp(), traced, "hessian_trace").fit().faults == ()
    model = mlp()
    nn.init.zeros_(model[2].weight)
    assert run_of(model, traced, "hessian_trace").fit().faults == ()


# ---------------------------------------------------------------------------------------------------------- coupling


def codes(run: sl.Trainer) -> list[tuple[str, str]]:
    return [(fault.code, fault.severity) for fault in run.fit().faults]


def test_batch_normalisation_in_train_mode_couples_the_samples_and_is_named() -> None:
    (fault,) = run_of(mlp(nn.BatchNorm1d(8), nn.Tanh()), apart).fit().faults
    assert (fault.code, fault.severity, fault.names) == ("SL436", "warning", ("p",))
    assert "has a gradient at 5 of 5 others; in train mode: `1`" in fault.what


@pytest.mark.parametrize(
    "middle", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8).eval(), nn.Dropout()], ids=str
)
def test_what_stays_within_a_sample_raises_no_alarm(middle: nn.Module) -> None:
    model = mlp(middle, nn.Tanh())
    if isinstance(middle, nn.BatchNorm1d):
        middle.train = lambda mode=True: middle  # type: ignore[method-assign]
        middle.eval()
    assert codes(run_of(model, apart)) == []


def test_other_mixing_of_samples_is_measured_and_may_be_accepted() -> None:
    class MinibatchDeviation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.std(0).mean()

    assert codes(run_of(mlp(MinibatchDeviation(), nn.Tanh()), apart)) == [("SL436", "warning")]
    accepted = run_of(mlp(MinibatchDeviation(), nn.Tanh()), apart, audit={"accept": {"SL436": ["p"]}})
    assert codes(accepted) == []


def test_a_batch_of_one_sample_has_nothing_to_couple() -> None:
    assert codes(run_of(mlp(), apart, data=[torch.randn(1, 4)])) == []


# ------------------------------------------------------------------------------------------------ second derivatives


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.lift, self.out = function, nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.lift(x)))


def attention(x: Tensor) -> Tensor:
    q = x.view(len(x), 1, 2, 2)
    return F.scaled_dot_product_attention(q, q, q).flatten(1)


def bags(x: Tensor) -> Tensor:
    index = torch.zeros(len(x), 4, dtype=torch.long)
    return F.embedding_bag(index, torch.ones(1, 4), per_sample_weights=x, mode="sum")


def ctc(x: Tensor) -> Tensor:
    logits = x.t().reshape(4, len(x), 1) * torch.tensor([1.0, 2.0, 3.0])
    lengths = torch.full((len(x),), 4)
    targets = torch.ones(len(x), 2, dtype=torch.long)
    losses = F.ctc_loss(logits.log_softmax(2), targets, lengths, lengths // 2, reduction="none", zero_infinity=True)
    return losses.unsqueeze(1).expand(-1, 4)


HOPELESS: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("ScaledDotProduct", attention, "SDPBackend.MATH"),
    ("CdistBackward0", lambda x: torch.cdist(x.unsqueeze(1), torch.ones(1, 4, 4)).squeeze(1), "use_mm_for_euclid_dist"),
    ("EmbeddingBagBackward0", bags, "F.embedding"),
    ("CtcLossBackward0", ctc, "penalise the logits"),
    ("SquaredBackward", Squared.apply, "@once_differentiable"),
    ("CheckpointFunctionBackward", lambda x: checkpoint(torch.tanh, x, use_reentrant=True), "use_reentrant=False"),
]


@pytest.mark.parametrize(("node", "function", "fix"), HOPELESS, ids=[node for node, _, _ in HOPELESS])
@pytest.mark.parametrize("shares", [True, False], ids=["shared", "apart"])
def test_an_operation_without_a_second_derivative_is_foreseen_with_its_fix(
    node: str, function: Callable[[Tensor], Tensor], fix: str, shares: bool
) -> None:
    fault = fault_of(run_of(Applied(function), traced if shares else apart))
    assert fault.code == "SL435"
    assert f"`{node}" in fault.what
    assert fix in fault.fix


def test_the_form_that_the_fix_names_trains() -> None:
    def with_math(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(x)

    def distances(x: Tensor) -> Tensor:
        mode = "use_mm_for_euclid_dist"
        return torch.cdist(x.unsqueeze(1), torch.ones(1, 4, 4), compute_mode=mode).squeeze(1)

    def again(x: Tensor) -> Tensor:
        return checkpoint(torch.tanh, x, use_reentrant=False)

    for function in (with_math, distances, again):
        assert codes(run_of(Applied(function), apart)) == []


def test_what_lies_beside_the_path_to_the_point_is_no_obstacle() -> None:
    model = Applied(torch.tanh)

    def terms(run: Any, x: Tensor) -> dict[str, Any]:
        x = run.leaf(x)
        beside = torch.cdist(run.model.lift.weight, torch.ones(4, 4)).mean()
        return {"p": run.penalty(of=run.model(x) + beside, at=x)}

    assert codes(run_of(model, terms)) == []


def test_an_operation_whose_gradient_is_a_constant_is_no_obstacle() -> None:
    def summed(run: Any, x: Tensor) -> dict[str, Any]:
        return {"p": run.penalty(lambda x: bags(run.model.lift(x)).sum(1), at=x)}

    assert codes(run_of(Applied(torch.tanh), summed)) == []


def test_a_hand_made_penalty_is_foreseen_too() -> None:
    def terms(run: Any, x: Tensor) -> dict[str, Any]:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(run.model(x).sum(), x, create_graph=True)
        return {"fit": slope.square().mean()}

    fault = fault_of(run_of(Applied(attention), terms, penalties={}))
    assert (fault.code, fault.names) == ("SL435", ("fit",))
    assert "SDPBackend.MATH" in fault.fix


def test_a_compiled_function_is_foreseen() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(mlp(), backend="aot_eager")
    assert obstacles(nodes_between(compiled(x), x)) == ["CompiledFunctionBackward"]


def test_an_operator_from_outside_that_only_warns_is_no_dead_end() -> None:
    """Its node is called WarnNotImplemented: torch warns at its backward, and gives no gradient."""
    library = torch.library.Library("safeloop_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: torch.from_numpy(2 * x.detach().numpy()), "CPU")
    y = torch.ops.safeloop_test.twice(torch.ones(3, requires_grad=True))
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "torch::autograd::WarnNotImplemented"
    assert dead_ends(y.sum()) == []


def test_the_names_of_nodes_are_those_of_the_installed_torch() -> None:
    """Each name that is looked for raises in torch itself when it is differentiated twice."""
    for node, function, _ in HOPELESS[:4]:
        x = torch.randn(6, 4, requires_grad=True)
        values = function(x.sin()).square()
        assert [name for name in without_second_derivative(nodes_between(values, x)) if name.startswith(node)]
        (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        assert dead_ends(slope.square().sum())
        with pytest.raises(RuntimeError, match="not implemented"):
            slope.square().sum().backward()


def test_the_silent_case_of_once_differentiable_is_as_measured() -> None:
    """torch trains one part of such a penalty, drops the other, and says nothing."""
    lift = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(Squared.apply(lift(x)).sum(), x, create_graph=True)
    slope.square().sum().backward()
    found = lift.weight.grad.clone()
    lift.weight.grad = None
    (slope,) = torch.autograd.grad((lift(x) ** 2).sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert not torch.allclose(found, lift.weight.grad)


def test_nodes_between_are_those_on_a_path() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    y = (x.sin() * w.cos()).sum()
    assert sorted(node.name() for node in nodes_between(y, x)) == ["MulBackward0", "SinBackward0", "SumBackward0"]
    assert nodes_between(y, torch.randn(3, requires_grad=True)) == []
    assert nodes_between(torch.ones(3), x) == []
    middle = x.sin()
    assert [node.name() for node in nodes_between(middle.exp(), middle)] == ["ExpBackward0"]


def test_a_warning_found_on_the_way_does_not_hide_the_error_behind_it() -> None:
    frozen = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).requires_grad_(False)
    model = nn.ModuleDict({"net": mlp(), "old": frozen})

    def terms(run: Any, x: Tensor) -> dict[str, Any]:
        return {"fit": run.model["net"](x).square().mean(), "p": run.penalty(run.model["old"], at=x)}

    with pytest.raises(sl.FaultError) as caught:
        run_of(model, terms).fit()
    assert caught.value.fault.code == "SL434"
    assert [fault.code for fault in caught.value.others] in ([], ["SL436"])


def test_a_penalty_of_a_simultaneous_step_must_say_what_it_trains() -> None:
    losses = {"fit": {"trains": ["*"]}}
    fault = fault_of(run_of(mlp(), apart, losses=losses, simultaneous=True))
    assert fault.code == "SL411"
    assert "`penalties.p.trains`" in fault.fix


def test_what_a_penalty_trains_is_asserted_under_its_own_section() -> None:
    fault = fault_of(run_of(mlp(), apart, {"type": "r1", "trains": ["0.*"]}))
    assert fault.code == "SL410"
    assert "`penalties.p.trains`" in fault.fix


def test_checking_a_shared_forward_with_batch_normalisation_works_and_changes_nothing() -> None:
    def shared(run: Any, x: Tensor) -> dict[str, Any]:
        x = run.leaf(x)
        score = run.model(x)
        return {"fit": score.square().mean(), "p": run.penalty(of=score, at=x)}

    model = mlp(nn.BatchNorm1d(8), nn.Tanh())
    before = copy.deepcopy(model.state_dict())
    run = run_of(model, shared)
    assert [fault.code for fault in run.check()] == ["SL436"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [fault.code for fault in run.fit().faults] == ["SL436"]
