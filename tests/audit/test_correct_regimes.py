"""Correct loops that look suspicious: teachers, adversaries, evaluations, statistics, warm-ups. No fault is told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import safeloop as sl

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]
VALIDATION = 2 * X + 1


class Net(nn.Module):
    def __init__(self, outputs: int = 1, p: float = 0.2) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(p)
        self.last = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu()))


@pytest.fixture
def watched() -> Any:
    """Runs `body(i)` in a watched loop; `body` does everything that an iteration does."""

    def run(model: Any, optimizers: Any, body: Callable[[int], None], steps: int = 8, **options: Any) -> list[sl.Fault]:
        with sl.audit(model=model, optimizers=optimizers, on_fault="collect", **options) as audit:
            for i in range(steps):
                body(i)
                audit.step()
        return list(audit.faults)

    return run


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_an_ema_teacher_in_train_mode(watched: Any) -> None:
    student = Net(4)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters())

    def body(i: int) -> None:
        with torch.no_grad():
            target = teacher(X + 0.1)
        update(optimizer, F.mse_loss(student(X), target))
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.lerp_(s, 0.1)

    assert watched({"student": student, "teacher": teacher}, optimizer, body) == []


def test_the_same_model_makes_the_target_in_train_mode(watched: Any) -> None:
    model = Net(4)
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        with torch.no_grad():
            target = model(X + 0.1)
        update(optimizer, F.mse_loss(model(X), target))

    assert watched(model, optimizer, body) == []


def test_a_target_by_argmax_of_the_same_model(watched: Any) -> None:
    model = Net(3)
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        with torch.no_grad():
            labels = model(VALIDATION).argmax(1)
        update(optimizer, F.cross_entropy(model(X), labels))

    assert watched(model, optimizer, body) == []


def test_pseudo_labels_above_a_threshold(watched: Any) -> None:
    model = Net(3)
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        with torch.no_grad():
            top, labels = model(VALIDATION).softmax(1).max(1)
        each = F.cross_entropy(model(X), labels, reduction="none")
        update(optimizer, (each * (top > 0.2)).mean())

    assert watched(model, optimizer, body) == []


def test_momentum_contrast_with_a_queue(watched: Any) -> None:
    query, key = Net(4), Net(4).requires_grad_(False)
    key.load_state_dict(query.state_dict())
    optimizer = torch.optim.SGD(query.parameters(), 0.1)
    queue = torch.randn(4, 32)

    def body(i: int) -> None:
        nonlocal queue
        q = F.normalize(query(X), dim=1)
        with torch.no_grad():
            for k, p in zip(key.parameters(), query.parameters(), strict=True):
                k.data = k.data * 0.9 + p.data * 0.1
            k = F.normalize(key(X + 0.1), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.1
        update(optimizer, F.cross_entropy(logits, torch.zeros(16, dtype=torch.long)))
        queue = torch.cat([k.t(), queue], 1)[:, :32]

    assert watched(nn.ModuleDict({"query": query, "key": key}), optimizer, body) == []


def gan() -> tuple[nn.ModuleDict, dict[str, torch.optim.Optimizer]]:
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 1))
    model = nn.ModuleDict({"generator": generator, "critic": critic})
    return model, {name: torch.optim.Adam(part.parameters()) for name, part in model.items()}


@pytest.mark.parametrize("way", ["no_grad", "detach", "two steps of the critic", "images kept"])
def test_a_gan_whose_fakes_carry_no_graph(watched: Any, way: str) -> None:
    model, optimizers = gan()
    kept: list[Tensor] = []

    def body(i: int) -> None:
        for _ in range(2 if way.startswith("two") else 1):
            noise = torch.randn(16, 4)
            if way == "detach":
                fake = model["generator"](noise).detach()
            else:
                with torch.no_grad():
                    fake = model["generator"](noise)
            ones, zeros = torch.ones(16, 1), torch.zeros(16, 1)
            loss = F.binary_cross_entropy_with_logits(model["critic"](X), ones)
            update(optimizers["critic"], loss + F.binary_cross_entropy_with_logits(model["critic"](fake), zeros))
        fake = model["generator"](torch.randn(16, 4))
        update(optimizers["generator"], F.binary_cross_entropy_with_logits(model["critic"](fake), ones))
        if way == "images kept" and i % 4 == 3:
            model["generator"].eval()
            with torch.no_grad():
                kept.append(model["generator"](torch.randn(16, 4)))
            model["generator"].train()

    assert watched(model, optimizers, body) == []


@pytest.mark.parametrize("way", ["of torch", "by hand", "by reset"])
def test_statistics_that_are_estimated_again(watched: Any, way: str) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    average = AveragedModel(model)

    def body(i: int) -> None:
        update(optimizer, F.mse_loss(model(X), Y))
        average.update_parameters(model)
        if i % 2 and way == "of torch":
            update_bn([X, X], model)
        elif i % 2 and way == "by hand":
            momenta = model.norm.momentum
            model.norm.reset_running_stats()
            model.norm.momentum = None
            with torch.no_grad():
                for _ in range(2):
                    model(X)
            model.norm.momentum = momenta
        elif i % 2:
            model.norm.reset_running_stats()
            with torch.no_grad():
                model(X)

    assert watched(model, optimizer, body) == []


def test_statistics_are_warmed_up_before_the_first_step(watched: Any) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        if i < 2:
            with torch.no_grad():
                for _ in range(2):
                    model(X)
        update(optimizer, F.mse_loss(model(X), Y))

    assert watched(model, optimizer, body) == []


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_in_eval_mode(watched: Any, guard: Any) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())

    @guard()
    def evaluate() -> float:
        model.eval()
        value = float(F.mse_loss(model(VALIDATION), Y))
        model.train()
        return value

    def body(i: int) -> None:
        update(optimizer, F.mse_loss(model(X), Y))
        evaluate()

    assert watched(model, optimizer, body) == []


def test_an_evaluation_without_restless_modules_needs_no_eval_mode(watched: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        update(optimizer, F.mse_loss(model(X), Y))
        with torch.no_grad():
            F.mse_loss(model(VALIDATION), Y).item()

    assert watched(model, optimizer, body) == []


def test_the_accuracy_of_the_training_batch_is_measured_in_train_mode_once(watched: Any) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        out = model(X)
        update(optimizer, F.mse_loss(out, Y))
        with torch.no_grad():
            (out - Y).abs().mean().item()

    assert watched(model, optimizer, body) == []


def test_monte_carlo_dropout_in_eval_mode(watched: Any) -> None:
    class Bayesian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.dropout(self.first(x).relu(), 0.2, training=True))

    model = Bayesian()
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        update(optimizer, F.mse_loss(model(X), Y))
        model.eval()
        with torch.no_grad():
            torch.stack([model(VALIDATION) for _ in range(3)]).std(0)
        model.train()

    assert watched(model, optimizer, body) == []


def test_monte_carlo_dropout_by_modules_in_train_mode(watched: Any) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        update(optimizer, F.mse_loss(model(X), Y))
        model.eval()
        model.drop.train()
        with torch.no_grad():
            torch.stack([model(VALIDATION) for _ in range(3)]).std(0)
        model.train()

    assert watched(model, optimizer, body) == []


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.p = nn.Linear(6, 18), 0.1

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).view(4, 4, 18).chunk(3, -1)
        p = self.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return F.dropout(out, self.p, self.training).flatten(0, 1)


def test_functional_dropout_that_follows_the_mode(watched: Any) -> None:
    model = nn.Sequential(Attention(), nn.Linear(6, 1))
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        update(optimizer, F.mse_loss(model(X), Y))
        model.eval()
        with torch.no_grad():
            model(VALIDATION)
        model.train()

    assert watched(model, optimizer, body) == []


def test_a_frozen_backbone_in_eval_mode_whose_train_is_overridden(watched: Any) -> None:
    class Tuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = Net(4).requires_grad_(False), nn.Linear(4, 1)

        def train(self, mode: bool = True) -> Tuned:
            super().train(mode)
            self.backbone.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    model = Tuned().train()
    optimizer = torch.optim.Adam(model.head.parameters())

    def body(i: int) -> None:
        model.train()
        update(optimizer, F.mse_loss(model(X), Y))
        model.eval()
        with torch.no_grad():
            model(VALIDATION)

    assert watched(model, optimizer, body) == []


def test_fine_tuning_with_batch_norm_in_eval_mode_from_the_start(watched: Any) -> None:
    model = Net()
    model.norm.eval()
    optimizer = torch.optim.Adam(model.parameters())
    assert watched(model, optimizer, lambda i: update(optimizer, F.mse_loss(model(X), Y))) == []


def test_batch_norm_frozen_after_some_epochs(watched: Any) -> None:
    """As torchvision's references do for quantisation-aware training: statistics are frozen late, on purpose."""
    model = Net(p=0.0)
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        model.train()
        if i >= 3:
            model.norm.eval()
        update(optimizer, F.mse_loss(model(X), Y))

    assert watched(model, optimizer, body) == []


