"""Gradient norms and what clipping makes of them, for each optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.doctor.finding import Finding
from safeloop.doctor.run import Run
from safeloop.doctor.series import ratio, short

_ENOUGH = 10
_GROWN = 100.0
_EXPLODED = 1e4
_VANISHED = 1e-4
_SPIKE = 1000.0
_ALWAYS = 0.99
_FAR = 10.0
_VERY_FAR = 100.0


def norms(run: Run) -> Iterator[Finding]:
    """Norms that grow or vanish over the run, are zero, or spike."""
    for owner in run.owners:
        series = run.get(f"grad/{owner}/pre_clip").finite
        if series and max(series.tail.values) == 0:
            yield _zero(run, owner)
        elif len(series) >= _ENOUGH:
            head, tail = series.head, series.tail
            grown = ratio(tail.median, head.median)
            what = (
                f"grad/{owner}/pre_clip: {short(head.median)} ({head.span}), {short(tail.median)} ({tail.span}), "
                f"{short(grown)} times"
            )
            if grown >= _GROWN:
                yield Finding(
                    "serious" if grown >= _EXPLODED else "warning",
                    f"gradients of `{owner}` grow",
                    what,
                    "weights or activations grow without bound; the learning rate is too large",
                    "lower the learning rate, add `weight_decay` or normalisation, clip (`max_norm`)",
                    run.setting("optimizers", owner, "max_norm"),
                    70,
                )
            elif grown <= _VANISHED and not _has_converged(run, grown):
                yield Finding(
                    "warning",
                    f"gradients of `{owner}` vanish",
                    what,
                    "units saturate or die, so that less and less of the loss reaches the weights",
                    "lower the learning rate; use another activation, normalisation or residual connections",
                    run.setting("optimizers", owner, "lr"),
                    50,
                )


def spikes(run: Run) -> Iterator[Finding]:
    """Single steps whose gradient is far larger than the usual one, where nothing clips them."""
    for owner in run.owners:
        largest, usual = run.get(f"grad/{owner}/max_since_last").finite, run.get(f"grad/{owner}/pre_clip").finite
        if len(largest) < _ENOUGH or not usual or run.get(f"grad/{owner}/clip_fraction"):
            continue
        late = largest.second_half
        peak = max(range(len(late)), key=lambda index: late.values[index])
        if usual.second_half.median > 0 and late.values[peak] >= _SPIKE * usual.second_half.median:
            yield Finding(
                "warning",
                f"gradients of `{owner}` spike",
                f"grad/{owner}/max_since_last is {short(late.values[peak])} just before step {late.steps[peak]}, the "
                f"usual norm {short(usual.second_half.median)}",
                "a rare batch has a huge gradient, and nothing bounds its step",
                "clip (`max_norm`), and look at that batch",
                run.setting("optimizers", owner, "max_norm"),
                45,
            )


def clipping(run: Run) -> Iterator[Finding]:
    """Clipping that cuts every step to a small part of itself, or never acts."""
    for owner in run.owners:
        share = run.get(f"grad/{owner}/clip_fraction").finite
        before, after = run.get(f"grad/{owner}/pre_clip").finite, run.get(f"grad/{owner}/post_clip").finite
        if len(share) < _ENOUGH or not before or not after:
            continue
        cut = ratio(before.second_half.median, after.second_half.median)
        clipped = sum(value >= _ALWAYS for value in share.values) / len(share)
        setting = run.setting("optimizers", owner, "max_norm")
        if clipped >= 0.9 and cut >= _FAR:
            yield Finding(
                "serious" if cut >= _VERY_FAR else "warning",
                f"clipping of `{owner}` cuts every step",
                f"{clipped:.0%} of {len(share)} records have clip_fraction 1 ({share.span}); the norm falls from "
                f"{short(before.second_half.median)} to {short(after.second_half.median)}, {short(cut)} times",
                "the bound is far below the usual norm: it has become a second learning rate, and all steps are of one "
                "length",
                f"set the bound near the usual norm, about {short(before.second_half.median * 2)}",
                setting,
                65,
            )
        elif max(share.values) == 0 and run.value("optimizers", owner, "max_norm") is not None:
            yield Finding(
                "note",
                f"clipping of `{owner}` never acts",
                f"clip_fraction is 0 in all {len(share)} records; the usual norm is {short(before.median)}",
                "the bound lies above every norm so far, which is right where it is there for accidents only",
                "leave it, or lower it to a few times the usual norm",
                setting,
            )


def _zero(run: Run, owner: str) -> Finding:
    series = run.get(f"grad/{owner}/pre_clip")
    since = next((series.steps[i + 1] for i in reversed(range(len(series) - 1)) if series.values[i]), series.steps[0])
    return Finding(
        "serious",
        f"gradients of `{owner}` are zero",
        f"grad/{owner}/pre_clip is exactly 0 from step {since} to {series.steps[-1]}",
        "every unit on the way is dead or saturated, or the loss is constant",
        "lower the learning rate, and look at the activations before the loss",
        run.setting("optimizers", owner, "lr"),
        75,
    )


def _has_converged(run: Run, shrunk: float) -> bool:
    """Whether the loss itself went to about zero, where gradients go too."""
    loss = run.get("loss/train").finite
    if not loss or min(loss.values) < 0:
        return True
    return loss.tail.median <= max(1e-3, 30 * shrunk) * loss.head.median
