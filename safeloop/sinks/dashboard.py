"""What the dashboard shows: tags -> categories of charts. Plain data; `summaries.py` makes it TensorBoard's layout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

MODULE = "module/grad_norm/"
BAND = tuple(f"module/grad_norm_band/{name}" for name in ("median", "min", "max"))
"""Derived from the `module/grad_norm/...` tags of a record by the TensorBoard sink: median, smallest, largest."""

_GROUP_ABOVE = 24
_BAND_FROM = 3


@dataclass(frozen=True, slots=True)
class Chart:
    """One or two tags as lines, or, for a band, a line between two others (value, lower, upper)."""

    title: str
    tags: tuple[str, ...]
    is_band: bool = False


@dataclass(frozen=True, slots=True)
class Category:
    """A heading and the charts below it."""

    title: str
    charts: tuple[Chart, ...]


def band(scalars: Mapping[str, float]) -> dict[str, float]:
    """Median, smallest and largest gradient norm over the modules of a record, NaN left out; empty below three."""
    norms = [value for tag, value in scalars.items() if tag.startswith(MODULE) and not math.isnan(value)]
    if len(norms) < _BAND_FROM:
        return {}
    return dict(zip(BAND, (statistics.median(norms), min(norms), max(norms)), strict=True))


def categories(tags: Collection[str], modules: Sequence[str]) -> tuple[Category, ...]:
    """The dashboard of a run that has written these tags: no chart without a tag, every tag in one chart.

    A run has one colour in a chart, so a chart has at most two tags, and each module its own. `modules` is their order.
    With one optimizer the total repeats it, with one loss term the loss does: what repeats has no chart.
    """
    repeated = _repeated(tags)
    tags = [tag for tag in tags if tag not in repeated]
    owners = _owners(tags)
    whole = owners[0] if len(owners) == 1 else "total"
    health = [Chart("loss: train and eval", ("loss/train", "loss/eval")), *_clipping(whole)]
    health += [Chart(f"metric: {name}", (f"metric/{name}",)) for name in _under(tags, "metric/")]
    gradients = [chart for owner in owners if owner != whole for chart in _clipping(owner)]
    gradients += [chart for owner in owners for chart in _spikes(owner)]
    gradients.append(Chart("all modules: median between smallest and largest", BAND, is_band=True))
    speed = [Chart("samples per second", ("perf/samples_per_s",)), Chart("milliseconds per step", ("perf/step_ms",))]
    safety = [
        Chart("steps skipped, and with non-finite gradients", ("safety/skipped_total", "safety/nonfinite_total")),
        Chart("faults", ("safety/faults_total",)),
    ]
    fixed = [
        ("Health", health),
        ("Loss terms", [Chart(f"loss term: {name}", (f"loss/{name}",)) for name in _terms(tags)]),
        ("Gradients", gradients),
        *_modules(tags, modules),
        (
            "Watched gradients",
            [Chart(f"gradient norm at: {name}", (f"watch/{name}",)) for name in _under(tags, "watch/")],
        ),
        ("Curvature", [Chart(name, (f"curvature/{name}",)) for name in _under(tags, "curvature/")]),
        ("Optimizer", [Chart(f"learning rate: {name}", (f"optim/lr/{name}",)) for name in _under(tags, "optim/lr/")]),
        ("Speed", speed),
        ("Safety", safety),
    ]
    shown = {tag for _, charts in fixed for chart in charts for tag in chart.tags}
    fixed.append(("Other", [Chart(tag, (tag,)) for tag in tags if tag not in shown]))
    return tuple(_present(tags, fixed))


def _repeated(tags: Collection[str]) -> set[str]:
    """Tags whose chart would only repeat another: the total of one optimizer, the one term of the loss."""
    terms, owners = _terms(tags), [owner for owner in _owners(tags) if owner != "total"]
    found = {f"loss/{terms[0]}"} if len(terms) == 1 and "loss/train" in tags else set()
    if len(owners) == 1:
        found |= {f"grad/total/{name}" for name in _under(tags, "grad/total/") if f"grad/{owners[0]}/{name}" in tags}
    return found


def _owners(tags: Collection[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in _under(tags, "grad/")))


def _terms(tags: Collection[str]) -> list[str]:
    return [name for name in _under(tags, "loss/") if name not in ("train", "eval")]


def _under(tags: Collection[str], prefix: str) -> list[str]:
    return [tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)]


def _clipping(owner: str) -> list[Chart]:
    tags = (f"grad/{owner}/pre_clip", f"grad/{owner}/post_clip")
    return [Chart(f"gradient norm before and after clipping: {owner}", tags)]


def _spikes(owner: str) -> list[Chart]:
    titles = {
        "log10_pre_clip": "log10 of the gradient norm",
        "max_since_last": "largest gradient norm since the last log",
        "clip_fraction": "fraction of steps clipped",
    }
    return [Chart(f"{title}: {owner}", (f"grad/{owner}/{name}",)) for name, title in titles.items()]


def _modules(tags: Collection[str], order: Sequence[str]) -> list[tuple[str, list[Chart]]]:
    """One category; above 24 modules, one for each child in which their names first differ."""
    title = "Gradient norm by module"
    place = {name: index for index, name in enumerate(order)}
    names = sorted(_under(tags, MODULE), key=lambda name: place.get(name, len(place)))
    charts = {name: Chart(name, (MODULE + name,)) for name in names}
    flat = [(title, list(charts.values()))]
    if len(names) <= _GROUP_ABOVE:
        return flat
    depth = _shared_depth([name.split(".") for name in names])
    groups: dict[str, list[Chart]] = {}
    for name, chart in charts.items():
        groups.setdefault(".".join(name.split(".")[: depth + 1]), []).append(chart)
    return flat if len(groups) == len(names) else [(f"{title}: {child}", group) for child, group in groups.items()]


def _shared_depth(paths: Sequence[Sequence[str]]) -> int:
    """How many leading components all paths share, with at least one left over in each."""
    shortest = min(len(path) for path in paths)
    return next((i for i in range(shortest - 1) if len({path[i] for path in paths}) > 1), shortest - 1)


def _present(tags: Collection[str], wanted: Sequence[tuple[str, Sequence[Chart]]]) -> Iterator[Category]:
    """The charts that have a tag to show, each with those of its tags that exist."""
    known = set(tags)
    for title, charts in wanted:
        trimmed = [Chart(c.title, tuple(tag for tag in c.tags if tag in known), c.is_band) for c in charts]
        kept = tuple(chart for chart in trimmed if len(chart.tags) == len(BAND) or (chart.tags and not chart.is_band))
        if kept:
            yield Category(title, kept)
