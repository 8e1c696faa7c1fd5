"""What the benchmarks run: small networks with several heads, a GAN, and the way that they are timed."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualConv(nn.Module):
    """Two normalised convolutions around an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to the same."""
        return F.relu(x + self.body(x))


class Attention(nn.Module):
    """A causal pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, T, C]` to the same."""
        n, t, c = x.shape
        q, k, v = self.mix(self.before(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, c))
        return x + self.feed(self.between(x))


class Positions(nn.Module):
    """Adds a learned vector to each position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, T, C]` to the same."""
        return x + self.table


class MultiHead(nn.Module):
    """One trunk, a linear head and a cross entropy for each task."""

    def __init__(self, trunk: nn.Module, width: int, num_terms: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList([nn.Linear(width, 10) for _ in range(num_terms)])

    def forward(self, x: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """One 0-d loss for each head."""
        z = self.trunk(x)
        return [
            F.cross_entropy(head(z).flatten(0, -2), target.flatten())
            for head, target in zip(self.heads, targets, strict=True)
        ]


class Work(NamedTuple):
    """A model of several terms and its batch."""

    model: MultiHead
    x: Tensor
    targets: list[Tensor]

    def terms(self) -> list[Tensor]:
        """A fresh forward, with no gradient left from before."""
        self.model.zero_grad(set_to_none=True)
        return self.model(self.x, self.targets)


def mlp(num_terms: int) -> Work:
    """Six layers of 512, batch 128: 1.6 million parameters."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.GELU())]
    return Work(
        MultiHead(nn.Sequential(*layers), 512, num_terms),
        torch.randn(128, 512),
        [torch.randint(10, (128,)) for _ in range(num_terms)],
    )


def convnet(num_terms: int) -> Work:
    """Four residual blocks of 32 channels on 24 x 24, batch 16."""
    blocks = [ResidualConv(32) for _ in range(4)]
    trunk = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Work(
        MultiHead(trunk, 32, num_terms),
        torch.randn(16, 3, 24, 24),
        [torch.randint(10, (16,)) for _ in range(num_terms)],
    )


def transformer(num_terms: int) -> Work:
    """Four blocks of width 128 on 64 tokens, batch 16: 0.8 million parameters."""
    blocks = [Attention(128, 4) for _ in range(4)]
    trunk = nn.Sequential(nn.Embedding(256, 128), Positions(64, 128), *blocks, nn.LayerNorm(128))
    return Work(
        MultiHead(trunk, 128, num_terms),
        torch.randint(256, (16, 64)),
        [torch.randint(10, (16, 64)) for _ in range(num_terms)],
    )


MODELS: dict[str, Callable[[int], Work]] = {"mlp": mlp, "convnet": convnet, "transformer": transformer}


class Gan(NamedTuple):
    """A generator, a critic of the same size, and noise."""

    generator: nn.Module
    critic: nn.Module
    noise: Tensor

    def loss(self) -> Tensor:
        """The generator's loss: the forward runs through both."""
        return F.softplus(-self.critic(self.generator(self.noise))).mean()


def dense_gan() -> Gan:
    """Five layers of 512 on each side, batch 128."""

    def side(first: int, last: int, activation: type[nn.Module]) -> nn.Sequential:
        inner = [layer for _ in range(3) for layer in (nn.Linear(512, 512), activation())]
        return nn.Sequential(nn.Linear(first, 512), activation(), *inner, nn.Linear(512, last))

    return Gan(side(64, 784, nn.ReLU), side(784, 1, nn.GELU), torch.randn(128, 64))


def conv_gan() -> Gan:
    """DCGAN at 32 x 32 with 32 channels, batch 16."""
    generator = nn.Sequential(
        nn.ConvTranspose2d(64, 64, 4),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 64, 4, 2, 1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Tanh(),
    )
    critic = nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 64, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 4),
    )
    return Gan(generator, critic, torch.randn(16, 64, 1, 1))


GANS: dict[str, Callable[[], Gan]] = {"dense": dense_gan, "convolutional": conv_gan}


class Contender(NamedTuple):
    """Something to time: `prepare` is not timed, `run` gets what it returned."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contender in each round; a round runs all of them once, in random order.

    CPU time of the process, as others may use the machine.
    """
    shuffled, order = random.Random(0), list(contenders)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        shuffled.shuffle(order)
        for name in order:
            taken = _time(contenders[name])
            if number > 0:  # the first round warms up
                times[name].append(taken)
    return times


def _time(contender: Contender) -> float:
    prepared = contender.prepare()
    gc.disable()
    try:
        start = time.process_time()
        contender.run(prepared)
        return time.process_time() - start
    finally:
        gc.enable()


class Ratio(NamedTuple):
    """The median of per-round ratios, with its bootstrap 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:5.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(times: dict[str, list[float]], of: str, to: str) -> Ratio:
    """How many times the CPU time of `to` the contender `of` takes."""
    ratios = [a / b for a, b in zip(times[of], times[to], strict=True)]
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(1000))
    return Ratio(statistics.median(ratios), medians[25], medians[974])


def verdict(measured: Ratio, bar: float) -> str:
    """`met` or `missed` where the whole interval lies on one side of the bar, else `not resolved`."""
    if measured.high <= bar:
        return "met"
    return "missed" if measured.low > bar else "not resolved"


def peak_bytes(prepare: Callable[[], Any], run: Callable[[Any], object]) -> int:
    """The most memory that `prepare` and `run` held at once while `run` ran, by the allocator's own events.

    What was allocated before does not count, what `prepare` leaves does. `prepare` runs once more before, as what it
    clears, such as old gradients, would be missing from the count.
    """
    prepare()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        prepared = prepare()
        with torch.profiler.record_function("benchmark starts"):
            pass
        run(prepared)
    kept = {"[memory]", "benchmark starts"}
    events = [event for event in profile.profiler.kineto_results.events() if event.name() in kept]
    live = peak = 0
    has_started = False
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
        else:
            has_started = True
        if has_started:
            peak = max(peak, live)
    return peak


def start() -> None:
    """One thread, one seed, and a line that says on what."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, one thread, CPU time; ratio: median of rounds [95 % interval]\n", flush=True)
