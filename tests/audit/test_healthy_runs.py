"""Random healthy training runs, in a Trainer and in a loop of one's own, looked at on every step: no fault at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import safeloop as sl

SOAK = bool(os.environ.get("SAFELOOP_SOAK"))
EXAMPLES, STEPS = (220, 50) if SOAK else (6, 24)
"""by `make soak` 11,000 steps in a Trainer and as many around a loop"""
CLASSES = 3


@dataclass(frozen=True)
class Case:
    """One healthy program."""

    body: str
    activation: str
    norm: bool
    dropout: float
    optimizer: str
    precision: str
    micro_batches: int
    max_norm: float | None
    is_two_terms: bool
    seed: int


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU, "leaky": nn.LeakyReLU}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"type": "SGD", "lr": 0.01, "momentum": 0.9},
    "Adam": {"type": "Adam", "lr": 1e-3},
    "AdamW": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.01},
    "RMSprop": {"type": "RMSprop", "lr": 1e-3},
    "Adagrad": {"type": "Adagrad", "lr": 1e-2},
}


class Net(nn.Module):
    """A body of one of four kinds and two heads over its features."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        act = ACTIVATIONS[case.activation]
        self.kind = case.body
        self.drop = nn.Dropout(case.dropout)
        if case.body == "mlp":
            norm = [nn.LayerNorm(24)] if case.norm else []
            self.body: nn.Module = nn.Sequential(nn.Linear(16, 24), *norm, act(), nn.Linear(24, 24), act())
        elif case.body == "conv":
            norm = [nn.BatchNorm2d(6)] if case.norm else []
            pool = nn.AdaptiveAvgPool2d(2)
            self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), *norm, act(), pool, nn.Flatten())
        elif case.body == "gru":
            self.body = nn.GRU(4, 24, batch_first=True)
        else:
            self.embed = nn.Linear(4, 24)
            layer = nn.TransformerEncoderLayer(24, 2, 32, dropout=case.dropout, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.rebuild = nn.Linear(24, CLASSES), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 16]` to features `[N, 24]`."""
        if self.kind == "mlp":
            out = self.body(x)
        elif self.kind == "conv":
            out = self.body(x.view(-1, 1, 4, 4))
        elif self.kind == "gru":
            out = self.body(x.view(-1, 4, 4))[0][:, -1]
        else:
            out = self.body(self.embed(x.view(-1, 4, 4))).mean(1)
        features: Tensor = self.drop(out)
        return features


def terms(net: Net, batch: tuple[Tensor, Tensor], case: Case) -> dict[str, Tensor]:
    """One or two losses over one forward."""
    x, y = batch
    features = net(x)
    found = {"fit": F.cross_entropy(net.head(features), y)}
    rebuilt = F.mse_loss(net.rebuild(features), x)
    return {**found, "rebuild": 0.5 * rebuilt} if case.is_two_terms else {"fit": found["fit"] + 0.5 * rebuilt}


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(16, CLASSES, generator=generator)
    xs = [torch.randn(12, 16, generator=generator) for _ in range(8)]
    return [(x, (x @ weights).argmax(1)) for x in xs]


CASES = st.builds(
    Case,
    body=st.sampled_from(["mlp", "conv", "gru", "transformer"]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    norm=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.3]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    precision=st.sampled_from(["fp32", "bf16"]),
    micro_batches=st.sampled_from([1, 1, 2, 3]),
    max_norm=st.sampled_from([None, 1.0]),
    is_two_terms=st.booleans(),
    seed=st.integers(0, 10_000),
)
healthy = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not SOAK,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Run(sl.Trainer):
    case: Case

    def losses(self, batch: Any) -> dict[str, Tensor]:
        return terms(self.model, batch, self.case)

    def metrics(self, batch: Any) -> dict[str, Tensor]:
        return {"accuracy": self.model.head(self.model(batch[0])).argmax(1) == batch[1]}


@healthy
@given(case=CASES)
def test_a_healthy_run_of_a_trainer_has_no_fault(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(case.seed)
    kind = type("Run", (Run,), {"case": case})
    clip = {} if case.max_norm is None else {"max_norm": case.max_norm}
    result = kind(
        model=Net(case),
        data=batches(case.seed),
        eval_data=batches(case.seed + 1)[:2],
        optimizers={**OPTIMIZERS[case.optimizer], **clip},
        run={"max_steps": STEPS, "precision": case.precision, "dir": str(tmp_path), "device": "cpu"},
        accumulate={"micro_batches": case.micro_batches},
        evaluate={"every": 10},
        audit={"level": "full"},
        log={"sinks": []},
    ).fit()
    assert result.faults == (), "\n".join(map(str, result.faults))


@healthy
@given(case=CASES)
def test_a_healthy_loop_of_ones_own_has_no_fault(case: Case) -> None:
    torch.manual_seed(case.seed)
    net = Net(case)
    arguments = {key: value for key, value in OPTIMIZERS[case.optimizer].items() if key != "type"}
    optimizer = getattr(torch.optim, case.optimizer)(net.parameters(), **arguments)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    data, held_out = batches(case.seed), batches(case.seed + 1)[:2]
    with sl.audit(model=net, optimizers=optimizer, level="full", on_fault="collect") as audit:
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(case.micro_batches):
                with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
                    losses = terms(net, data[(step + part) % len(data)], case)
                (sum(losses.values()) / case.micro_batches).backward()
            if case.max_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), case.max_norm)
            optimizer.step()
            schedule.step()
            if step % 10 == 9:
                net.eval()
                with torch.no_grad():
                    for x, y in held_out:
                        F.cross_entropy(net.head(net(x)), y).item()
                net.train()
            audit.step()
    assert audit.faults == (), "\n".join(map(str, audit.faults))
