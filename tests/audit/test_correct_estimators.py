"""Correct programs that look suspicious: gradients that are replaced, cut or rounded on purpose. No fault is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]
CLASSES = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def mlp(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def straight_through_by_detach() -> Any:
    model = mlp()

    def step(i: int) -> Tensor:
        h = model[:2](X)
        hard = h.sign()
        return F.mse_loss(model[2](hard.detach() - h.detach() + h), Y)

    return model, step


def straight_through_by_data() -> Any:
    model = mlp()

    def step(i: int) -> Tensor:
        h = model[:2](X)
        return F.mse_loss(model[2](h + (h.round() - h).data), Y)

    return model, step


def straight_through_by_data_of_both() -> Any:
    model = mlp()

    def step(i: int) -> Tensor:
        h = model[:2](X)
        return F.mse_loss(model[2](h.round().data - h.data + h), Y)

    return model, step


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g / (1 + 10 * x.abs()) ** 2


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return -ctx.factor * g, None


class ReverseByClone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.neg()


class ClippedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (g * x.exp()).clamp(-0.01, 0.01)


class ClippedInput(torch.autograd.Function):
    """clamp whose gradient goes on beyond the border, as in quantisation-aware training"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class BinaryWithWindow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.1 * g


class FakeQuantize(torch.autograd.Function):
    """a uniform quantiser with a learned step size (LSQ), whose gradients are estimates"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (x / scale).round().clamp(-4, 3) * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        q = x / scale
        inside = (q >= -4) & (q <= 3)
        step = torch.where(inside, q.round() - q, q.clamp(-4, 3))
        return g * inside, (g * step).sum()


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s * (1 + x * (1 - s)))


class Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x > 0)


class Guided(torch.autograd.Function):
    """guided backpropagation: a ReLU that also drops negative gradients"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g.clamp(min=0) * (x > 0)


class MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class InPlaceDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = (torch.rand_like(x) > p).to(x.dtype) / (1 - p)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return g * mask, None


class PenaltyInBackward(torch.autograd.Function):
    """the identity, with an activation penalty added to its gradient"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g + 1e-3 * x


class LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, out = ctx.saved_tensors
        return g * (x - out).exp()


class SumLoss(torch.autograd.Function):
    """a loss computed with its gradient in the forward, as fused cross-entropy kernels do"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        p = x.softmax(-1)
        loss = -p.gather(1, y[:, None]).log().mean()
        ctx.save_for_backward((p - F.one_hot(y, x.shape[1])) / len(x))
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * g, None


