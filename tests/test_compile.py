"""`run.compile`: the same run, traced once; torch's refusals are told before the first step."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import safeloop as sl

ADAM = {"type": "AdamW", "lr": 0.01}
QUIET: dict[str, Any] = {"sinks": []}

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""torch's compiler looks at `.grad` of every input"""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def metrics(self, batch: Any) -> dict[str, Tensor]:
        return {"accuracy": self.model(batch[0]).argmax(1) == batch[1]}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def make_data(n: int = 6) -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(n)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_run_is_the_plain_run(backend: str) -> None:
    nets = make_net(), make_net()
    results = []
    for net, compiled in zip(nets, ({"backend": backend}, False), strict=True):
        run = {"max_steps": 12, "compile": compiled}
        data = make_data()
        trainer = Classify(model=net, data=data, eval_data=data[:2], optimizers=ADAM, run=run, log=QUIET)
        results.append(trainer.fit())
        assert trainer.model is net
    for (name, a), (other, b) in zip(nets[0].state_dict().items(), nets[1].state_dict().items(), strict=True):
        assert name == other
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    assert results[0].metrics == results[1].metrics
    assert counters["stats"]["unique_graphs"] > 0


def test_it_is_off_by_default() -> None:
    Classify(model=make_net(), data=make_data(), optimizers=ADAM, run={"max_steps": 2}, log=QUIET).fit()
    assert counters["stats"]["unique_graphs"] == 0


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


class Gan(sl.Trainer):
    graphs: list[int]

    @sl.phase(trains="critic", repeat=2)
    def critic_phase(self, batch: Any) -> dict[str, Tensor]:
        fake = self.model.generator(torch.randn(8, 2))
        return {"critic": self.model.critic(fake).mean() - self.model.critic(batch[0]).mean()}

    @sl.phase(trains="generator")
    def generator_phase(self, batch: Any) -> dict[str, Tensor]:
        self.graphs.append(counters["stats"]["unique_graphs"])
        return {"generator": -self.model.critic(self.model.generator(torch.randn(8, 2))).mean()}


def test_phases_are_compiled_a_few_times_and_never_again() -> None:
    nets = Nets(), Nets()
    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": ["generator.*"]}}
    traced: list[int] = []
    for net, compiled in zip(nets, ({"backend": "aot_eager"}, False), strict=True):
        run = {"max_steps": 10, "compile": compiled}
        trainer = Gan(model=net, data=make_data(), optimizers=optimizers, run=run, log=QUIET)
        trainer.graphs = []
        trainer.fit()
        traced = traced or trainer.graphs
    assert 2 <= traced[2] <= 8
    assert traced[-1] == traced[2], "compiled again in a later step"
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_the_plan_says_what_is_compiled() -> None:
    run = {"max_steps": 1, "compile": {"backend": "eager"}}
    assert "compiled with eager, in place: the model" in str(
        Classify(model=make_net(), data=make_data(), optimizers=ADAM, run=run, log=QUIET).plan()
    )
    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": ["generator.*"]}}
    gan = Gan(model=Nets(), data=make_data(), optimizers=optimizers, run={**run, "compile": True}, log=QUIET)
    gan.graphs = []
    assert "compiled with inductor, in place: generator, critic" in str(gan.plan())


def test_what_the_backend_refuses_is_told_before_the_first_step() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no C++ compiler here")

    torch._dynamo.register_backend(broken, name="broken_for_the_test")
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    for backend, text in {"no_such_backend": "no_such_backend", "broken_for_the_test": "no C\\+\\+ compiler"}.items():
        run = {"max_steps": 1, "compile": {"backend": backend}}
        with pytest.raises(sl.FaultError, match=text) as error:
            Classify(model=net, data=make_data(), optimizers=ADAM, run=run, log=QUIET).fit()
        assert error.value.fault.code == "SL615"
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


# ------------------------------------------------------------ several terms: taps, exact norms, combined, simultaneous


