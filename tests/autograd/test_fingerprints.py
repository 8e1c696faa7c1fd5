"""Every mutation of a battery, and random ones, must change the checksum; equal bits never do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeloop.autograd.fingerprints import _all_weights, _fold, fingerprint

SIZES = [(1,), (2,), (3, 5), (7, 64), (127,), (129, 65), (8192,), (8194,), (40, 1003), (254, 128), (60001,)]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor):
    """The elements as integers that share the tensor's memory."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return flat.view(BITS[flat.element_size()]).view(-1)


def drawn(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 100, shape, generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.complex(*(torch.randn(shape, generator=generator) for _ in range(2))).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def test_the_bits_decide_and_nothing_else():
    """The oracle: numpy's wrapping 64-bit arithmetic, one unit after the other."""
    x = drawn((1003,), torch.float32)
    weights = _all_weights(torch.device("cpu"))[:1003].numpy()
    with np.errstate(over="ignore"):
        expected = (x.numpy().view(np.int32).astype(np.int64) * weights).sum()
    assert fingerprint(x).item() == expected


def test_a_long_tensor_is_folded_as_a_plain_loop_would():
    lanes = torch.randint(-(2**62), 2**62, (127 * 40 + 13,), generator=torch.Generator().manual_seed(1))
    grid = lanes[: 127 * 40].numpy().reshape(40, 127)
    with np.errstate(over="ignore"):
        rows = [sum(row[1:], start=row[0]) for row in grid]
        columns = [sum(column[1:], start=column[0]) for column in grid.T]
    short = torch.tensor(np.array([*rows, *columns, *lanes[127 * 40 :].numpy()]))
    assert _fold(lanes).item() == _fold(short).item()
    assert short.numel() == 40 + 127 + 13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_a_copy_has_the_same_checksum_and_a_single_bit_another(shape, dtype):
    x = drawn(shape, dtype)
    before = fingerprint(x)
    assert before.dtype == torch.int64
    assert before.dim() == 0
    assert fingerprint(x.clone()).item() == before.item()
    bits = bits_of(x)
    for at in {0, bits.numel() // 2, bits.numel() - 1}:
        for flipped in (1,) if dtype == torch.bool else (1, -(2 ** (8 * bits.element_size() - 1))):
            old = bits[at].clone()
            bits[at] ^= torch.tensor(flipped, dtype=torch.int64).to(bits.dtype)
            assert fingerprint(x).item() != before.item(), (at, flipped)
            bits[at] = old
    assert fingerprint(x).item() == before.item()


def one_ulp(x):
    x.view(-1)[x.numel() // 3] = torch.nextafter(x.view(-1)[x.numel() // 3], torch.tensor(9.0, dtype=x.dtype))


def swap(a, b):
    def swapped(x):
        flat = x.view(-1)
        flat[[a, b]] = flat[[b, a]].clone()

    return swapped


MUTATIONS = {
    "one ulp": one_ulp,
    "swap of neighbours": swap(0, 1),
    "swap far apart": swap(0, -1),
    "swap a row apart": swap(0, 254),
    "swap of two rows": lambda x: x.copy_(x[[1, 0, *range(2, len(x))]]),
    "reversed": lambda x: x.copy_(x.flip(0)),
    "rolled by one": lambda x: x.copy_(x.view(-1).roll(1).view_as(x)),
    "rolled by an odd number": lambda x: x.copy_(x.view(-1).roll(127).view_as(x)),
    "permuted": lambda x: x.copy_(
        x.view(-1)[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(3))].view_as(x)
    ),
    "negate all": lambda x: x.neg_(),
    "negate every second": lambda x: x.view(-1)[1::2].neg_(),
    "negate every fourth": lambda x: x.view(-1)[3::4].neg_(),
    "negate two": lambda x: x.view(-1)[1:4:2].neg_(),
    "negate two rows": lambda x: x[:2].neg_(),
    "negate a column": lambda x: x[:, 1].neg_(),
    "times two": lambda x: x.mul_(2),
    "one entry zero": lambda x: x.view(-1)[5].zero_(),
    "sparse write": lambda x: x.view(-1)[:: x.numel() // 3].add_(1),
    "NaN": lambda x: x.view(-1)[2].fill_(float("nan")),
    "sorted": lambda x: x.copy_(x.view(-1).sort().values.view_as(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 8), (64, 64), (33, 254), (256, 128), (500, 254)], ids=str)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_battery_is_seen(mutation, shape, dtype):
    x = drawn(shape, dtype)
    if mutation == "swap a row apart" and x.numel() <= 254:
        pytest.skip("too small")
    before = fingerprint(x)
    MUTATIONS[mutation](x)
    assert fingerprint(x).item() != before.item()


@pytest.mark.parametrize("size", [2, 64, 8192, 2 * 127 * 254, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_that_are_equal_but_not_their_bits_are_seen(size, dtype):
    zeros = torch.zeros(size, dtype=dtype)
    before = fingerprint(zeros).item()
    assert fingerprint(-zeros).item() != before
    two = zeros.clone()
    two[:2] = -0.0
    assert fingerprint(two).item() != before
    assert fingerprint(torch.ones(size, dtype=dtype)).item() not in (
        before,
        fingerprint(-torch.ones(size, dtype=dtype)),
    )


def test_the_payload_of_a_nan_counts_and_a_nan_equals_itself():
    x = torch.full((100,), float("nan"))
    before = fingerprint(x).item()
    assert fingerprint(x.clone()).item() == before
    x.view(torch.int32)[7] |= 1
    assert x.isnan().all()
    assert fingerprint(x).item() != before


@pytest.mark.parametrize(
    ("name", "view"),
    {
        "transposed": lambda x: x.t(),
        "columns": lambda x: x[:, 2:5],
        "every second": lambda x: x[::2, ::3],
        "expanded": lambda x: x[:1].expand(7, -1),
        "expanded column": lambda x: x[:, :1].expand(-1, 9),
        "expanded entry": lambda x: x[:1, :1].expand(3, 4),
        "expanded from nothing": lambda x: x[0, 0].expand(5),
        "overlapping": lambda x: x.view(-1).unfold(0, 4, 2),
        "odd offset": lambda x: x.view(-1)[1:],
        "channels last": lambda x: x.view(2, 3, 2, -1).contiguous(memory_format=torch.channels_last),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex64], ids=str)
def test_strides_do_not_matter_to_what_is_seen(name, view, dtype):
    x = drawn((12, 1000), dtype)
    seen = view(x)
    before = fingerprint(seen).item()
    assert fingerprint(view(x.clone())).item() == before
    first = seen[(0,) * seen.dim()]
    first.copy_(first + 1)
    assert fingerprint(seen).item() != before


def test_what_lies_outside_of_a_view_does_not_matter():
    x = drawn((100, 100), torch.float32)
    before = fingerprint(x[:, :50]).item()
    x[:, 50:] = 0
    assert fingerprint(x[:, :50]).item() == before


def test_a_conjugate_and_a_negative_view_are_not_what_they_view():
    z = drawn((5,), torch.complex64)
    assert fingerprint(z.conj()).item() != fingerprint(z).item()
    assert fingerprint(z.conj().imag).item() == fingerprint(-z.imag).item()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_tensors_are_fingerprinted_with_their_indices(layout):
    dense = torch.eye(8) * torch.arange(1.0, 9.0)
    make = {
        "coo": lambda t: t.to_sparse(),
        "csr": lambda t: t.to_sparse_csr(),
        "csc": lambda t: t.to_sparse_csc(),
        "bsr": lambda t: t.to_sparse_bsr((2, 2)),
        "bsc": lambda t: t.to_sparse_bsc((2, 2)),
    }[layout]
    x = make(dense)
    before = fingerprint(x).item()
    assert fingerprint(make(dense)).item() == before
    assert fingerprint(make(dense.roll(2, 0))).item() != before
    (x._values() if layout == "coo" else x.values()).view(-1)[0] += 1
    assert fingerprint(x).item() != before


class Own(torch.Tensor):
    pass


def test_what_cannot_be_fingerprinted_is_none():
    assert fingerprint(torch.randn(3).as_subclass(Own)) is None
    assert fingerprint(torch.empty(3, device="meta")) is None
    assert fingerprint(torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)) is None
    assert fingerprint(torch.empty(3, dtype=torch.float4_e2m1fn_x2)) is None
    inside = []
    torch.func.vmap(lambda x: inside.append(fingerprint(x)) or x)(torch.ones(2, 2))
    assert inside == [None]


def test_parameters_buffers_and_empty_tensors_have_one():
    x = torch.randn(4)
    assert fingerprint(torch.nn.Parameter(x)).item() == fingerprint(torch.nn.Buffer(x)).item() == fingerprint(x).item()
    assert fingerprint(torch.empty(0, 3)).item() == 0
    assert fingerprint(torch.tensor(1.0)).item() != 0


def test_it_leaves_no_graph_no_random_number_and_no_write():
    x = torch.nn.Parameter(torch.randn(50))
    state, copy = torch.get_rng_state(), x.detach().clone()
    assert not fingerprint(x).requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copy)
    assert x._version == 0


@settings(deadline=None, max_examples=100)
@given(
    size=st.sampled_from([5, 100, 8191, 8193, 20_000, 33_000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 250)), min_size=1, max_size=6),
    seed=st.integers(0, 100),
)
def test_a_random_change_is_seen_and_taken_back_unseen(size, dtype, changes, seed):
    x = drawn((size,), dtype, seed)
    before, copy = fingerprint(x).item(), x.clone()
    bits = bits_of(x)
    for at, change in changes:
        bits[at % bits.numel()] ^= torch.tensor(change).to(bits.dtype)
    is_same = torch.equal(bits, bits_of(copy))
    assert (fingerprint(x).item() == before) == is_same
    bits.copy_(bits_of(copy))
    assert fingerprint(x).item() == before


@settings(deadline=None, max_examples=60)
@given(size=st.integers(2, 40_000), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_random_permutation_is_seen(size, seed, dtype):
    x = drawn((size,), dtype, seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    assert (fingerprint(x[order]).item() == fingerprint(x).item()) == torch.equal(x[order], x)