def test_statistics_of_a_frozen_affine_follow_the_new_data_on_purpose(watched: Any) -> None:
    """Domain adaptation (AdaBN): weights of the norm are frozen, what is around is trained."""
    model = Net()
    model.norm.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    assert watched(model, optimizer, lambda i: update(optimizer, F.mse_loss(model(X), Y))) == []


def test_batch_norm_without_running_statistics(watched: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        update(optimizer, F.mse_loss(checkpoint(model, X, use_reentrant=False), Y))
        with torch.no_grad():
            model(VALIDATION)

    assert watched(model, optimizer, body) == []


def test_batch_norm_in_eval_mode_in_a_checkpoint(watched: Any) -> None:
    model = Net()
    model.norm.eval()
    optimizer = torch.optim.Adam(model.parameters())
    body = lambda i: update(optimizer, F.mse_loss(checkpoint(model, X, use_reentrant=False), Y))  # noqa: E731
    assert watched(model, optimizer, body) == []


def test_a_warm_up_from_a_learning_rate_of_zero_and_a_zero_adapter(watched: Any) -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2), nn.Linear(2, 6)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, x: Tensor) -> Tensor:
            h = self.base(x)
            return h + self.up(self.down(h).relu())

    model = nn.Sequential(Adapted(), nn.Linear(6, 1))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: i / 10)

    def body(i: int) -> None:
        update(optimizer, F.mse_loss(model(X), Y))
        schedule.step()

    assert watched(model, optimizer, body, steps=12) == []


