"""Random graphs of everything that makes a cut or a retain flag hard to get right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint


class Twice(torch.autograd.Function):
    """Saves nothing, and takes arguments that are no tensors."""

    @staticmethod
    def forward(ctx, scale, x, unused):
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient * 2, None


class Cube(torch.autograd.Function):
    """Saves its input by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


class Graph:
    """Leaves and terms made by a program: the same program makes the same graph, bit by bit."""

    def __init__(self, steps, heads, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) / 2).to(dtype).requires_grad_()

        self.weights = [leaf(4, 4) for _ in range(3)]
        self.bias, self.table = leaf(4), leaf(5, 4)
        self.leaves = [*self.weights, self.bias, self.table]
        self.pool = [F.linear(torch.ones(3, 4, dtype=dtype), self.weights[0])]
        self.terms, self.seeds = [], []
        for op, a, b in steps:
            self.pool += OPS[op % len(OPS)](self, self.pool[a % len(self.pool)], self.pool[b % len(self.pool)], a + b)
        for head, a, b, seed in heads:
            term = HEADS[head % len(HEADS)](self, self.pool[a % len(self.pool)], self.pool[b % len(self.pool)])
            self.terms.append(term)
            self.seeds.append(torch.full_like(term, seed))

    def weight(self, k):
        return self.weights[k % len(self.weights)]

    def grads(self):
        return [leaf.grad for leaf in self.leaves]


def written_view(graph, x, y, k):
    base = x * 1
    base[:2].mul_(y[:2])
    return [base]


def view_older_than_its_base(graph, x, y, k):
    base = x * 1
    view = base[:]
    base.mul_(2)
    return [view.tanh(), base]


OPS = [
    lambda g, x, y, k: [F.linear(x, g.weight(k), g.bias)],
    lambda g, x, y, k: [x.tanh()],
    lambda g, x, y, k: [x * y],
    lambda g, x, y, k: [x + y],
    lambda g, x, y, k: [x + 1],
    lambda g, x, y, k: [torch.cat([part, part], 1) for part in x.chunk(2, 1)],
    lambda g, x, y, k: [F.embedding(torch.tensor([0, k % 5, 2]), g.table)],
    lambda g, x, y, k: [checkpoint(lambda t: F.linear(t, g.weight(k)).sin() * t, x, use_reentrant=False)],
    lambda g, x, y, k: [F.batch_norm(x, None, None, training=True)],
    lambda g, x, y, k: [F.linear(x.detach(), g.weight(k).detach(), g.bias)],
    lambda g, x, y, k: [Twice.apply(2, x, torch.ones(1))],
    lambda g, x, y, k: [Cube.apply(x)],
    lambda g, x, y, k: [x[[0, 2, k % 3]]],
    lambda g, x, y, k: [x.max(1, keepdim=True).values.expand(3, 4)],
    lambda g, x, y, k: [g.weight(k)[:3]],
    written_view,
    view_older_than_its_base,
]
HEADS = [
    lambda g, x, y: x.square().mean(),
    lambda g, x, y: x.sum(),
    lambda g, x, y: (x.tanh() * y.sin()).sum(),
    lambda g, x, y: F.linear(x, g.weights[1]).exp().mean(),
    lambda g, x, y: x,
    lambda g, x, y: (g.terms[-1] if g.terms else x).square().sum(),
    lambda g, x, y: g.bias.square().sum(),
]

small = st.integers(0, 40)
programs = st.tuples(
    st.lists(st.tuples(small, small, small), max_size=9),
    st.lists(st.tuples(small, small, small, st.floats(-2, 2, width=16)), min_size=1, max_size=5),
)


@pytest.fixture(scope="session")
def draw_graph():
    """Draws a program, and gives what makes its graph, anew and the same each time, in a dtype."""

    def draw(data):
        steps, heads = data.draw(programs)
        return lambda dtype=torch.float64: Graph(steps, heads, dtype)

    return draw
