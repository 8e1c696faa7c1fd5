"""Loops with one bug in the order of events, written as people write them: each ends in exactly its code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedules

BUGS: list[tuple[str, Callable[[Any], None]]] = []


def bug(code: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Add a loop that must give this code."""

    def add(loop: Callable[[Any], None]) -> Callable[[Any], None]:
        BUGS.append((code, loop))
        return loop

    return add


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 3))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))


@pytest.mark.parametrize(("code", "loop"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_bug_gives_exactly_its_code(code: str, loop: Callable[[Any], None], watched: Any) -> None:
    audits: list[Any] = []

    class Watch:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = watched(*args, **kwargs)

        def __enter__(self) -> Any:
            audits.append(self.inner.__enter__())
            return audits[-1]

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    torch.manual_seed(0)
    loop(Watch)
    faults = [fault for audit in audits for fault in audit.faults]
    assert [fault.code for fault in faults] == [code], "\n".join(map(str, faults))
    assert "test_bugs_in_loops.py" in faults[0].where or code in ("SL311", "SL646", "SL650")


@bug("SL630")
def zeroing_forgotten_in_a_cnn_without_audit_step(watch: Any) -> None:
    model = cnn()
    optimizer = Adam(model.parameters(), lr=1e-3)
    with watch(model, optimizer):
        for _ in range(6):
            F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.randint(0, 3, (4,))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


@bug("SL630")
def zeroing_of_another_model(watch: Any) -> None:
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    optimizer = SGD([*body.parameters(), *head.parameters()], lr=0.01)

    def train_step() -> None:
        head.zero_grad()
        loss_of(nn.Sequential(body, head)).backward()
        optimizer.step()

    with watch({"body": body, "head": head}, optimizer) as audit:
        for _ in range(6):
            train_step()
            audit.step()


@bug("SL630")
def zeroing_forgotten_for_one_of_two(watch: Any) -> None:
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    one, two = SGD(body.parameters(), lr=0.01), SGD(head.parameters(), lr=0.01)
    with watch({"body": body, "head": head}, {"one": one, "two": two}) as audit:
        for _ in range(6):
            one.zero_grad()
            loss_of(nn.Sequential(body, head)).backward()
            one.step()
            two.step()
            audit.step()


@bug("SL630")
def zeroing_forgotten_under_a_scaler(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for _ in range(6):
            scaler.scale(loss_of(model)).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()


@bug("SL631")
def accumulation_zeroed_by_the_model(watch: Any) -> None:
    model = nn.GRU(4, 3, batch_first=True)
    optimizer = AdamW(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for step in range(12):
            model.zero_grad()
            (model(torch.randn(2, 5, 4))[0].square().mean() / 2).backward()
            if (step + 1) % 2 == 0:
                optimizer.step()
            audit.step()


@bug("SL631")
def accumulation_zeroed_with_none(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(5):
            for _ in range(4):
                for p in model.parameters():
                    p.grad = None
                (loss_of(model) / 4).backward()
            optimizer.step()
            audit.step()


@bug("SL631")
def trunk_zeroed_between_the_losses_of_two_heads(watch: Any) -> None:
    trunk, heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
    trunk_optimizer, heads_optimizer = SGD(trunk.parameters(), lr=0.01), SGD(heads.parameters(), lr=0.01)
    with watch({"trunk": trunk, "heads": heads}, {"trunk": trunk_optimizer, "heads": heads_optimizer}) as audit:
        for _ in range(8):
            heads_optimizer.zero_grad()
            for head in heads:
                trunk_optimizer.zero_grad()
                F.cross_entropy(head(trunk(torch.randn(8, 4)).relu()), torch.randint(0, 3, (8,))).backward()
            trunk_optimizer.step()
            heads_optimizer.step()
            audit.step()


@bug("SL631")
def auxiliary_loss_zeroed(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)

    def train(loss: Tensor, **options: Any) -> None:
        optimizer.zero_grad(set_to_none=False)
        loss.backward(**options)

    with watch(model, optimizer) as audit:
        for _ in range(6):
            out = model(torch.randn(8, 4))
            train(out[:, 0].square().mean(), retain_graph=True)
            train(out[:, 1].square().mean())
            optimizer.step()
            audit.step()


@bug("SL632")
def zeroing_by_the_model_before_the_step(watch: Any) -> None:
    model = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True)
    optimizer = AdamW(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            model(torch.randn(2, 5, 4)).square().mean().backward()
            model.zero_grad()
            optimizer.step()
            audit.step()


@bug("SL632")
def step_before_backward_in_a_function(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)

    def train_step() -> float:
        loss = loss_of(model)
        optimizer.zero_grad()
        optimizer.step()
        loss.backward()
        return loss.item()

    with watch(model, optimizer):
        for _ in range(6):
            train_step()


@bug("SL632")
def zeroing_by_hand_before_the_step(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            loss_of(model).backward()
            for p in model.parameters():
                p.grad = None
            optimizer.step()
            audit.step()


def gan() -> tuple[nn.Module, nn.Module, SGD, SGD]:
    gen = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))
    disc = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    return gen, disc, SGD(gen.parameters(), lr=0.01), SGD(disc.parameters(), lr=0.01)


def judge(disc: nn.Module, x: Tensor, real: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(disc(x), torch.full((len(x), 1), real))


@bug("SL633")
def fake_that_was_not_detached(watch: Any) -> None:
    gen, disc, opt_g, opt_d = gan()
    with watch({"gen": gen, "disc": disc}, {"g": opt_g, "d": opt_d}):
        for _ in range(8):
            opt_g.zero_grad()
            opt_d.zero_grad()
            fake = gen(torch.randn(8, 2))
            (judge(disc, torch.randn(8, 4), 1.0) + judge(disc, fake, 0.0)).backward()
            opt_d.step()
            judge(disc, gen(torch.randn(8, 2)), 1.0).backward()
            opt_g.step()


@bug("SL633")
def zeroing_at_the_end_of_both_phases(watch: Any) -> None:
    gen, disc, opt_g, opt_d = gan()
    with watch({"gen": gen, "disc": disc}, {"d": opt_d, "g": opt_g}) as audit:
        for _ in range(8):
            judge(disc, gen(torch.randn(8, 2)), 1.0).backward()
            opt_g.step()
            judge(disc, gen(torch.randn(8, 2)).detach(), 0.0).backward()
            judge(disc, torch.randn(8, 4), 1.0).backward()
            opt_d.step()
            opt_g.zero_grad()
            opt_d.zero_grad()
            audit.step()


@bug("SL633")
def actor_leaves_gradients_in_the_critic(watch: Any) -> None:
    actor, critic = nn.Linear(4, 2), nn.Linear(6, 1)
    opt_a, opt_c = Adam(actor.parameters(), lr=0.01), Adam(critic.parameters(), lr=0.01)
    with watch({"actor": actor, "critic": critic}, {"a": opt_a, "c": opt_c}) as audit:
        for _ in range(8):
            x = torch.randn(8, 4)
            opt_a.zero_grad()
            (-critic(torch.cat([x, actor(x)], 1)).mean()).backward()
            opt_a.step()
            loss = F.mse_loss(critic(torch.cat([x, actor(x).detach()], 1)), torch.randn(8, 1))
            loss.backward()
            opt_c.step()
            opt_c.zero_grad()
            audit.step()


@bug("SL634")
def losses_in_a_loop_and_their_sum(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            out = model(torch.randn(8, 4))
            optimizer.zero_grad()
            total = torch.zeros(())
            for i in range(3):
                term = out[:, i].square().mean()
                term.backward(retain_graph=True)
                total = total + term
            total.backward()
            optimizer.step()
            audit.step()


@bug("SL635")
def the_wrong_optimizer_is_stepped_twice(watch: Any) -> None:
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    one, two = Adam(body.parameters(), lr=0.01), Adam(head.parameters(), lr=0.01)
    with watch({"body": body, "head": head}, [one, two]) as audit:
        for _ in range(8):
            one.zero_grad()
            two.zero_grad()
            loss_of(nn.Sequential(body, head)).backward()
            two.step()
            audit.step()


@bug("SL637")
def closure_without_zeroing_in_a_line_search(watch: Any) -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))

    class Problem:
        def __call__(self) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

    with watch(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(Problem())


@bug("SL640")
def clip_by_value_after_the_step(watch: Any) -> None:
    model = cnn()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.randint(0, 3, (4,))).backward()
            optimizer.step()
            nn.utils.clip_grad_value_(model.parameters(), 0.5)
            audit.step()


@bug("SL640")
def clip_before_backward(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad(set_to_none=False)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            loss_of(model).backward()
            optimizer.step()
            audit.step()


@bug("SL641")
def clip_before_unscale_in_a_helper(watch: Any) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def finish() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    with watch(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model)
            scaler.scale(loss / 2).backward()
            finish()
            audit.step()


@bug("SL642")
def one_of_two_steps_without_the_scaler(watch: Any) -> None:
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    one, two = SGD(body.parameters(), lr=1e-4), SGD(head.parameters(), lr=1e-4)
    with watch({"body": body, "head": head}, [one, two]) as audit:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(6):
            one.zero_grad()
            two.zero_grad()
            scaler.scale(loss_of(nn.Sequential(body, head))).backward()
            scaler.step(one)
            two.step()
            scaler.update()
            audit.step()


@bug("SL643")
def every_update_skipped_by_a_scaler_made_inside(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for _ in range(9):
            optimizer.zero_grad()
            out = model(torch.randn(8, 4))
            scaler.scale(((out - out).square().sum(1) + 0.0).sqrt().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()


@bug("SL645")
def schedule_between_backward_and_step(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    optimizer.step()
    with watch(model, optimizer) as audit:
        scheduler = schedules.CosineAnnealingLR(optimizer, T_max=20)
        optimizer._opt_called = True  # type: ignore[attr-defined]
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(model).backward()
            scheduler.step()
            optimizer.step()
            audit.step()


@bug("SL646")
def optimizer_built_again(watch: Any) -> None:
    model = net()
    scheduler = schedules.StepLR(Adam(model.parameters(), lr=0.01), 3)
    optimizer = Adam([*model[0].parameters(), *model[2].parameters()], lr=0.01)
    with watch(model, optimizer) as audit, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            scheduler.step()
            audit.step()


@bug("SL647")
def decay_that_is_over(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    scheduler = schedules.PolynomialLR(optimizer, total_iters=5)
    with watch(model, optimizer) as audit:
        for _ in range(14):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            scheduler.step()
            audit.step()


@bug("SL648")
def autocast_around_the_epoch(watch: Any) -> None:
    model = cnn()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(6):
            optimizer.zero_grad()
            out = model(torch.randn(4, 1, 8, 8))
            F.cross_entropy(out.float(), torch.randint(0, 3, (4,))).backward()
            optimizer.step()


@bug("SL650")
def frozen_for_a_probe_and_forgotten(watch: Any) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with watch(model, optimizer):
        for step in range(10):
            if step == 4:
                for p in model[0].parameters():
                    p.requires_grad = False
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()


@bug("SL651")
def a_stale_gradient_of_frozen_weights(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        for step in range(10):
            model[0].requires_grad_(not 2 <= step < 8)
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = None
            loss_of(model).backward()
            optimizer.step()
            audit.step()


@bug("SL636")
def a_branch_that_decays(watch: Any) -> None:
    model = nn.ModuleList([net(), net(), net()])
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with watch(model, optimizer) as audit:
        for step in range(9):
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.zero_()
            loss_of(model[step % 3]).backward()
            optimizer.step()
            audit.step()


@bug("SL638")
def a_second_step_in_a_helper(watch: Any) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.01)

    def finish() -> None:
        optimizer.step()

    with watch(model, optimizer):
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            finish()


@bug("SL644")
def scale_updated_for_each_micro_batch(watch: Any) -> None:
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    one, two = SGD(body.parameters(), lr=1e-3), SGD(head.parameters(), lr=1e-3)
    with watch({"body": body, "head": head}, [one, two]) as audit:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(8):
            scaler.scale(loss_of(nn.Sequential(body, head))).backward()
            scaler.step(one)
            one.zero_grad()
            if step % 2:
                scaler.step(two)
                two.zero_grad()
            scaler.update()
            audit.step()


@bug("SL649")
def sentences_of_all_lengths(watch: Any) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    optimizer = AdamW(model.parameters(), lr=0.01)
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    with watch(model, optimizer) as audit:
        for _ in range(4):
            for length in (3, 24, 9, 15):
                text = torch.zeros(24, dtype=torch.long)
                text[:length] = torch.randint(1, 9, (length,))
                loss = criterion(model(text), text)
                loss /= 4
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            audit.step()


@bug("SL652")
def a_tail_under_a_scaler(watch: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as audit:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(2):
            for i in range(10):
                loss = loss_of(model)
                scaler.scale(0.25 * loss).backward()
                if i % 4 == 3 or i == 9:
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                audit.step()


@bug("SL310")
def a_memory_that_is_not_detached(watch: Any) -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write = nn.Linear(4, 4)
            self.state = torch.zeros(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.state = 0.9 * self.state + self.write(x)
            return self.state

    model = Memory()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer):
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward(retain_graph=True)
            optimizer.step()


@bug("SL311")
def running_loss_in_self(watch: Any) -> None:
    class Loop:
        def __init__(self) -> None:
            self.model = net()
            self.optimizer = SGD(self.model.parameters(), lr=0.01)
            self.loss_history: list[Tensor] = []

        def run(self) -> None:
            with watch(self.model, self.optimizer) as audit:
                for _ in range(9):
                    self.optimizer.zero_grad()
                    loss = loss_of(self.model)
                    loss.backward()
                    self.optimizer.step()
                    self.loss_history.append(loss)
                    audit.step()

    Loop().run()
