"""Loss terms beside one another: those that move nothing, and those that pull against each other."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.doctor.finding import Finding
from safeloop.doctor.run import Run
from safeloop.doctor.series import ratio, short

_ENOUGH = 5
_NEGLIGIBLE = 1e-3
_AGAINST = -0.5
_MOSTLY = 0.8


def negligible(run: Run) -> Iterator[Finding]:
    """A term whose weighted gradient is a thousandth of the largest one's, or nothing, in the later half."""
    for prefix in ("loss_grad_exact/", "loss_grad/"):
        found = {name: series.finite for name, series in run.under(prefix).items()}
        norms = {name: s.second_half.median for name, s in found.items() if len(s) >= _ENOUGH}
        largest = max(norms, key=lambda name: norms[name], default="")
        small = {name: norm for name, norm in norms.items() if norm <= _NEGLIGIBLE * norms[largest]}
        for name, norm in small.items() if norms and norms[largest] > 0 else ():
            yield Finding(
                "warning",
                f"loss term `{name}` moves nothing",
                f"{prefix}{name} is {short(norm)} (median, {found[name].second_half.span}), of `{largest}` "
                f"{short(norms[largest])}: {short(ratio(norms[largest], norm))} times",
                "its weight is too small, its value is scaled down, or it has nothing left to teach",
                "raise its weight until both gradients are of one order, or take the term out",
                run.setting("losses", name, "weight"),
                35,
            )
        if norms:
            return


def conflicts(run: Run) -> Iterator[Finding]:
    """Two terms whose gradients point against each other in most records."""
    for pair, series in run.under("loss_cos/").items():
        late = series.finite.second_half
        share = sum(value <= _AGAINST for value in late.values) / max(1, len(late))
        if len(late) >= _ENOUGH and share >= _MOSTLY:
            names = [name for name in pair.split("~") if name]
            yield Finding(
                "warning",
                f"loss terms pull against each other: {' and '.join(f'`{name}`' for name in names)}",
                f"loss_cos/{pair} has median {short(late.median)} and is below {_AGAINST} in {share:.0%} of "
                f"{len(late)} records, {late.span}",
                "what one term gains, the other loses: the sum hardly moves either",
                "weigh one down, give each a part of the model of its own, or combine them by `combine:`",
                ", ".join(run.setting("losses", name, "weight") for name in names),
                30,
            )


def inactive(run: Run) -> Iterator[Finding]:
    """A term that was constant on every step."""
    for name, series in run.under("safety/inactive/").items():
        if len(series) >= _ENOUGH and len(series) == len(run.get("loss/train")) and min(series.values) >= 1:
            yield Finding(
                "warning",
                f"loss term `{name}` is never active",
                f"safety/inactive/{name} is 1 in all {len(series)} records, {series.span}",
                "it is declared `may_be_constant`, and is constant on every batch: its condition never holds",
                "look at its condition (the sign of a margin, a threshold), or take the term out",
                run.setting("losses", name, "may_be_constant"),
                38,
            )
