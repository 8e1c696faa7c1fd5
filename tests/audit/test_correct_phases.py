"""Correct loops whose owners, freezes and paths change with time, and the bugs that look like them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import safeloop as sl

Loop = Callable[[], "sl.Audit"]
SOUND: list[Loop] = []
BUGS: list[tuple[str, Loop]] = []


def sound(loop: Loop) -> Loop:
    SOUND.append(loop)
    return loop


def bug(code: str) -> Callable[[Loop], Loop]:
    def add(loop: Loop) -> Loop:
        BUGS.append((code, loop))
        return loop

    return add


def watch(model: Any, optimizers: Any = None) -> sl.Audit:
    return sl.audit(model=model, optimizers=optimizers, on_fault="collect")


class Net(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 4)
        self.is_frozen = True

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


def loss_of(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.randint(0, 3, (8,)))


def train(model: Any, optimizers: Any, loss: Callable[[int], Tensor], steps: int = 40, step: Any = None) -> sl.Audit:
    owners = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    with watch(model, optimizers) as audit:
        for i in range(steps):
            for owner in owners:
                owner.zero_grad()
            loss(i).backward()
            for owner in owners if step is None else step(i):
                owner.step()
            audit.step()
    return audit


def _sgd(*modules: Any) -> torch.optim.SGD:
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.05)


@sound
def target_that_nobody_froze() -> sl.Audit:
    net = Net()
    target = copy.deepcopy(net)

    def loss(i: int) -> Tensor:
        x = torch.randn(8, 4)
        goal = target.aux(target.features(x)).detach()
        return F.mse_loss(net.aux(net.features(x)), goal) + loss_of(net.head(net.features(x)))

    return train({"net": net, "target": target}, _sgd(net), loss)


@sound
def loss_through_a_network_in_eval_mode() -> sl.Audit:
    net, judge = Net(), nn.Sequential(nn.Linear(4, 6), nn.Tanh()).eval()
    x = torch.randn(8, 4)

    def run(i: int) -> Tensor:
        return F.mse_loss(judge(net.aux(net.features(x))), judge(x)) + loss_of(net.head(net.features(x)))

    return train({"net": net, "judge": judge}, _sgd(net), run)


@bug("SL201")
def head_that_was_forgotten() -> sl.Audit:
    net = Net()

    def run(i: int) -> Tensor:
        return loss_of(net.head(net.features(torch.randn(8, 4)))) + net.aux.weight.square().sum()

    optimizer = torch.optim.SGD([*net.body.parameters(), *net.head.parameters(), net.aux.bias], lr=0.05)
    net.aux.bias.requires_grad_(False)
    return train(net, optimizer, run)


@sound
def temperature_beside_the_model() -> sl.Audit:
    net, log_t = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))
    optimizers = [_sgd(net), torch.optim.SGD([log_t], lr=0.01)]
    return train(net, optimizers, lambda i: loss_of(net(torch.randn(8, 4)) * log_t.exp()))


@sound
def adam_then_lbfgs() -> sl.Audit:
    net = nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    adam, lbfgs = torch.optim.Adam(net.parameters()), torch.optim.LBFGS(net.parameters(), max_iter=3)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with watch(net, {"adam": adam, "lbfgs": lbfgs}) as audit:
        for _ in range(8):
            adam.zero_grad()
            F.cross_entropy(net(x), y).backward()
            adam.step()
            audit.step()
        for _ in range(4):
            lbfgs.step(closure)
            audit.step()
    return audit


@sound
def encoder_with_an_optimizer_for_each_loss() -> sl.Audit:
    net = Net()
    a, b = _sgd(net.body, net.head), _sgd(net.body, net.aux)
    with watch(net, {"a": a, "b": b}) as audit:
        for _ in range(25):
            x = torch.randn(8, 4)
            a.zero_grad()
            loss_of(net.head(net.features(x))).backward()
            a.step()
            b.zero_grad()
            F.mse_loss(net.aux(net.features(x)), x).backward()
            b.step()
            audit.step()
    return audit


@bug("SL202")
def two_optimizers_on_one_gradient() -> sl.Audit:
    net = Net()
    a, b = _sgd(net.body, net.head), _sgd(net.body, net.aux)

    def run(i: int) -> Tensor:
        return loss_of(net.head(net.features(torch.randn(8, 4)))) + net.aux(torch.randn(8, 6)).square().mean()

    return train(net, [a, b], run, steps=6)


@sound
def only_the_input_is_trained() -> sl.Audit:
    net, image = nn.Linear(4, 3).requires_grad_(False), torch.randn(8, 4, requires_grad=True)
    with watch(net) as audit:
        for _ in range(8):
            loss_of(net(image)).backward()
            with torch.no_grad():
                assert image.grad is not None
                image -= 0.1 * image.grad
            image.grad = None
            audit.step()
    return audit


@sound
def optimizer_whose_part_thaws_later() -> sl.Audit:
    net = Net()
    net.aux.requires_grad_(False)
    net.body.requires_grad_(False)

    def loss(i: int) -> Tensor:
        if i == 12:
            net.body.requires_grad_(True)
        return loss_of(net.head(net.features(torch.randn(8, 4))))

    return train(net, [_sgd(net.body), _sgd(net.head)], loss)


@bug("SL205")
def optimizer_over_a_frozen_part() -> sl.Audit:
    net = Net()
    net.aux.requires_grad_(False)
    net.body.requires_grad_(False)

    def run(i: int) -> Tensor:
        return loss_of(net.head(net.features(torch.randn(8, 4))))

    return train(net, [_sgd(net.body), _sgd(net.head)], run)


@sound
def pruned_on_the_way() -> sl.Audit:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def loss(i: int) -> Tensor:
        if i == 22:
            prune.l1_unstructured(net[0], "weight", amount=0.5)
        return loss_of(net(torch.randn(8, 4)))

    return train(net, _sgd(net), loss)


@sound
def frozen_for_good_after_a_warm_up() -> sl.Audit:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def loss(i: int) -> Tensor:
        if i == 15:
            net[0].requires_grad_(False)
        return loss_of(net(torch.randn(8, 4)))

    return train(net, _sgd(net), loss)


@sound
def head_that_is_used_late() -> sl.Audit:
    net = Net()

    def loss(i: int) -> Tensor:
        h = net.features(torch.randn(8, 4))
        return loss_of(net.head(h)) + (net.aux(h).square().mean() if i > 24 else 0.0)

    return train(net, _sgd(net), loss)


@sound
def weight_that_is_zero_at_first() -> sl.Audit:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)

    def loss(i: int) -> Tensor:
        h = net.features(torch.randn(8, 4))
        return loss_of(net.head(h)) + max(0.0, (i - 25) / 10) * net.aux(h).square().mean()

    return train(net, optimizer, loss)


@bug("SL503")
def weight_that_stays_zero() -> sl.Audit:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)

    def loss(i: int) -> Tensor:
        h = net.features(torch.randn(8, 4))
        return loss_of(net.head(h)) + (1 // 4) * net.aux(h).square().mean()

    return train(net, optimizer, loss)


@bug("SL502")
def head_that_is_never_used_in_a_long_run() -> sl.Audit:
    net = Net()
    return train(net, _sgd(net), lambda i: loss_of(net.head(net.features(torch.randn(8, 4)))), steps=205)


@sound
def hinge_whose_last_bias_cancels_behind_a_weight_of_zero() -> sl.Audit:
    disc = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    disc[2].weight.data.mul_(0.1)

    def loss(i: int) -> Tensor:
        factor = 1.0 if i >= 25 else 0.0
        real, fake = disc(torch.randn(8, 4)), disc(torch.randn(8, 4) + 1)
        return factor * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    return train(disc, torch.optim.Adam(disc.parameters(), lr=1e-3), loss)


@sound
def kernel_of_all_pairs() -> sl.Audit:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-((a - b) ** 2)).mean()

    def loss(i: int) -> Tensor:
        x, y = net(torch.randn(8, 3)), torch.randn(8)
        return kernel(x, x.t()) - 2 * kernel(x, y)

    return train(net, _sgd(net), loss, steps=6)


@sound
def half_the_loss_of_each_discriminator() -> sl.Audit:
    net = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    optimizer = _sgd(net)
    with watch(net, optimizer) as audit:
        for i in range(10):
            optimizer.zero_grad()
            for part in net[: 1 if i == 5 else 2]:
                (0.5 * part(torch.randn(8, 4)).square().mean()).backward()
            optimizer.step()
            audit.step()
    return audit


@sound
def half_a_loss_for_each_of_some_objects() -> sl.Audit:
    net = nn.Linear(4, 1)
    optimizer = _sgd(net)
    with watch(net, optimizer) as audit:
        for objects in (2, 1, 2, 2, 1, 3, 2, 1, 2, 2):
            optimizer.zero_grad()
            for _ in range(objects):
                (0.5 * net(torch.randn(8, 4)).square().mean()).backward()
            optimizer.step()
            audit.step()
    return audit


@bug("SL652")
def short_last_window() -> sl.Audit:
    net = nn.Linear(4, 1)
    optimizer = _sgd(net)
    with watch(net, optimizer) as audit:
        for i in range(15):
            (net(torch.randn(8, 4)).square().mean() / 2).backward()
            if i % 2 or i == 14:
                optimizer.step()
                optimizer.zero_grad()
            audit.step()
    return audit


class Switched(Net):
    """A body that is not differentiated while it is frozen, said in several ways."""

    way = "with"

    def features(self, x: Tensor) -> Tensor:
        if self.way == "with":
            with torch.no_grad() if self.is_frozen else contextlib.nullcontext():
                return torch.tanh(self.body(x))
        if self.way == "enabled":
            with torch.set_grad_enabled(not self.is_frozen):
                return torch.tanh(self.body(x))
        if self.way == "detach":
            h = torch.tanh(self.body(x))
            return h.detach() if self.is_frozen else h
        if self.is_frozen:
            with torch.no_grad():
                return torch.tanh(self.body(x))
        return torch.tanh(self.body(x))


@pytest.mark.parametrize("way", ["with", "enabled", "detach", "if"])
@pytest.mark.parametrize("thaws", [True, False])
def test_a_path_that_is_cut_under_a_condition_is_no_fault(way: str, thaws: bool) -> None:
    net = Switched()
    net.aux.requires_grad_(False)
    net.way = way

    def loss(i: int) -> Tensor:
        net.is_frozen = i < 25 or not thaws
        return loss_of(net.head(net.features(torch.randn(8, 4))))

    assert train(net, _sgd(net.body, net.head), loss).faults == ()


class Cut(Net):
    """The body's path is cut always, and beside it a condition that has nothing to do with it."""

    way = "decorated"
    is_quick = True

    @torch.no_grad()
    def decorated(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def features(self, x: Tensor) -> Tensor:
        if self.way == "decorated":
            return self.decorated(x)
        if self.way == "other":
            with torch.no_grad() if self.is_quick else contextlib.nullcontext():
                return torch.tanh(self.body(x))
        if self.way == "value":
            return torch.tanh(self.body(x)).detach()
        if x is not None:
            with torch.no_grad():
                return torch.tanh(self.body(x))
        return x


@pytest.mark.parametrize("way", ["decorated", "if", "other", "value"])
def test_a_path_that_is_always_cut_is_told_after_the_first_steps(way: str) -> None:
    net = Cut()
    net.aux.requires_grad_(False)
    net.way = way
    optimizer = _sgd(net.body, net.head)
    with watch(net, optimizer) as audit:
        for _ in range(21):
            optimizer.zero_grad()
            loss_of(net.head(net.features(torch.randn(8, 4)))).backward()
            optimizer.step()
            audit.step()
        assert [fault.code for fault in audit.faults] == ["SL502"]


class Attention(nn.Module):
    """Attention over the tokens of a context."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.score = nn.Linear(4, 1)
        self.way = "product"

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(context), self.v(context)
        if self.way == "fused":
            return self.out(F.scaled_dot_product_attention(q, k, v))
        if self.way == "product":
            return self.out((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
        if self.way == "additive":
            return self.out(self.score(torch.tanh(q[:, :, None] + k[:, None])).squeeze(-1).softmax(-1) @ v)
        return self.out((self.score(torch.tanh(q + k)).softmax(-1) * v).sum(1))  # over the wrong dimension


@pytest.mark.parametrize("way", ["product", "fused", "additive", "wrong"])
def test_attention_to_a_single_token_has_no_gradient_for_its_key(way: str) -> None:
    torch.manual_seed(0)
    net = Attention()
    net.way = way
    net.score.requires_grad_(way in ("additive", "wrong"))
    context = torch.randn(8, 5 if way == "wrong" else 1, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    audit = train(net, optimizer, lambda i: net(torch.randn(8, 5, 4), context).square().mean(), steps=12)
    assert [fault.code for fault in audit.faults] == (["SL503"] if way == "wrong" else [])


def test_a_bias_that_a_derivative_does_not_depend_on_is_no_fault() -> None:
    energy = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1))

    def loss(i: int) -> Tensor:
        x = torch.randn(8, 4, requires_grad=True)
        (score,) = torch.autograd.grad(-energy(x).sum(), x, create_graph=True)
        return (score + x).square().sum(1).mean()

    assert train(energy, torch.optim.Adam(energy.parameters()), loss, steps=12).faults == ()


@pytest.mark.parametrize("loop", SOUND, ids=lambda loop: loop.__name__)
def test_a_correct_loop_gives_no_fault(loop: Loop) -> None:
    torch.manual_seed(0)
    faults = loop().faults
    assert faults == (), "\n".join(map(str, faults))


@pytest.mark.parametrize(("code", "loop"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_the_bug_beside_it_is_told(code: str, loop: Loop) -> None:
    torch.manual_seed(0)
    faults = loop().faults
    assert [fault.code for fault in faults] == [code], "\n".join(map(str, faults))
