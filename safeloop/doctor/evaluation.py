"""Evaluation beside training: the best long ago, and a gap that grows."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.doctor.finding import Finding
from safeloop.doctor.run import Run
from safeloop.doctor.series import ratio, short

_UP = (
    "acc",
    "f1",
    "auc",
    "precision",
    "recall",
    "iou",
    "dice",
    "score",
    "bleu",
    "rouge",
    "r2",
    "psnr",
    "ssim",
    "reward",
)
_DOWN = ("loss", "error", "mse", "mae", "rmse", "nll", "ppl", "perplexity", "fid", "wer", "cer", "bpc", "distance")
_ENOUGH = 5
_WAIT = 3
_LOST = 0.2
_GAP = 2.0


def direction(name: str) -> int:
    """1 where larger is better, -1 where smaller is, 0 where the name does not say."""
    small = name.lower()
    if any(word in small for word in _DOWN):
        return -1
    return 1 if any(word in small for word in _UP) else 0


def best_long_ago(run: Run) -> Iterator[Finding]:
    """A metric that was best a while ago and has lost a part of what it had gained."""
    for tag, series in {**run.under("metric/"), "loss/eval": run.get("loss/eval")}.items():
        one, sign = series.finite, direction(tag)
        if len(one) < _ENOUGH or sign == 0:
            continue
        best = max(range(len(one)), key=lambda index: sign * one.values[index])
        since = len(one) - 1 - best
        gained = sign * (one.values[best] - one.values[0])
        lost = sign * (one.values[best] - one.tail.median)
        if since >= max(_WAIT, len(one) // 4) and lost > max(_LOST * gained, 3 * one.noise) and lost > 0:
            yield Finding(
                "warning",
                f"`{tag}` was best long ago",
                f"{tag}: {short(one.values[0])} ({one.steps[0]}), best {short(one.values[best])} (step "
                f"{one.steps[best]}), {short(one.tail.median)} ({one.tail.span}); {since} evaluations since the best",
                "the model learns its training data by heart, or training got worse there",
                "stop earlier, keep the best weights; use more data, augmentation or weight decay",
                run.setting("run", "max_steps"),
                42,
            )


def gap(run: Run) -> Iterator[Finding]:
    """An evaluation loss that rises while the training loss falls."""
    measured, trained = run.get("loss/eval").finite, run.get("loss/train").finite
    if len(measured) < _ENOUGH or len(trained) < _ENOUGH or min(*measured.values, *trained.values) <= 0:
        return
    apart = ratio(measured.tail.median, trained.tail.median)
    before = ratio(measured.head.median, trained.head.median)
    has_risen = min(measured.values[len(measured) * 3 // 4 :]) > 1.1 * min(measured.values)
    if apart >= _GAP * max(1.0, before) and has_risen:
        yield Finding(
            "warning",
            "evaluation falls behind training",
            f"loss/eval {short(measured.tail.median)} and loss/train {short(trained.tail.median)} at the end "
            f"({short(apart)} times), {short(measured.head.median)} and {short(trained.head.median)} at the start",
            "the model learns its training data by heart, or evaluation data differ from training data",
            "use more data, augmentation, dropout or weight decay; stop at the best evaluation",
            ", ".join(run.setting("optimizers", owner, "weight_decay") for owner in run.owners),
            41,
        )
