"""`run.compile`: the same run, traced once; torch's refusals are told before the first step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
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