class Heads(nn.Module):
    """Two heads on a trunk: `Whole` compiles them with it, `Trunk` has them outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8), nn.ReLU())
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 1)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.trunk(x)
        return self.a(shared), self.b(shared)


class Whole(Heads):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.both(x)


class Multi(sl.Trainer):
    def losses(self, batch: Any) -> dict[str, Tensor]:
        a, b = self.model.both(batch[0]) if type(self.model) is Heads else self.model(batch[0])
        return {"a": F.cross_entropy(a, batch[1]), "b": b.square().mean()}


TRAINS = {"a": {"trains": ["trunk.*", "a.*"]}, "b": {"trains": ["b.*"]}}
WAYS: dict[str, dict[str, Any]] = {
    "taps": {},
    "exact norms": {"log": {"exact_term_norms": {"every": 1}}},
    "combined at the parameters": {"combine": {"type": "mgda", "at": "parameters"}},
    "simultaneous": {"simultaneous": True, "losses": TRAINS},
}


def multi(net: nn.Module, folder: Path, backend: str | None, **sections: Any) -> tuple[list[Tensor], dict[str, float]]:
    """The weights after a run, and what it logged of its terms on the last step."""
    torch._dynamo.reset()
    log = {"every": 3, "sinks": ["jsonl"], **sections.pop("log", {})}
    run = {"max_steps": 3, "dir": str(folder), "compile": False if backend is None else {"backend": backend}}
    result = Multi(model=net, data=make_data(), optimizers=ADAM, run=run, log=log, **sections).fit()
    assert result.dir is not None
    record = json.loads((result.dir / "metrics.jsonl").read_text().splitlines()[-1])
    return list(net.parameters()), {tag: value for tag, value in record.items() if tag.startswith("loss_")}


def assert_close(ours: list[Tensor], plain: list[Tensor], bound: float = 1e-6) -> None:
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("cls", "backend", "way"),
    [*((Whole, backend, way) for backend in ("eager", "aot_eager") for way in WAYS), (Heads, "aot_eager", "taps")],
)
def test_several_terms_train_as_they_do_uncompiled(cls: type[Heads], backend: str, way: str, tmp_path: Path) -> None:
    if "combine" in WAYS[way]:
        pytest.importorskip("torchjd")
    plain, logged = multi(cls(), tmp_path, None, **copy.deepcopy(WAYS[way]))
    ours, seen = multi(cls(), tmp_path, backend, **copy.deepcopy(WAYS[way]))
    assert_close(ours, plain)
    exact = {tag for tag in logged if tag.startswith("loss_grad_exact/")}
    assert bool(exact) == (way in ("exact norms", "combined at the parameters"))
    kept = set(logged) if backend == "eager" or cls is Heads else exact
    assert {tag: seen[tag] for tag in kept} == pytest.approx({tag: logged[tag] for tag in kept}, rel=1e-4)


def test_taps_on_a_compiled_model_are_at_its_outputs_and_change_no_bit(tmp_path: Path) -> None:
    watched, seen = multi(Whole(), tmp_path, "aot_eager")
    plain, _ = multi(Whole(), tmp_path, "aot_eager", log={"grad_norms": ["total"]})
    assert all(map(torch.equal, watched, plain))
    assert set(seen) == {"loss_grad/a", "loss_grad/b"}, "the outputs are apart: there is no angle between them"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_terms_are_combined_at_features_that_leave_a_compiled_trunk(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("torchjd")
    combine = {"combine": {"type": "mgda", "at": "cut"}}
    plain, logged = multi(Heads(), tmp_path, None, **combine)
    ours, seen = multi(Heads(), tmp_path, backend, **combine)
    assert_close(ours, plain)
    assert seen == pytest.approx(logged, rel=1e-4)


def test_terms_that_meet_inside_a_compiled_model_cannot_be_combined_at_the_cut(tmp_path: Path) -> None:
    """They were combined at its outputs, where they have nothing in common: other weights, without a word."""
    pytest.importorskip("torchjd")
    combine = {"combine": {"type": "mgda", "at": "cut"}}
    with pytest.raises(sl.FaultError) as caught:
        multi(Whole(), tmp_path, "aot_eager", **combine)
    assert caught.value.fault.code == "SL620"
    assert "outside the compiled model" in caught.value.fault.what
    plain, _ = multi(Whole(), tmp_path, None, **combine)
    ours, _ = multi(Whole(), tmp_path, "eager", **combine)
    assert_close(ours, plain)


def test_torchs_settings_are_as_before(tmp_path: Path) -> None:
    from torch._functorch import config

    before = config.donated_buffer
    multi(Whole(), tmp_path, "aot_eager", **copy.deepcopy(WAYS["exact norms"]))
    assert config.donated_buffer == before


@pytest.mark.skipif(os.environ.get("SAFELOOP_SOAK") != "1", reason="minutes of C++ compilation: SAFELOOP_SOAK=1")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("way", WAYS)
def test_inductor_trains_several_terms_as_they_do_uncompiled(way: str, tmp_path: Path) -> None:
    if "combine" in WAYS[way]:
        pytest.importorskip("torchjd")
    plain, _ = multi(Whole(), tmp_path, None, **copy.deepcopy(WAYS[way]))
    ours, _ = multi(Whole(), tmp_path, "inductor", **copy.deepcopy(WAYS[way]))
    assert_close(ours, plain)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_row_6_freezing_by_phases_does_not_break_a_compiled_model(backend: str) -> None:
    """Toggling requires_grad broke torch.compile: here each phase has its own graphs, and the gradients of no other."""
    nets = Nets(), Nets()
    optimizers = {"critic": {**ADAM, "params": ["critic.*"]}, "generator": {**ADAM, "params": ["generator.*"]}}

    class Watch(Gan):
        def generator_phase(self, batch: Any) -> dict[str, Tensor]:
            if self.model.critic[0].weight.grad is not None:
                assert not any(parameter.requires_grad for parameter in self.model.critic.parameters())
                self.kept = [parameter.grad.clone() for parameter in self.model.critic.parameters()]
            return super().generator_phase(batch)

    for net, compiled in zip(nets, ({"backend": backend}, False), strict=True):
        run = {"max_steps": 3, "compile": compiled}
        trainer = Watch(model=net, data=make_data(), optimizers=optimizers, run=run, log=QUIET)
        trainer.graphs = []
        trainer.kept = []
        trainer.fit()
        assert all(torch.equal(p.grad, old) for p, old in zip(net.critic.parameters(), trainer.kept, strict=True))
        assert all(p.requires_grad for p in net.parameters())
    assert_close(list(nets[0].parameters()), list(nets[1].parameters()))
