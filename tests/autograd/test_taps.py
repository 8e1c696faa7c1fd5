from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from safeloop.autograd import taps
from safeloop.autograd.cut import reaching
from safeloop.autograd.taps import backward_with_taps


def one(term, weight=1.0):
    return torch.full_like(term, weight)


def gram_at(cut, terms, seeds):
    """The oracle: K separate `torch.autograd.grad` calls at the cut tensors, in float64."""
    gradients = [
        torch.autograd.grad(term, cut, seed, retain_graph=True, allow_unused=True, materialize_grads=True)
        for term, seed in zip(terms, seeds, strict=True)
    ]
    rows = torch.stack([torch.cat([g.double().flatten() for g in row]) for row in gradients])
    return rows @ rows.T


def gram_by_separate_passes(graph):
    """The oracle for any graph: a pass for each term that goes no further than the first shared node on each way."""
    shared = [node for node, mask in reaching(graph.terms).items() if mask.bit_count() > 1]
    caught = [{} for _ in graph.terms]
    for term, seed, own in zip(graph.terms, graph.seeds, caught, strict=True):
        handles = []
        for node in shared:

            def stop(gradients, node=node, own=own):
                for output, gradient in enumerate(gradients):
                    if gradient is not None:
                        known = own.get((node, output), 0)
                        own[node, output] = known + gradient.double()
                return tuple(None if g is None else torch.zeros_like(g) for g in gradients)

            handles.append(node.register_prehook(stop))
        torch.autograd.backward([term], [seed], retain_graph=True)
        for handle in handles:
            handle.remove()
    return torch.tensor(
        [[sum(float((a[edge] * b[edge]).sum()) for edge in a.keys() & b.keys()) for b in caught] for a in caught],
        dtype=torch.float64,
    )


def equal(left, right):
    return all(
        (a is None and b is None) or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(left, right, strict=True)
    )


class Net(nn.Module):
    """A trunk and heads, with their shared features kept for the oracle."""

    def __init__(self, trunk, heads, num_features=8):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList([nn.Linear(num_features, 3) for _ in range(heads)])

    def forward(self, x):
        self.features = self.trunk(x)
        return [F.cross_entropy(head(self.features), torch.arange(len(x), device=x.device) % 3) for head in self.heads]


TRUNKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh()), (6, 5)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()), (6, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), (4, 1, 4, 4)),
    "frozen first layer": (lambda: nn.Sequential(nn.Linear(5, 8).requires_grad_(False), nn.Linear(8, 8)), (4, 5)),
    "linear": (lambda: nn.Linear(5, 8), (4, 5)),
}


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("num_terms", [2, 3, 8])
def test_the_geometry_is_that_of_separate_gradients_at_the_cut(trunk, num_terms):
    torch.manual_seed(0)
    make, shape = TRUNKS[trunk]
    net = Net(make(), num_terms).double()
    terms = net(torch.randn(shape, dtype=torch.float64))
    seeds = [one(term, 0.5 + k) for k, term in enumerate(terms)]
    expected = gram_at([net.features], terms, seeds)
    geometry = backward_with_taps(terms, seeds)
    assert geometry.gram.dtype == torch.float64
    torch.testing.assert_close(geometry.gram, expected, rtol=1e-12, atol=1e-15)
    norms = expected.diagonal().sqrt()
    torch.testing.assert_close(geometry.norms, norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(geometry.cosines, expected / norms / norms[:, None], rtol=1e-12, atol=1e-15)
    assert geometry.pairs == tuple((i, j) for i in range(num_terms) for j in range(i + 1, num_terms))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_graph_has_the_geometry_of_separate_passes(draw_graph, data):
    make = draw_graph(data)
    apart, together = make(), make()
    expected = gram_by_separate_passes(apart)
    geometry = backward_with_taps(together.terms, together.seeds)
    if geometry is None:
        assert expected.count_nonzero() == 0
    else:
        size = expected.diagonal().abs().amax()
        torch.testing.assert_close(geometry.gram, expected, rtol=1e-9, atol=1e-12 * (1 + float(size)))
        assert {(i, j) for i, j in expected.nonzero().tolist() if i < j} <= set(geometry.pairs)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_any_gradient_is_bitwise_that_of_the_fused_backward(draw_graph, data, dtype):
    make = draw_graph(data)
    fused, tapped = make(dtype), make(dtype)
    torch.autograd.backward(fused.terms, fused.seeds)
    geometry = backward_with_taps(tapped.terms, tapped.seeds)
    assert equal(tapped.grads(), fused.grads())
    assert geometry is None or geometry.gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_graph_that_changes_from_step_to_step_is_cut_anew_each_time():
    torch.manual_seed(0)
    first, second, heads = nn.Linear(4, 4), nn.Linear(4, 4), [nn.Linear(4, 1) for _ in range(3)]
    for module in (first, second, *heads):
        module.double()
    for step in range(6):
        z = first(torch.randn(3, 4, dtype=torch.float64)).tanh()
        if step % 2:
            z = second(z).tanh()
        terms = [head(z).square().mean() for head in heads[: 2 + step % 2]]
        seeds = [one(term) for term in terms]
        expected = gram_at([z], terms, seeds)
        torch.testing.assert_close(backward_with_taps(terms, seeds).gram, expected, rtol=1e-12, atol=1e-15)


def test_a_term_that_uses_the_trunk_twice_counts_both_ways():
    torch.manual_seed(0)
    trunk, head, other = (nn.Linear(4, 4).double() for _ in range(3))
    z = trunk(torch.randn(3, 4, dtype=torch.float64))
    again = trunk(torch.randn(3, 4, dtype=torch.float64))
    terms = [(head(z) * z).sum() + (head(again) - z).square().sum(), other(z).square().sum()]
    seeds = [one(term) for term in terms]
    expected = gram_at([z], terms, seeds)
    torch.testing.assert_close(backward_with_taps(terms, seeds).gram, expected, rtol=1e-12, atol=0)


def test_a_term_that_is_a_cut_tensor_itself_is_measured_there():
    torch.manual_seed(0)
    mean = nn.Linear(4, 1)(torch.randn(3, 4)).square().mean()
    root = mean.sqrt()
    geometry = backward_with_taps([mean, root], [one(mean, 2.0), one(root, 3.0)])
    slope = 3 * 0.5 / float(mean.detach().sqrt())
    torch.testing.assert_close(geometry.gram, torch.tensor([[4.0, 2 * slope], [2 * slope, slope**2]]))
    torch.testing.assert_close(geometry.cosines, torch.ones(2, 2))


def test_a_term_of_many_elements_is_weighted_element_by_element():
    torch.manual_seed(0)
    z = nn.Linear(4, 4).double()(torch.randn(3, 4, dtype=torch.float64))
    terms, seeds = [z.sin(), z.square().sum()], [torch.randn(3, 4, dtype=torch.float64), torch.tensor(0.3).double()]
    expected = gram_at([z], terms, seeds)
    torch.testing.assert_close(backward_with_taps(terms, seeds).gram, expected, rtol=1e-12, atol=0)


def test_several_cut_tensors_count_as_one_long_vector():
    torch.manual_seed(0)
    lstm, heads = nn.LSTM(3, 4).double(), [nn.Linear(4, 1).double() for _ in range(3)]
    out, (hidden, cell) = lstm(torch.randn(5, 2, 3, dtype=torch.float64))
    terms = [
        heads[0](out).mean() + heads[1](hidden).square().mean(),
        heads[1](out).square().mean() + cell.sum(),
        heads[2](hidden).exp().mean() - cell.mean(),
    ]
    seeds = [one(term) for term in terms]
    expected = gram_at([out, hidden, cell], terms, seeds)
    torch.testing.assert_close(backward_with_taps(terms, seeds).gram, expected, rtol=1e-12, atol=1e-15)


def test_pairs_that_have_no_cut_tensor_in_common_are_not_listed():
    first, second = (nn.Linear(2, 2)(torch.ones(1, 2)) for _ in range(2))
    alone = nn.Linear(2, 2)(torch.ones(1, 2)).sum()
    terms = [first.sum(), second.sum(), first.sin().sum(), alone, second.sin().sum()]
    geometry = backward_with_taps(terms, [one(term) for term in terms])
    assert geometry.pairs == ((0, 2), (1, 4))
    assert geometry.cosines[0, 1] == geometry.cosines[0, 3] == geometry.norms[3] == 0
    assert geometry.cosines.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_checkpoints_are_passed_through(use_reentrant, where):
    def run(backward):
        torch.manual_seed(0)
        trunk, head, other = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5)).double() for _ in range(3))
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        z = checkpoint(trunk, x, use_reentrant=use_reentrant) if where == "trunk" else trunk(x)
        y = checkpoint(head, z, use_reentrant=use_reentrant) if where == "head" else head(z)
        terms = [y.square().mean(), other(z).exp().mean()]
        result = backward(terms, [one(term) for term in terms], z)
        return result, [p.grad for p in (*trunk.parameters(), *head.parameters(), *other.parameters(), x)]

    def oracle(terms, seeds, z):
        if use_reentrant and where == "head":  # refuses autograd.grad: its gradient at z is that of a plain head
            torch.autograd.backward(terms, seeds)
            return None
        gram = gram_at([z], terms, seeds)
        torch.autograd.backward(terms, seeds)
        return gram

    expected, fused = run(oracle)
    geometry, tapped = run(lambda terms, seeds, z: backward_with_taps(terms, seeds))
    assert equal(tapped, fused)
    assert geometry.pairs == ((0, 1),)
    if expected is not None:
        torch.testing.assert_close(geometry.gram, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_shared_as_features_and_as_weights(sparse):
    def run(backward):
        torch.manual_seed(0)
        table, heads = nn.Embedding(7, 4, sparse=sparse), [nn.Linear(4, 1) for _ in range(2)]
        z = table(torch.tensor([1, 2, 2, 5]))
        terms = [head(z).square().mean() for head in heads]
        seeds = [one(term) for term in terms]
        expected = gram_at([z], terms, seeds)
        geometry = backward(terms, seeds)
        gradient = table.weight.grad
        return geometry, expected, gradient.to_dense() if sparse else gradient

    geometry, expected, gradient = run(backward_with_taps)
    _, _, fused = run(torch.autograd.backward)
    torch.testing.assert_close(geometry.gram.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(gradient, fused)


def test_a_sparse_gradient_at_the_cut_is_measured_dense():
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(7, 4)) * 2.0
    terms = [F.embedding(torch.tensor(ids), table, sparse=True).square().sum() for ids in ([1, 2, 2], [2, 5])]
    values = table.detach().double()
    first, second = torch.zeros(2, 7, 4, dtype=torch.float64)
    first[1], first[2], second[2], second[5] = 2 * values[1], 4 * values[2], 2 * values[2], 2 * values[5]
    rows = torch.stack([first.flatten(), second.flatten()])
    geometry = backward_with_taps(terms, [one(term) for term in terms])
    torch.testing.assert_close(geometry.gram.double(), rows @ rows.T, rtol=1e-6, atol=0)


def test_a_complex_cut_tensor_counts_as_two_real_ones():
    torch.manual_seed(0)
    z = torch.fft.fft(nn.Linear(4, 4).double()(torch.randn(2, 4, dtype=torch.float64)))
    terms = [z.abs().sum(), (z * (1 + 2j)).real.square().sum(), z.imag.exp().sum()]
    seeds = [one(term) for term in terms]
    rows = torch.stack(
        [
            torch.view_as_real(torch.autograd.grad(term, z, retain_graph=True)[0].resolve_conj()).flatten()
            for term in terms
        ]
    )
    torch.testing.assert_close(backward_with_taps(terms, seeds).gram, rows @ rows.T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    torch.manual_seed(0)
    z = nn.Linear(4, 4096).to(dtype)(torch.ones(16, 4, dtype=dtype))
    terms = [(z.float() * 3).sum(), (z.float() * 200).sum()]
    geometry = backward_with_taps(terms, [one(term) for term in terms])
    assert geometry.gram.dtype == torch.float32
    n = 16 * 4096
    torch.testing.assert_close(geometry.gram, torch.tensor([[9.0, 600.0], [600.0, 40000.0]]) * n, rtol=1e-5, atol=0)


def test_an_autocast_region_around_the_call_leaves_the_sums_in_float32():
    torch.manual_seed(0)
    z = nn.Linear(4, 8)(torch.randn(3, 4))
    terms = [(z * 1.001).sum(), (z * 1.003).sum()]
    with torch.autocast("cpu", torch.bfloat16):
        geometry = backward_with_taps(terms, [one(term) for term in terms])
    assert geometry.gram.dtype == torch.float32
    assert float(geometry.gram[0, 1]) == pytest.approx(24 * 1.001 * 1.003, rel=1e-6)


def shared_leaf_only():
    layer = nn.Linear(2, 1)
    return [layer(torch.ones(1, 2)).sum(), layer(torch.zeros(1, 2)).square().sum()], layer


def one_term():
    layer = nn.Linear(2, 1)
    return [layer(torch.ones(1, 2)).sum()], layer


def with_a_leaf_as_term():
    layer = nn.Linear(2, 1, bias=False)
    return [layer.weight, layer(torch.ones(1, 2)).sum()], layer


@pytest.mark.parametrize("make", [shared_leaf_only, one_term, with_a_leaf_as_term])
def test_where_nothing_is_shared_it_is_a_plain_backward(make):
    torch.manual_seed(0)
    terms, layer = make()
    torch.manual_seed(0)
    same, expected = make()
    assert backward_with_taps(terms, [one(term) for term in terms]) is None
    torch.autograd.backward(same, [one(term) for term in same])
    assert equal([p.grad for p in layer.parameters()], [p.grad for p in expected.parameters()])


def test_a_non_finite_term_leaves_the_norms_of_the_others_finite():
    z = nn.Linear(2, 2)(torch.ones(1, 2))
    terms = [(z * math.inf).sum(), (z * 2).sum(), (z * math.nan).sum()]
    geometry = backward_with_taps(terms, [one(term) for term in terms])
    assert geometry.norms.isfinite().tolist() == [False, True, False]


def test_a_zero_gradient_has_cosine_zero_and_tiny_ones_keep_theirs():
    z = nn.Linear(2, 2)(torch.ones(1, 2))
    terms = [(z * 0).sum(), (z * 1e-15).sum(), (z * -1e-15).sum()]
    geometry = backward_with_taps(terms, [one(term) for term in terms])
    torch.testing.assert_close(geometry.cosines, torch.tensor([[0.0, 0, 0], [0, 1, -1], [0, -1, 1]]))


def test_hooks_on_tensors_and_nodes_of_the_user_do_what_they_did():
    def run(backward):
        torch.manual_seed(0)
        trunk, heads = nn.Linear(4, 4), [nn.Linear(4, 1) for _ in range(2)]
        z = trunk(torch.randn(3, 4))
        z.register_hook(lambda gradient: gradient * 3)
        terms = [head(z).square().mean() for head in heads]
        terms[0].grad_fn.register_hook(lambda inputs, outputs: tuple(g * 2 for g in inputs))
        backward(terms, [one(term) for term in terms])
        return trunk.weight.grad

    assert torch.equal(run(backward_with_taps), run(torch.autograd.backward))


class Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("no gradient today")


def living_recorders():
    gc.collect()
    return sum(type(candidate) is taps._Recorder for candidate in gc.get_objects())


@pytest.mark.parametrize("where", ["head", "trunk"])
def test_an_exception_inside_the_backward_leaves_no_hook_behind(where):
    trunk, heads = nn.Linear(4, 4), [nn.Linear(4, 1) for _ in range(2)]
    z = trunk(torch.randn(3, 4))
    z = (Refuses.apply(z) if where == "trunk" else z).tanh()
    y = Refuses.apply(z) if where == "head" else z
    terms = [heads[0](y).mean(), heads[1](z).mean()]
    with pytest.raises(ValueError, match="no gradient today"):
        backward_with_taps(terms, [one(term) for term in terms])
    assert living_recorders() == 0, "a hook on a node of the living graph holds it"
    assert all(term.grad_fn is not None for term in terms)


def test_a_hook_that_cannot_be_placed_takes_the_others_away():
    z = nn.Linear(4, 4)(torch.randn(3, 4))
    terms = [z.sin().sum(), z.cos().sum()]
    with pytest.raises(RuntimeError, match="shape"):
        backward_with_taps(terms, [torch.ones(2), torch.ones(())])
    assert living_recorders() == 0
    backward_with_taps(terms, [one(term) for term in terms])
    assert living_recorders() == 0
    assert all(term.grad_fn is not None for term in terms)


def test_a_cut_tensor_s_gradients_are_let_go_before_the_trunk_runs():
    gradients, alive = [], []

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            result = gradient * 2
            gradients.append(weakref.ref(result))
            return result

    class Trunk(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            alive.extend(reference() is not None for reference in gradients)
            return gradient

    z = Trunk.apply(nn.Linear(4, 4)(torch.randn(3, 4)))
    terms = [Head.apply(z).square().sum() for _ in range(3)]
    assert backward_with_taps(terms, [one(term) for term in terms]) is not None
    assert alive == [False, False, False]


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor.detach()


@pytest.mark.parametrize("make", ["cut", "no cut", "fails"])
def test_nothing_keeps_the_graph_after_return(make):
    kept = []

    def pack(tensor):
        holder = Kept(tensor)
        kept.append(weakref.ref(holder))
        return holder

    trunk, heads = nn.Linear(4, 4), [nn.Linear(4, 1) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        z = trunk(torch.randn(3, 4)).tanh()
        y = Refuses.apply(z) if make == "fails" else z
        terms = [heads[0](z).square().mean(), (heads[1](y) if make != "no cut" else heads[1](z.detach())).exp().mean()]
    del y, z
    gc.collect()
    gc.disable()
    try:
        assert any(reference() is not None for reference in kept)
        geometry = None
        with contextlib.suppress(ValueError):
            geometry = backward_with_taps(terms, [one(term) for term in terms])
        del terms
        assert all(reference() is None for reference in kept), "alive without a collection"
        assert (geometry is not None) == (make == "cut")
    finally:
        gc.enable()


def test_a_path_that_the_walk_could_not_see_gives_no_geometry_and_the_right_gradients():
    def run(backward):
        torch.manual_seed(0)
        x, w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True), nn.Linear(3, 3).double()
        deep = w(x)
        reader = deep.sin()
        made = {}

        def old():
            """Two nodes whose numbers say that they are older than what they were made from."""
            made["middle"] = reader.tanh().exp()

        for _ in range(50):
            deep.sin()
        thread = threading.Thread(target=old)
        thread.start()
        thread.join()
        middle = made["middle"]
        terms = [middle.sin().sum(), middle.cos().sum(), reader.sum() + deep.sum(), deep.exp().sum()]
        return backward(terms, [one(term) for term in terms]), x.grad

    geometry, gradient = run(backward_with_taps)
    _, expected = run(torch.autograd.backward)
    assert geometry is None
    assert torch.equal(gradient, expected)


def test_a_graph_whose_numbers_are_out_of_order_is_measured_all_the_same():
    torch.manual_seed(0)
    base = nn.Linear(3, 3).double()(torch.randn(2, 3, dtype=torch.float64)) * 1
    view = base[:]
    base.mul_(2)
    terms = [(view * 3).sin().sum(), base.square().sum()]
    seeds = [one(term) for term in terms]
    expected = gram_at([base], terms, seeds)
    torch.testing.assert_close(backward_with_taps(terms, seeds).gram, expected, rtol=1e-12, atol=0)


def test_second_order_terms_are_measured_at_what_they_share():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def terms():
        score = critic(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return [score.mean(), slope.square().sum()]

    fused = terms()
    torch.autograd.backward(fused, [one(term) for term in fused])
    expected = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    tapped = terms()
    geometry = backward_with_taps(tapped, [one(term) for term in tapped])
    assert equal([p.grad for p in critic.parameters()], expected)
    apart = terms()
    oracle = gram_by_separate_passes(SimpleNamespace(terms=apart, seeds=[one(term) for term in apart]))
    torch.testing.assert_close(geometry.gram, oracle, rtol=1e-12, atol=0)


def test_a_gradient_that_cannot_be_laid_out_gives_no_geometry_and_the_right_gradients():
    def run(backward):
        torch.manual_seed(0)
        weight = torch.randn(3, 2, requires_grad=True)
        nested = torch.nested.as_nested_tensor([weight[:1], weight[1:]], layout=torch.jagged)
        terms = [nested.sin().values().sum(), nested.cos().values().sum()]
        return backward(terms, [one(term) for term in terms]), weight.grad

    geometry, gradient = run(backward_with_taps)
    _, expected = run(torch.autograd.backward)
    assert geometry is None
    assert torch.equal(gradient, expected)


@pytest.mark.cuda
def test_nothing_waits_for_the_device():
    torch.manual_seed(0)
    net = Net(nn.Sequential(nn.Linear(5, 8), nn.Tanh()), 4).cuda()
    mode = torch.cuda.get_sync_debug_mode()
    for attempt in range(2):  # the first pass builds handles and workspaces
        terms = net(torch.randn(6, 5, device="cuda"))
        seeds = [one(term) for term in terms]
        expected = gram_at([net.features], terms, seeds)
        try:
            if attempt:
                torch.cuda.set_sync_debug_mode("error")
            geometry = backward_with_taps(terms, seeds)
            readings = (geometry.norms, geometry.cosines)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        assert all(reading.device.type == "cuda" for reading in readings)
        torch.testing.assert_close(geometry.gram.double(), expected, rtol=1e-5, atol=1e-9)
