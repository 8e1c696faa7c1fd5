"""Gradients that are zero, or do not come, for another reason than the values: the line that stops them is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

X = torch.rand(16, 6, generator=torch.Generator().manual_seed(1))


class Scale(torch.autograd.Function):
    """A scaling whose backward leaves out the gradient of the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # guilty
        return gradient * ctx.saved_tensors[0], None


class Scaled(nn.Module):
    """A body whose result is multiplied by a parameter, in `function`."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.scale, self.function = nn.Linear(6, 4), nn.Parameter(torch.ones(4)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.body(x), self.scale)


def faults_of(model: nn.Module, loss: Callable[[Tensor], Tensor] = lambda out: out.square().mean()) -> tuple[Any, ...]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            optimizer.zero_grad()
            loss(model(X)).backward()
            optimizer.step()
            audit.step()
    return audit.faults


def test_a_custom_backward_that_returns_none_for_a_parameter_is_told_with_its_line() -> None:
    (fault,) = faults_of(Scaled(Scale.apply))
    assert (fault.code, fault.names) == ("SL502", ("scale",))
    assert "Scale.backward" in fault.where
    assert "returns None" in fault.why
    assert "def backward" in fault.where


def test_a_custom_backward_of_every_gradient_is_well() -> None:
    assert not faults_of(Scaled(lambda x, scale: x * scale))


def test_a_parameter_that_only_autograd_grad_is_asked_for_is_no_dropped_gradient() -> None:
    model = Scaled(torch.mul)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(X).square().mean()
            for p, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                p.grad = gradient
            optimizer.step()
            audit.step()
    assert not audit.faults


@pytest.mark.parametrize("after", [False, True])
def test_a_hook_that_makes_every_entry_zero_is_told_with_its_line(after: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    keep = torch.zeros(4, 1)
    if after:

        def hook(p: Tensor) -> None:
            p.grad.mul_(keep)

        model[0].weight.register_post_accumulate_grad_hook(hook)
    else:

        def hook(g: Tensor) -> Tensor:
            return g * keep

        model[0].weight.register_hook(hook)
    (fault,) = faults_of(model)
    assert (fault.code, fault.severity, fault.names) == ("SL503", "warning", ("0.weight",))
    assert "hook" in fault.why
    assert "def hook" in fault.where


def test_a_hook_on_an_activation_is_told_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.skip, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x).tanh()
            if h.requires_grad:
                h.register_hook(lambda g: 0 * g)
            return self.head(h + self.skip(x))

    (fault,) = faults_of(Net())
    assert (fault.code, fault.names) == ("SL503", ("body.weight", "body.bias"))
    assert "hook" in fault.why


def test_a_hook_that_keeps_some_rows_is_well() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    keep = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    model[0].weight.register_hook(lambda g: g * keep)
    assert not faults_of(model)


@pytest.mark.parametrize("flat", [torch.sign, torch.round, lambda h: torch.normal(h, torch.ones_like(h))])
def test_an_operation_that_is_flat_everywhere_is_an_error(flat: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(flat(3 * self.body(x)))

    (fault,) = faults_of(Net())
    assert (fault.code, fault.severity, fault.names) == ("SL503", "error", ("body.weight", "body.bias"))


def test_a_saturated_actor_is_found_where_another_loss_does_not_reach_it() -> None:
    nets = nn.ModuleDict({"actor": nn.Linear(6, 1), "critic": nn.Linear(7, 1)})
    nn.init.constant_(nets["actor"].bias, 100.0)
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=0.01) for name, net in nets.items()}
    with sl.audit(model=nets, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(8):
            with torch.no_grad():
                action = nets["actor"](X).tanh()
            nets.zero_grad()
            F.mse_loss(nets["critic"](torch.cat([X, action], 1)), X[:, :1]).backward()
            optimizers["critic"].step()
            nets.zero_grad()
            (-nets["critic"](torch.cat([X, nets["actor"](X).tanh()], 1)).mean()).backward()
            optimizers["actor"].step()
            audit.step()
    (fault,) = audit.faults
    assert (fault.code, fault.names) == ("SL503", ("actor.weight", "actor.bias"))
    assert "Tanh" in fault.why


class Lost(nn.Module):
    """An encoder whose result gets lost in `lose`, and a decoder."""

    def __init__(self, lose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.lose = nn.Linear(6, 4), nn.Linear(4, 1), lose

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.lose(self.encoder(x)))


def by_hard_gumbel(logits: Tensor) -> Tensor:
    noise = -torch.rand_like(logits).add(1e-6).log()
    soft = (logits - noise.log()).softmax(-1)
    return F.one_hot(soft.argmax(-1), 4).float()  # guilty


def by_number_beside_an_assertion(h: Tensor) -> Tensor:
    assert (h == h).all()
    return h.new_ones(h.shape) * h.mean().item()  # guilty


def by_one_of_two(h: Tensor) -> Tensor:
    index = h.detach().argmin(-1)
    return torch.stack([torch.ones(4) * v for v in h.sum(1).tolist()]) + index[:, None]  # guilty


@pytest.mark.parametrize("lose", [by_hard_gumbel, by_number_beside_an_assertion, by_one_of_two])
def test_the_line_that_lost_the_value_is_told_beside_harmless_ones(lose: Callable[[Tensor], Tensor]) -> None:
    (fault,) = faults_of(Lost(lose))
    assert (fault.code, fault.names) == ("SL502", ("encoder.weight", "encoder.bias"))
    assert "# guilty" in fault.where
    assert "rand_like" not in fault.why


def test_a_straight_through_estimator_without_detach_is_told_with_its_line() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            hard = (3 * z).round().detach()
            return self.decoder(z + (hard - z))  # guilty

    (fault,) = [fault for fault in faults_of(Net()) if fault.code != "SL330"]  # which tells the same line at once
    assert (fault.code, fault.names) == ("SL503", ("encoder.weight", "encoder.bias"))
    assert "# guilty" in fault.where
    assert "detach()" in fault.fix


def test_a_fake_quantised_weight_without_detach_is_told() -> None:
    class Quantised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            return F.linear(x, w + ((8 * w).round() / 8 - w), self.bias)  # guilty

    (fault,) = faults_of(nn.Sequential(Quantised(6, 4), nn.Tanh(), nn.Linear(4, 1)))
    assert (fault.code, fault.names) == ("SL503", ("0.weight",))
    assert "# guilty" in fault.where
    assert "straight-through" in fault.fix


def test_uses_that_do_not_cancel_are_well() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            return self.decoder(z + ((3 * z).round() - z).detach() + z - z.mean(1, keepdim=True))

    assert not faults_of(Net())