class SumLossWithoutScale(torch.autograd.Function):
    """the same, for which the incoming gradient is known to be one"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * torch.where(w > 0, w, 0.1 * w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g * torch.where(w > 0, w, 0.1 * w), (g * x * torch.where(w > 0, 1.0, 0.1)).sum_to_size(w.shape)


def custom(kind: Any, *more: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = mlp()
        return model, lambda i: F.mse_loss(model[2](kind.apply(model[0](X), *more)), Y)

    make.__name__ = f"custom_{kind.__name__}"
    return make


def custom_with_weight(kind: Any, shape: tuple[int, ...], make_out: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = mlp()
        model.register_parameter("extra", nn.Parameter(torch.rand(shape) + 0.1))
        return model, lambda i: make_out(model, kind)

    make.__name__ = f"custom_{kind.__name__}"
    return make


def fused_loss() -> Any:
    model = mlp(3)
    return model, lambda i: SumLoss.apply(model(X), CLASSES)


def fused_loss_in_bf16() -> Any:
    model = mlp(3)

    def step(i: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return SumLoss.apply(model(X).float(), CLASSES)

    return model, step


class VectorQuantizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.codes = nn.Linear(6, 4), nn.Linear(4, 6), nn.Embedding(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        distances = z.pow(2).sum(1, keepdim=True) - 2 * z @ self.codes.weight.t() + self.codes.weight.pow(2).sum(1)
        q = self.codes(distances.argmin(1))
        inner = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return self.decoder(z + (q - z).detach()), inner


def vq_vae() -> Any:
    model = VectorQuantizer()

    def step(i: int) -> dict[str, Tensor]:
        out, inner = model(X)
        return {"rec": F.mse_loss(out, X), "vq": inner}

    return model, step


def gumbel_softmax_hard() -> Any:
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(4, 1)})
    return model, lambda i: F.mse_loss(model["b"](F.gumbel_softmax(model["a"](X), hard=True)), Y)


def reinforce() -> Any:
    model = mlp(3)

    def step(i: int) -> Tensor:
        policy = torch.distributions.Categorical(logits=model(X))
        action = policy.sample()
        reward = (action == CLASSES).float()
        return -(policy.log_prob(action) * (reward - reward.mean())).mean()

    return model, step


def reparameterised_vae() -> Any:
    model = nn.ModuleDict({"e": nn.Linear(6, 4), "d": nn.Linear(2, 6)})

    def step(i: int) -> dict[str, Tensor]:
        mean, log_var = model["e"](X).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        kl = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(1).mean()
        return {"rec": F.mse_loss(model["d"](z), X), "kl": min(1.0, i / 20) * kl}

    return model, step


def simsiam() -> Any:
    model = nn.ModuleDict({"f": mlp(4), "h": nn.Linear(4, 4)})

    def step(i: int) -> Tensor:
        a, b = model["f"](X), model["f"](X + 0.1)
        pa, pb = model["h"](a), model["h"](b)
        return -(F.cosine_similarity(pa, b.detach()).mean() + F.cosine_similarity(pb, a.detach()).mean()) / 2

    return model, step


def knowledge_of_a_detached_target_of_itself() -> Any:
    model = mlp()

    def step(i: int) -> Tensor:
        value = model(X).squeeze(1)
        with torch.no_grad():
            target = X[:, 0] + 0.9 * model(X + 0.1).squeeze(1)
        return F.smooth_l1_loss(value, target)

    return model, step


def logged_by_item() -> Any:
    model, log = mlp(), []

    def step(i: int) -> Tensor:
        out = model(X)
        loss = F.mse_loss(out, Y)
        log.append((loss.item(), out.mean().tolist(), out.detach().numpy().std(), (out > 0).float().mean().item()))
        return loss

    return model, step


def scaled_by_a_detached_norm() -> Any:
    model = mlp()

    def step(i: int) -> Tensor:
        a, b = F.mse_loss(model(X), Y), F.l1_loss(model(X), Y)
        return a + b * (a / (b + 1e-8)).detach()

    return model, step


def scaled_by_a_number() -> Any:
    model = mlp()

    def step(i: int) -> Tensor:
        a, b = F.mse_loss(model(X), Y), F.l1_loss(model(X), Y)
        return a + b * (a.item() / b.item())

    return model, step


PROGRAMS = [
    straight_through_by_detach,
    straight_through_by_data,
    straight_through_by_data_of_both,
    custom(Round),
    custom(Spike),
    custom(Reverse, 0.5),
    custom(ReverseByClone),
    custom(ClippedGradient),
    custom(ClippedInput),
    custom(BinaryWithWindow),
    custom(ScaledGradient),
    custom(Swish),
    custom(Relu),
    custom(Guided),
    custom(InPlaceDropout, 0.3),
    custom(PenaltyInBackward),
    custom_with_weight(FakeQuantize, (), lambda m, k: F.mse_loss(m[2](k.apply(m[0](X), m.extra)), Y)),
    custom_with_weight(SumLossWithoutScale, (8,), lambda m, k: F.mse_loss(m[2](k.apply(m[0](X), m.extra)), Y)),
    custom_with_weight(MatMul, (1, 1), lambda m, k: F.mse_loss(k.apply(m(X), m.extra), Y)),
    custom_with_weight(LogSumExp, (8,), lambda m, k: F.mse_loss(k.apply(m[0](X) * m.extra), Y) + F.mse_loss(m(X), Y)),
    fused_loss,
    fused_loss_in_bf16,
    vq_vae,
    gumbel_softmax_hard,
    reinforce,
    reparameterised_vae,
    simsiam,
    knowledge_of_a_detached_target_of_itself,
    logged_by_item,
    scaled_by_a_detached_norm,
    scaled_by_a_number,
]


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_nothing_is_told_in_a_loop(make: Callable[[], Any], audited: Any) -> None:
    assert audited(make) == []


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_nothing_is_told_in_a_trainer(make: Callable[[], Any], trained: Any) -> None:
    assert trained(make) == []
