from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safeloop.checks.setup.copies import TiedByCopy
from safeloop.checks.setup.patterned import is_patterned
from safeloop.checks.views import SetupView
from safeloop.optim.ownership import owned_by_patterns


def found_in(model, frozen=()):
    model = nn.ModuleDict(model) if isinstance(model, dict) else model
    return list(TiedByCopy.find(SetupView(model, owned_by_patterns(model, {"main": ["*"]}, frozen))))


def words(tie):
    model = nn.ModuleDict({"emb": nn.Embedding(12, 6), "mid": nn.Linear(6, 6), "out": nn.Linear(6, 12, bias=False)})
    tie(model["emb"], model["out"])
    return model


def by_new_parameter(emb, out):
    out.weight = nn.Parameter(emb.weight.detach().clone())


def by_copy(emb, out):
    out.weight.data.copy_(emb.weight.data)


def by_data(emb, out):
    out.weight.data = emb.weight.data


def by_init(emb, out):
    with torch.no_grad():
        out.weight.set_(emb.weight.detach().clone())


def by_state(emb, out):
    out.load_state_dict({"weight": emb.weight})


@pytest.mark.parametrize("tie", [by_new_parameter, by_copy, by_data, by_init, by_state])
def test_an_output_layer_with_a_copy_of_the_embedding_is_named(tie):
    (fault,) = found_in(words(tie))
    assert (fault.code, fault.severity, fault.names) == ("SL211", "warning", ("emb.weight", "out.weight"))
    assert "`emb.weight`, `out.weight` [12, 6] hold the same values, and are two parameters" in fault.what
    assert "`out.weight = emb.weight`" in fault.fix
    assert ("over the same memory" in fault.what) == (tie is by_data)


def autoencoder(width):
    model = nn.ModuleDict({"enc": nn.Linear(8, width), "dec": nn.Linear(width, 8)})
    model["dec"].weight = nn.Parameter(model["enc"].weight.detach().t().clone())
    return model


@pytest.mark.parametrize("width", [3, 8, 20])
def test_a_decoder_with_the_transposed_weights_of_the_encoder_is_named(width):
    (fault,) = found_in(autoencoder(width))
    assert fault.names == ("enc.weight", "dec.weight")
    assert "the same values transposed" in fault.what
    assert "use `enc.weight` transposed in `forward`" in fault.fix


def test_a_convolution_and_its_transpose_are_compared():
    model = nn.ModuleDict({"down": nn.Conv2d(3, 5, 3, bias=False), "up": nn.ConvTranspose2d(5, 3, 3, bias=False)})
    model["up"].weight.data.copy_(model["down"].weight)
    assert [fault.names for fault in found_in(model)] == [("down.weight", "up.weight")]


class ByHand(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 5))
        self.back = nn.Parameter(start(self.table.detach()))


def test_bare_parameters_are_compared():
    assert [fault.names for fault in found_in(ByHand(lambda table: table.clone()))] == [("table", "back")]


def test_a_bare_matrix_may_start_as_the_transposed_one_beside_it_but_not_in_its_memory():
    assert found_in(ByHand(lambda table: table.t().clone())) == []
    (fault,) = found_in(ByHand(lambda table: table.t()))
    assert "over the same memory" in fault.what


def test_two_heads_with_the_copied_embedding_are_both_named():
    model = words(by_copy)
    model["second"] = nn.Linear(6, 12)
    model["second"].weight.data.copy_(model["emb"].weight)
    assert [fault.names for fault in found_in(model)] == [("emb.weight", "out.weight"), ("emb.weight", "second.weight")]


def tied(emb, out):
    out.weight = emb.weight


def twins():
    one = nn.Sequential(nn.Linear(6, 6), nn.GRU(6, 6), nn.MultiheadAttention(6, 2))
    return nn.ModuleDict({"a": one, "b": copy.deepcopy(one), "c": copy.deepcopy(one)})


def upcycled():
    expert = nn.Linear(6, 6)
    return nn.ModuleList([copy.deepcopy(expert) for _ in range(40)])


