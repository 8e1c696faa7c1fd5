"""The guard must not cry wolf: harmless writes, layers that write by themselves, and long healthy training."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from safeloop.autograd.parameter_ledger import ParameterLedger
from safeloop.autograd.recomputed import recomputed_leaves
from safeloop.autograd.saved import SavedTensorGuard

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # evaluation, re-entrant
SOAK = int(os.environ.get("SAFELOOP_SOAK_STEPS", "0"))
"""at least so many healthy random steps, besides the fixed slice"""


def findings(forward, write=lambda made: None):
    guard = SavedTensorGuard()
    with guard:
        made = forward()
    write(made)
    made[0].backward()
    return guard.verify()


def test_a_factor_is_not_saved_so_data_may_change():
    """Lesson 16: 2 * x saves nothing of x."""
    x = torch.ones(1, requires_grad=True)

    def write(made):
        x.data *= 100

    assert findings(lambda: (2 * x,), write) == ()
    assert x.grad.item() == 2


def test_a_sum_saves_nothing_of_its_terms():
    """Lesson 19, first half."""
    a = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)

    def forward():
        b = a + 1
        return b.sum(), b

    assert findings(forward, lambda made: made[1].detach().zero_()) == ()
    assert torch.equal(a.grad, torch.ones(3))


def test_the_result_of_a_sum_is_not_saved():
    """Lesson 19, second half."""
    a = torch.tensor(1.0, requires_grad=True)

    def forward():
        b = a.sigmoid().sum()
        return b, b

    assert findings(forward, lambda made: made[1].data.zero_()) == ()
    assert a.grad.item() == pytest.approx(0.1966, abs=1e-4)


def test_a_weight_scaled_under_no_grad_before_the_forward():
    """Lesson 21: both gradients are exp(0.5)."""
    w = torch.ones(2, requires_grad=True)

    def forward():
        with torch.no_grad():
            w.mul_(0.5)
        return (w.exp().sum(),)

    assert findings(forward) == ()
    torch.testing.assert_close(w.grad, torch.full((2,), 0.5).exp())


@pytest.mark.parametrize("by_data", [False, True])
def test_lessons_17_and_18_are_seen_beside_these(by_data):
    a = torch.tensor([1.0], requires_grad=True)
    guard = SavedTensorGuard()
    with guard:
        b = a.sigmoid()
        loss = b.sum()
    (b.data if by_data else b.detach()).zero_()
    if by_data:
        loss.backward()
        assert a.grad.item() == 0
    else:
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()
    assert [change.kind for change in guard.findings] == ["values" if by_data else "version"]


def test_a_bias_is_not_saved():
    layer = nn.Linear(3, 3)

    def write(made):
        layer.bias.data.add_(1)
        with torch.no_grad():
            layer.bias.add_(1)

    assert findings(lambda: (layer(torch.randn(2, 3)).sum(),), write) == ()


def test_writes_before_the_forward_and_after_the_backward_pass():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    guard = SavedTensorGuard()
    for _ in range(3):
        x.data.mul_(2)
        layer.weight.data.clamp_(-0.5, 0.5)
        with guard:
            loss = layer(x).square().mean()
        loss.backward()
        x.numpy()[:] = 1
        layer.weight.data.mul_(0.5)
    assert guard.verify() == ()


def test_a_write_that_is_taken_back_before_the_backward_pass():
    x = torch.randn(3, requires_grad=True)
    old = x.detach().clone()

    def write(made):
        x.data.zero_()
        x.data.copy_(old)

    assert findings(lambda: (x.exp().sum() + (x * x).sum(),), write) == ()


def test_a_graph_that_is_never_differentiated_and_fused_steps_on_a_guard_that_stays_on():
    """Each saved tensor is compared with itself as it was saved, not with an older save of the same memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    kept = []
    with SavedTensorGuard() as guard:
        for _ in range(5):
            kept.append(model(torch.randn(2, 4)))
            model[0].weight.data.clamp_(-0.3, 0.3)
            model(torch.randn(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert guard.findings == []


class Attention(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.mix(self.norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, c))


class Gpt(nn.Module):
    def __init__(self, width=8, use_reentrant=None):
        super().__init__()
        self.embed = nn.Embedding(11, width, padding_idx=0)
        self.place = nn.Parameter(torch.randn(6, width) * 0.02)
        self.blocks = nn.ModuleList([Attention(width) for _ in range(2)])
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, width)
        )
        self.use_reentrant = use_reentrant
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(self.feed(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)
        self.rnn.flatten_parameters()
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def images(*layers):
    return nn.Sequential(*layers), lambda: torch.randn(4, 3, 6, 6)


MODELS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 2)),
        lambda: torch.randn(4, 5),
    ),
    "batchnorm": lambda: images(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ),
    "batchnorm without momentum": lambda: images(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)),
    "instance and group norm": lambda: images(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.GroupNorm(2, 4)
    ),
    "activations": lambda: (
        nn.Sequential(
            nn.Linear(5, 5),
            nn.RReLU(),
            nn.PReLU(),
            nn.SELU(inplace=True),
            nn.Hardswish(),
            nn.SiLU(inplace=True),
            nn.Softplus(),
        ),
        lambda: torch.randn(4, 5),
    ),
    "pooling": lambda: images(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 4, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.FractionalMaxPool2d(2, output_size=1),
    ),
    "weight norm": lambda: (
        nn.Sequential(
            parametrizations.weight_norm(nn.Linear(5, 5)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(5, 5))
        ),
        lambda: torch.randn(4, 5),
    ),
    "spectral norm": lambda: images(
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.LeakyReLU(0.2, inplace=True),
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    ),
    "lstm": lambda: (Recurrent(nn.LSTM), lambda: torch.randn(2, 5, 3)),
    "gru": lambda: (Recurrent(nn.GRU), lambda: torch.randn(2, 5, 3)),
    "transformer layer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.randn(2, 5, 8)),
    "embedding bag": lambda: (
        nn.Sequential(nn.EmbeddingBag(9, 4, max_norm=1.0), nn.Linear(4, 2)),
        lambda: torch.randint(0, 9, (3, 4)),
    ),
    "gpt": lambda: (Gpt(), lambda: torch.randint(0, 11, (3, 6))),
    "gpt, checkpointed": lambda: (Gpt(use_reentrant=False), lambda: torch.randint(0, 11, (3, 6))),
    "gpt, checkpointed, re-entrant": lambda: (Gpt(use_reentrant=True), lambda: torch.randint(0, 11, (3, 6))),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
}


