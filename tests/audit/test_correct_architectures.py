"""Correct programs that look suspicious: models whose parts start at zero, rest, or are chosen by the data."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]
CLASSES = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
TOKENS = torch.randint(1, 20, (4, 7), generator=torch.Generator().manual_seed(3))
WORDS = torch.tensor([[1, 2, 3, 0], [4, 1, 0, 0]])


class Experts(nn.Module):
    def __init__(self, count: int, k: int, noise: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(6, count)
        self.experts = nn.ModuleList(nn.Linear(6, 1) for _ in range(count))
        self.k, self.noise = k, noise

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        weights, chosen = (scores + self.noise * torch.randn_like(scores)).topk(self.k)
        weights = weights.softmax(1)
        out = torch.zeros(len(x), 1)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == i)
            if len(rows):
                out[rows] += expert(x[rows]) * weights[rows, slots, None]
        return out


def experts_of_top_2() -> Any:
    model = Experts(8, 2, 0.1)
    return model, lambda i: F.mse_loss(model(X[i % 8 : i % 8 + 3]), Y[i % 8 : i % 8 + 3])


def experts_run_on_empty_batches() -> Any:
    model = Experts(12, 2)

    def step(i: int) -> Tensor:
        weights, chosen = model.gate(X).softmax(1).topk(2)
        out = torch.zeros(len(X), 1)
        for k, expert in enumerate(model.experts):
            rows, slots = torch.where(chosen == k)
            out = out.index_add(0, rows, expert(X[rows]) * weights[rows, slots, None])
        return F.mse_loss(out, Y)

    return model, step


def layer_drop() -> Any:
    model, dice = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), random.Random(0)
    model.append(nn.Linear(6, 1))

    def step(i: int) -> Tensor:
        x = X
        for layer in model[:-1]:
            if dice.random() > 0.4:
                x = x + layer(x).tanh()
        return F.mse_loss(model[-1](x), Y)

    return model, step


def early_exits() -> Any:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "ha": nn.Linear(6, 3), "hb": nn.Linear(6, 3)})

    def step(i: int) -> dict[str, Tensor]:
        a = model["a"](X).relu()
        b = model["b"](a).relu()
        return {
            "early": 0.3 * F.cross_entropy(model["ha"](a), CLASSES),
            "late": F.cross_entropy(model["hb"](b), CLASSES),
        }

    return model, step


def sandwich_of_widths() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def step(i: int) -> Tensor:
        width = (2, 4, 8)[i % 3]
        h = F.linear(X, model[0].weight[:width], model[0].bias[:width]).relu()
        return F.mse_loss(F.linear(h, model[2].weight[:, :width], model[2].bias), Y)

    return model, step


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


def lora() -> Any:
    model = nn.Sequential(LoRA(nn.Linear(6, 8)), nn.Tanh(), LoRA(nn.Linear(8, 1)))
    return model, lambda i: F.mse_loss(model(X), Y)


class ReZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(6, 6), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.inner(x).relu()


def rezero() -> Any:
    model = nn.Sequential(ReZero(), ReZero(), nn.Linear(6, 1))
    return model, lambda i: F.mse_loss(model(X), Y)


def zero_head() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.zeros_(model[2].weight)
    return model, lambda i: F.mse_loss(model(X), Y)


def zero_gamma() -> Any:
    model = nn.ModuleDict({"c": nn.Conv2d(3, 3, 3, padding=1), "n": nn.BatchNorm2d(3), "h": nn.Linear(3, 2)})
    nn.init.zeros_(model["n"].weight)
    target = torch.tensor([0, 1, 0, 1])

    def step(i: int) -> Tensor:
        return F.cross_entropy(model["h"]((IMAGES + model["n"](model["c"](IMAGES))).mean((2, 3))), target)

    return model, step


def vit_with_layer_scale() -> Any:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.scale = nn.Parameter(torch.full((8,), 1e-6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.scale * self.attention(y, y, y, need_weights=False)[0]

    model = nn.Sequential(nn.Linear(3, 8), *(Block() for _ in range(3)), nn.Linear(8, 2))
    target = torch.tensor([0, 1, 0, 1])
    return model, lambda i: F.cross_entropy(model(IMAGES.flatten(2).transpose(1, 2)).mean(1), target)


def masked_language_model() -> Any:
    model = nn.ModuleDict(
        {
            "e": nn.Embedding(21, 8, padding_idx=0),
            "t": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2),
        }
    )

    def step(i: int) -> Tensor:
        labels = torch.where(torch.rand(TOKENS.shape) < 0.3, TOKENS, -100)
        labels[0, 0] = TOKENS[0, 0]
        out = model["t"](model["e"](TOKENS.masked_fill(labels > 0, 20)))
        return F.cross_entropy((out @ model["e"].weight.t()).flatten(0, 1), labels.flatten(), ignore_index=-100)

    return model, step


def causal_language_model() -> Any:
    model = nn.ModuleDict(
        {"e": nn.Embedding(20, 8), "p": nn.Embedding(16, 8), "h": nn.Linear(8, 20, bias=False)}
        | {
            "t": nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
            )
        }
    )
    model["h"].weight = model["e"].weight

    def step(i: int) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        x = model["e"](TOKENS[:, :-1]) + model["p"](torch.arange(6))
        logits = model["h"](model["t"](x, mask=mask, is_causal=True))
        return F.cross_entropy(logits.transpose(1, 2), TOKENS[:, 1:])

    return model, step


def encoder_and_decoder() -> Any:
    model = nn.ModuleDict({"e": nn.Embedding(20, 8), "t": nn.Transformer(8, 2, 1, 1, 16, batch_first=True)})
    model["h"] = nn.Linear(8, 20)

    def step(i: int) -> Tensor:
        padding = TOKENS < 3
        padding[:, 0] = False
        out = model["t"](
            model["e"](TOKENS),
            model["e"](TOKENS[:, :-1]),
            tgt_mask=torch.ones(6, 6).triu(1).bool(),
            src_key_padding_mask=padding,
        )
        return F.cross_entropy(model["h"](out).flatten(0, 1), TOKENS[:, 1:].flatten())

    return model, step


def packed_lstm() -> Any:
    model = nn.ModuleDict(
        {"e": nn.Embedding(5, 4, padding_idx=0), "r": nn.LSTM(4, 6, 2, batch_first=True, dropout=0.2)}
    )
    model["h"] = nn.Linear(6, 2)

    def step(i: int) -> Tensor:
        packed = pack_padded_sequence(model["e"](WORDS), torch.tensor([3, 2]), batch_first=True)
        out, _ = model["r"](packed)
        out, lengths = pad_packed_sequence(out, batch_first=True)
        return F.cross_entropy(model["h"](out[torch.arange(2), lengths - 1]), torch.tensor([0, 1]))

    return model, step


def bidirectional_gru() -> Any:
    model = nn.ModuleDict({"r": nn.GRU(6, 5, bidirectional=True, batch_first=True), "h": nn.Linear(10, 1)})
    return model, lambda i: F.mse_loss(model["h"](model["r"](X.view(4, 4, 6))[0]).squeeze(-1), Y.view(4, 4))


def rnn_cell_by_hand() -> Any:
    model = nn.ModuleDict({"c": nn.RNNCell(6, 5), "h": nn.Linear(5, 1)})

    def step(i: int) -> Tensor:
        state, total = torch.zeros(4, 5), torch.zeros(())
        for t in range(4):
            state = model["c"](X.view(4, 4, 6)[:, t], state)
            total = total + F.mse_loss(model["h"](state), Y.view(4, 4, 1)[:, t])
        return total / 4

    return model, step


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(12, 6), nn.GRUCell(6, 6)
        self.edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.edges
        sent = self.message(torch.cat([x[a], x[b]], 1)).relu()
        return self.update(torch.zeros_like(x).index_add_(0, b, sent), x)


def graph_network() -> Any:
    model = nn.ModuleList([Graph(), nn.Linear(6, 1)])
    return model, lambda i: F.mse_loss(model[1](model[0](X)).mean(0), Y[0])


def graph_by_scatter() -> Any:
    model = nn.Linear(6, 1)
    index = torch.arange(16) % 4

    def step(i: int) -> Tensor:
        sums = torch.zeros(4, 1).scatter_add(0, index[:, None], model(X))
        tops = torch.zeros(4, 1).scatter_reduce(0, index[:, None], model(X), "amax", include_self=False)
        return F.mse_loss(sums + tops, Y[:4])

    return model, step


def u_net() -> Any:
    model = nn.ModuleDict(
        {"d": nn.Conv2d(3, 8, 3, 2, 1), "u": nn.ConvTranspose2d(8, 3, 2, 2), "p": nn.Conv2d(8, 12, 1)}
    )

    def step(i: int) -> Tensor:
        down = model["d"](IMAGES).relu()
        up = model["u"](down) + F.pixel_shuffle(model["p"](down), 2)
        return F.mse_loss(torch.cat([up, IMAGES], 1).mean(1), IMAGES.mean(1)) + F.l1_loss(
            F.interpolate(up, scale_factor=0.5, mode="bilinear"), F.avg_pool2d(IMAGES, 2)
        )

    return model, step


def spatial_transformer() -> Any:
    model = nn.ModuleDict({"l": nn.Linear(192, 6), "h": nn.Linear(192, 2)})
    nn.init.zeros_(model["l"].weight)
    with torch.no_grad():
        model["l"].bias.copy_(torch.tensor([1.0, 0.1, 0.1, 0.1, 1.0, 0.1]))

    def step(i: int) -> Tensor:
        grid = F.affine_grid(model["l"](IMAGES.flatten(1)).view(-1, 2, 3), IMAGES.shape, align_corners=False)
        return F.cross_entropy(
            model["h"](F.grid_sample(IMAGES, grid, align_corners=False).flatten(1)), torch.tensor([0, 1, 0, 1])
        )

    return model, step


def einsum_attention() -> Any:
    model = nn.ModuleDict({k: nn.Linear(6, 6) for k in "qkv"})

    def step(i: int) -> Tensor:
        q, k, v = (model[n](X.view(4, 4, 6)) for n in "qkv")
        scores = torch.einsum("bid,bjd->bij", q, k) / 6**0.5
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
        return F.mse_loss(torch.einsum("bij,bjd->bid", scores.softmax(-1), v), X.view(4, 4, 6))

    return model, step


def parametrized() -> Any:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        parametrizations.orthogonal(nn.Linear(8, 8)),
        nn.Linear(8, 1),
    )
    return model, lambda i: F.mse_loss(model(X), Y)


def tied_autoencoder() -> Any:
    model = nn.Linear(6, 4)
    return model, lambda i: F.mse_loss(F.linear(model(X).relu(), model.weight.t()), X)


def functional_call_of_a_copy() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def step(i: int) -> Tensor:
        weights = dict(model.named_parameters())
        inner = F.mse_loss(torch.func.functional_call(model, weights, (X[:8],)), Y[:8])
        gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {k: w - 0.1 * g for (k, w), g in zip(weights.items(), gradients, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, fast, (X[8:],)), Y[8:])

    return model, step


def jacobian_by_func() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def step(i: int) -> dict[str, Tensor]:
        slopes = torch.func.vmap(torch.func.grad(lambda x: model(x).squeeze()))(X)
        return {"fit": F.mse_loss(model(X), Y), "slopes": (slopes.norm(dim=1) - 1).square().mean()}

    return model, step


def complex_weights() -> Any:
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(6, 1, dtype=torch.cfloat))})
    return model, lambda i: F.mse_loss((X.to(torch.cfloat) @ model["w"]).abs(), Y.abs())


def fourier_layer() -> Any:
    model = nn.ParameterDict({"w": nn.Parameter(torch.rand(4, dtype=torch.cfloat))})
    return model, lambda i: F.mse_loss(torch.fft.irfft(torch.fft.rfft(X) * model["w"], n=6), X.flip(1))


def embedding_bag() -> Any:
    model = nn.ModuleDict({"e": nn.EmbeddingBag(8, 4, padding_idx=0), "h": nn.Linear(4, 1)})
    return model, lambda i: F.mse_loss(model["h"](model["e"](WORDS)), Y[:2])


def sometimes_one_branch() -> Any:
    model = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})
    return model, lambda i: F.mse_loss(model["ab"[i % 2]](X), Y)


def a_branch_that_comes_late() -> Any:
    model = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    model.append(nn.Linear(6, 1))

    def step(i: int) -> Tensor:
        x = X
        for layer in model[: 1 + i // 3]:
            x = layer(x).tanh()
        return F.mse_loss(model[-1](x), Y)

    return model, step


def checkpointed() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()), nn.Linear(8, 1))
    return model, lambda i: F.mse_loss(model[2](checkpoint(model[1], model[0](X), use_reentrant=False)), Y)


def checkpointed_again() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8)), nn.Linear(8, 1))
    return model, lambda i: F.mse_loss(model[2](checkpoint(model[1], model[0](X), use_reentrant=True)), Y)


def deep_and_normalised() -> Any:
    model = nn.Sequential(
        nn.Linear(6, 8), *(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(20))
    )
    model.append(nn.Linear(8, 1))
    return model, lambda i: F.mse_loss(model(X), Y)


def deconvolution_gan_generator() -> Any:
    model = nn.Sequential(
        nn.ConvTranspose2d(6, 8, 4), nn.BatchNorm2d(8), nn.ReLU(True), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()
    )
    return model, lambda i: F.mse_loss(model(X[:4, :, None, None]), IMAGES)


PROGRAMS = [value for name, value in list(globals().items()) if callable(value) and getattr(value, "__code__", None)]
IN_A_LOOP_ONLY = ["complex_weights", "fourier_layer"]
"""torch has no fused Adam for complex numbers, and a Trainer asks for it"""
PROGRAMS = [program for program in PROGRAMS if program.__module__ == __name__ and not program.__code__.co_argcount]


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_nothing_is_told_in_a_loop(make: Callable[[], Any], audited: Any) -> None:
    assert audited(make) == []


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_nothing_is_told_in_a_trainer(make: Callable[[], Any], trained: Any) -> None:
    if make.__name__ in IN_A_LOOP_ONLY:
        pytest.skip("no fused Adam for complex numbers")
    assert trained(make) == []
