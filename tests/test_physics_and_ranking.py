"""The examples with a published bar: Burgers' equation in its short setting, its exact solution, and the ranking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import safeloop as sl
from safeloop.config import load
from safeloop.trainer import trainer_class

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _at_the_top(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(config: str, *overrides: str) -> sl.RunResult:
    loaded = load(Path("configs", config), overrides=["run.device=cpu", "log.sinks=[]", *overrides])
    return trainer_class(loaded)(loaded).fit()


def test_the_short_setting_of_burgers_reaches_five_percent():
    result = train("burgers_short.yaml")
    assert result.metrics["error/relative_l2"] <= 5e-2
    assert (result.outcome, result.faults) == ("finished", ())


def test_the_exact_solution_is_right_at_the_start_at_the_walls_and_in_between():
    from examples.burgers import VISCOSITY, exact

    x = np.linspace(-1, 1, 41)
    assert np.abs(exact(x, np.zeros_like(x)) + np.sin(np.pi * x)).max() <= 1e-12
    t = np.linspace(0, 1, 11)
    assert np.abs(exact(np.ones_like(t), t)).max() <= 1e-12
    assert np.abs(exact(-x, np.full_like(x, 0.7)) + exact(x, np.full_like(x, 0.7))).max() <= 1e-12
    away, now = np.linspace(-0.9, -0.3, 601), np.full(601, 0.3)
    h, dt = away[1] - away[0], 1e-4
    u = exact(away, now)
    u_t = (exact(away, now + dt) - exact(away, now - dt)) / (2 * dt)
    u_x, u_xx = (u[2:] - u[:-2]) / (2 * h), (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2
    residual = u_t[1:-1] + u[1:-1] * u_x - VISCOSITY * u_xx
    assert np.abs(residual).max() <= 1e-4 * np.abs(u[1:-1] * u_x).max()
    # Basdevant et al. (1986), table 2: the steepest slope, 152.00516, is at t = 0.5105 = 1.6037 / pi
    near, then = 1e-5, np.full(2, 1.6037 / np.pi)
    low, high = exact(np.array([-near, near]), then, nodes=200)
    assert (low - high) / (2 * near) == pytest.approx(152.00516, rel=1e-3)


def test_the_weights_of_the_points_make_the_mean_over_the_domain():
    from examples.burgers import Points

    (batch,) = list(Points(inside=4096))
    assert float(batch["weight"].mean()) == pytest.approx(1.0, rel=1e-3)
    assert float((batch["weight"] * batch["x"].square()).mean()) == pytest.approx(1 / 3, rel=1e-3)
    assert float((batch["x"].abs() < 0.05).double().mean()) > 0.15  # evenly spread it would be 0.05


def test_the_ranking_finds_the_nearest_of_its_like():
    result = train("ranking.yaml", "run.max_steps=150")
    assert result.metrics["recall_at_1"] >= 0.95
    assert result.faults == ()


def test_the_margin_loss_is_the_loop_over_triplets_and_never_loses_its_graph():
    from examples.ranking import margin_ranking

    torch.manual_seed(0)
    raw = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    embedded = torch.nn.functional.normalize(raw, dim=1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    behind = [
        torch.clamp(embedded[a] @ embedded[n] - embedded[a] @ embedded[p] + 0.2, min=0)
        for a in range(7)
        for p in range(7)
        for n in range(7)
        if a != p and labels[a] == labels[p] and labels[a] != labels[n]
    ]
    active = [one for one in behind if one > 0]
    found = margin_ranking(embedded, labels)
    torch.testing.assert_close(found, torch.stack(active).mean())
    (ours,) = torch.autograd.grad(found, raw, retain_graph=True)
    (theirs,) = torch.autograd.grad(torch.stack(active).mean(), raw)
    torch.testing.assert_close(ours, theirs)
    for alike in (torch.zeros(7, dtype=torch.long), torch.arange(7)):  # no triplet at all
        nothing = margin_ranking(embedded, alike)
        assert nothing.requires_grad
        assert float(nothing.detach()) == 0.0


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("total = 0\n    for value in behind: total += max(0, value.item())\n    return total", "SL402"),
        ("return max((min(torch.tensor(0.0), v.abs()) for v in behind), key=lambda one: one.item())", "SL404"),
        ("total = torch.zeros((), requires_grad=True)\n    for v in behind: total += v\n    return total", "SL301"),
    ],
)
def test_the_wrong_ways_of_row_6_are_named(body: str, code: str, tmp_path: Path):
    from examples.ranking import Ranking

    names: dict[str, object] = {"torch": torch}
    exec(f"def total_of(behind):\n    {body}\n", names)

    class Wrong(Ranking):
        def loss(self, batch):
            embedded = self.model(batch[0])
            cosines = embedded @ embedded.T
            return names["total_of"]([cosines[0, i] - cosines[0, 1] + 0.2 for i in range(2, 5)])

    loaded = load(Path("configs/ranking.yaml"), overrides=["run.max_steps=2", "run.device=cpu", "log.sinks=[]"])
    with pytest.raises(sl.FaultError, match=code):
        Wrong(loaded).fit()


def test_maml_adapts_better_than_where_it_started():
    from examples.maml import Maml, Sinusoids

    result = train("maml.yaml", "run.max_steps=30", "data.train.args.tasks=800", "data.eval.args.tasks=50")
    assert result.faults == ()
    assert 0 < result.metrics["after"] < result.metrics["before"]
    assert len(Sinusoids(4)) == 4
    assert Maml.inner_steps == 1