def train(model, batch, optimizer, num_steps, *, penalty=False, autocast=False, accumulate=1):
    """A healthy loop, with moving averages, weight clipping and evaluation at the right places; its findings."""
    average = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    guard, ledger = SavedTensorGuard(parameters), ParameterLedger(parameters)
    for _ in range(num_steps):
        for _ in range(accumulate):
            guard.start()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(batch()).float().square().mean()
            if penalty:
                grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
                loss = loss + 1e-3 * sum(g.square().sum() for g in grads if g is not None)
            ledger.close_forward()
            guard.stop()
            read_again = recomputed_leaves([loss])
            assert ledger.changed(only=read_again) == ()
            loss.backward()
            assert ledger.changed(only=read_again) == ()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
                theirs.data.clamp_(-2, 2)
        with torch.no_grad():
            model.eval()
            model(batch())
            model.train()
    return guard.verify()


@pytest.mark.parametrize("name", MODELS)
def test_healthy_training_is_quiet(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    assert train(model, batch, OPTIMIZERS["fused Adam"](model.parameters()), 20) == ()


def test_a_gpt_trains_for_fifty_steps_in_silence():
    torch.manual_seed(0)
    model, batch = MODELS["gpt"]()
    assert train(model, batch, OPTIMIZERS["AdamW"](model.parameters()), 50) == ()


def test_a_penalty_through_its_own_gradient_is_quiet():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), lambda: torch.randn(4, 5)
    assert train(model, batch, OPTIMIZERS["SGD"](model.parameters()), 20, penalty=True) == ()


@settings(deadline=None, max_examples=max(15, SOAK // 8))
@given(
    name=st.sampled_from(sorted(MODELS)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    autocast=st.booleans(),
    accumulate=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_random_healthy_training_is_quiet(name, optimizer, autocast, accumulate, seed):
    torch.manual_seed(seed)
    model, batch = MODELS[name]()
    made = OPTIMIZERS[optimizer](model.parameters())
    is_plain = name not in ("spectral norm", "weight norm", "lstm", "gru", "pooling")
    assert train(model, batch, made, 8, autocast=autocast and is_plain, accumulate=accumulate) == ()


def test_a_conjugate_that_shares_memory_with_what_was_saved_too():
    x = torch.randn(3, dtype=torch.complex64, requires_grad=True)

    def forward():
        y = x - 1
        return ((y * y.conj()).real.sum(),)

    assert findings(forward) == ()


def test_running_statistics_matter_in_eval_mode_and_only_there():
    """The derivative of a normalisation by running statistics reads them; that by the batch's own does not."""
    for is_training in (True, False):
        norm = nn.BatchNorm1d(3).train(is_training)
        x = torch.randn(4, 3, requires_grad=True)

        def forward(norm=norm, x=x):
            return (norm(x).square().sum(),)

        found = findings(forward, lambda made, norm=norm: norm.running_var.data.mul_(2))
        assert [change.argument for change in found] == ([] if is_training else ["running_var"])