def same_pretrained_vectors():
    vectors = torch.randn(10, 6)
    return {
        "encoder": nn.Sequential(nn.Embedding.from_pretrained(vectors.clone(), freeze=False), nn.Linear(6, 3)),
        "decoder": nn.Sequential(nn.Embedding.from_pretrained(vectors.clone(), freeze=False), nn.GRU(6, 3)),
    }


def static_and_tuned():
    vectors = torch.randn(10, 6)
    return {
        "tuned": nn.Embedding.from_pretrained(vectors, freeze=False),
        "static": nn.Embedding.from_pretrained(vectors),
    }


class Positions(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.clone())


class OtherPositions(Positions):
    def __init__(self, table):
        nn.Module.__init__(self)
        self.position = nn.Parameter(table.clone())


def sinusoids(length=32, dim=16):
    at = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(1e4) / dim))
    return torch.stack([at.sin(), at.cos()], -1).flatten(1)


def fourier(size=24):
    at = torch.arange(size)
    return (2 * math.pi / size * at[:, None] * at).cos()


PATTERNS = {
    "zeros": torch.zeros(8, 8),
    "ones": torch.ones(8, 6),
    "eye": torch.eye(12),
    "sinusoids": sinusoids(),
    "fourier": fourier(),
    "arange": torch.arange(1.0, 17.0).log().expand(12, 16),
    "ramp": torch.linspace(0, 1, 64).reshape(8, 8),
    "decay": torch.exp(-torch.rand(7, 1) * torch.arange(20)),
    "signs": (torch.arange(64).reshape(8, 8) % 3 - 1).float(),
}


def dirac():
    model = nn.ModuleDict({"a": nn.Conv1d(6, 6, 3), "b": nn.ConvTranspose1d(6, 6, 3)})
    for layer in model.values():
        nn.init.dirac_(layer.weight)
    return model


def ema_of_codebook():
    model = nn.Module()
    model.codebook = nn.Embedding(16, 4)
    model.ema_w = nn.Parameter(model.codebook.weight.detach().clone())
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: words(tied),
        lambda: words(lambda emb, out: None),
        twins,
        upcycled,
        same_pretrained_vectors,
        static_and_tuned,
        dirac,
        ema_of_codebook,
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 4),
        lambda: nn.Transformer(8, 2, 2, 2, 8, batch_first=True),
        lambda: nn.ModuleDict({"net": nn.Linear(6, 6), "target": copy.deepcopy(nn.Linear(6, 6))}),
        lambda: nn.LSTM(4, 4, 2, bidirectional=True),
        lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4)),
        lambda: nn.Sequential(nn.Linear(6, 6, device="meta"), nn.Linear(6, 6, device="meta")),
        lambda: nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 6)),
    ],
)
def test_tied_weights_copies_of_modules_and_the_like_are_right(make):
    assert found_in(make()) == []


@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_that_begin_with_the_same_pattern_are_right(pattern):
    table = PATTERNS[pattern]
    assert is_patterned(table)
    assert found_in({"a": Positions(table), "b": OtherPositions(table)}) == []


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000), st.integers(2, 24), st.integers(8, 40), st.sampled_from(["normal", "uniform", "orthogonal"])
)
def test_random_weights_follow_no_pattern(seed, rows, columns, kind):
    weight = torch.empty(rows, columns, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    if kind == "orthogonal":
        nn.init.orthogonal_(weight, generator=generator)
    else:
        weight = (torch.randn if kind == "normal" else torch.rand)(rows, columns, generator=generator) - (
            kind != "normal"
        ) / 2
    assert not is_patterned(weight)


def test_what_is_frozen_cannot_part():
    assert found_in(words(by_copy), frozen=["emb.*"]) == []
    model = words(by_copy)
    model["out"].requires_grad_(False)
    assert found_in(model) == []


def test_neither_weights_nor_random_state_change():
    model, state = words(by_copy), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    found_in(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