def test_accumulation_in_bf16_with_clipping(watched: Any) -> None:
    model = Net(3)
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        optimizer.zero_grad()
        for part in X.chunk(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(part), (part[:, 0] > 0).long()) / 2
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert watched(model, optimizer, body) == []


def test_adversarial_training_with_a_gradient_of_the_input(watched: Any) -> None:
    model = Net(3)
    optimizer = torch.optim.Adam(model.parameters())
    labels = (X[:, 0] > 0).long()

    def body(i: int) -> None:
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
        update(optimizer, F.cross_entropy(model((x + 0.1 * slope.sign()).detach()), labels))

    assert watched(model, optimizer, body) == []


@pytest.mark.parametrize("target", ["inputs", "weights", "norm weighted"])
def test_a_gradient_used_as_a_constant(watched: Any, target: str) -> None:
    """A gradient norm that scales or is logged, GradNorm-like weights: constants on purpose."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())
    log = []

    def body(i: int) -> None:
        x = X.clone().requires_grad_()
        loss = F.mse_loss(model(x), Y)
        wanted = x if target == "inputs" else model[0].weight
        (slope,) = torch.autograd.grad(loss, wanted, retain_graph=True)
        log.append(slope.norm().item())
        if target == "norm weighted":
            loss = loss + F.l1_loss(model(X), Y) * (1 / (1 + slope.norm()))
        update(optimizer, loss)

    assert watched(model, optimizer, body) == []


def test_a_penalty_of_the_second_order_through_layer_norm(watched: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Softplus(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        x = X.clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        update(optimizer, F.mse_loss(out, Y) + 0.1 * (slope.norm(dim=1) - 1).square().mean())

    assert watched(model, optimizer, body) == []


def test_a_retained_gradient_is_read(watched: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())
    seen = []

    def body(i: int) -> None:
        optimizer.zero_grad()
        h = model[:2](X)
        h.retain_grad()
        F.mse_loss(model[2](h), Y).backward()
        assert h.grad is not None
        seen.append(h.grad.norm())
        optimizer.step()

    assert watched(model, optimizer, body) == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_non_leaf_is_asked_for_its_gradient_and_none_is_expected(watched: Any) -> None:
    """Helpers that look at whatever they are given: `getattr(x, "grad", None)`, `if x.grad is not None`."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        out = model(X)
        update(optimizer, F.mse_loss(out, Y))
        for tensor in (out, *model.parameters()):
            if getattr(tensor, "grad", None) is not None:
                tensor.grad.norm()

    assert watched(model, optimizer, body) == []


def test_progressive_growing(watched: Any) -> None:
    model = nn.ModuleDict({"old": nn.Linear(6, 1), "new": nn.Linear(6, 1)})
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        alpha = min(1.0, i / 6)
        update(optimizer, F.mse_loss((1 - alpha) * model["old"](X) + alpha * model["new"](X), Y))

    assert watched(model, optimizer, body) == []


def test_a_head_that_is_trained_first(watched: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())

    def body(i: int) -> None:
        h = model[:2](X)
        update(optimizer, F.mse_loss(model[2](h.detach() if i < 4 else h), Y))

    assert watched(model, optimizer, body) == []
