"""The dashboard as plain data: which charts a set of tags gives."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeloop.sinks.dashboard import BAND, Category, band, categories

NAMES = st.text("ab.c", min_size=1, max_size=6)
OWNED = ("pre_clip", "post_clip", "log10_pre_clip", "max_since_last", "clip_fraction", "something_new")
TAGS = st.one_of(
    st.sampled_from(
        ["loss/train", "loss/eval", "perf/samples_per_s", "perf/step_ms", "perf/audit_ms", "optim/loss_scale"]
    ),
    st.sampled_from([f"safety/{name}_total" for name in ("skipped", "nonfinite", "faults")]),
    st.builds("grad/{}/{}".format, NAMES | st.just("total"), st.sampled_from(OWNED)),
    st.builds(
        "{}/{}".format, st.sampled_from(["loss", "metric", "module/grad_norm", "optim/lr", "loss_grad", "mine"]), NAMES
    ),
)


def repeats(tags: list[str]) -> set[str]:
    """What one optimizer's total and one loss term repeat, said the slow way."""
    owners = {tag.rsplit("/", 1)[0] for tag in tags if tag.startswith("grad/") and not tag.startswith("grad/total/")}
    terms = [tag for tag in tags if tag.startswith("loss/") and tag not in ("loss/train", "loss/eval")]
    found = set(terms) if len(terms) == 1 and "loss/train" in tags else set()
    for tag in tags:
        if tag.startswith("grad/total/") and len(owners) == 1 and tag.replace("grad/total", min(owners), 1) in tags:
            found.add(tag)
    return found


def titles(content: tuple[Category, ...]) -> list[str]:
    return [category.title for category in content]


@given(st.lists(TAGS, unique=True, max_size=60), st.booleans())
def test_every_tag_that_repeats_no_other_is_in_exactly_one_chart_and_no_chart_shows_more_than_two(
    tags: list[str], has_band: bool
) -> None:
    tags = tags + list(BAND) * has_band

    content = categories(tags, ())

    charts = [chart for category in content for chart in category.charts]
    assert sorted(tag for chart in charts for tag in chart.tags) == sorted(set(tags) - repeats(tags))
    assert all(1 <= len(chart.tags) <= 2 for chart in charts if not chart.is_band)
    assert [chart.tags for chart in charts if chart.is_band] == [BAND] * has_band
    assert all(category.charts for category in content)
    assert len(set(titles(content))) == len(content)


def test_charts_stand_in_the_order_a_reader_needs_them() -> None:
    tags = [
        "safety/faults_total",
        "perf/step_ms",
        "optim/lr/main",
        "module/grad_norm/head",
        "grad/main/pre_clip",
        "grad/main/max_since_last",
        "loss/ce",
        "loss/kl",
    ]

    content = categories([*tags, "loss/train", "mine/own"], ("head",))

    assert titles(content) == [
        "Health",
        "Loss terms",
        "Gradients",
        "Gradient norm by module",
        "Optimizer",
        "Speed",
        "Safety",
        "Other",
    ]


def test_before_and_after_clipping_share_a_chart_for_each_optimizer() -> None:
    tags = [f"grad/{owner}/{name}" for owner in ("critic", "generator") for name in ("pre_clip", "post_clip")]

    (gradients,) = categories(tags, ())

    assert gradients.title == "Gradients"
    assert [chart.tags for chart in gradients.charts] == [tuple(tags[:2]), tuple(tags[2:])]


def test_one_optimizer_stands_for_the_total_and_the_loss_for_its_one_term() -> None:
    tags = [f"grad/{owner}/{name}" for owner in ("main", "total") for name in ("pre_clip", "post_clip")]

    (health,) = categories(["loss/train", "loss/ce", *tags], ())

    assert [chart.tags for chart in health.charts] == [("loss/train",), ("grad/main/pre_clip", "grad/main/post_clip")]


def test_modules_stand_in_the_order_of_the_model_and_each_has_its_own_chart() -> None:
    order = ("stem", "body", "head")

    (category,) = categories([f"module/grad_norm/{name}" for name in ("head", "body", "stem")], order)

    assert [chart.title for chart in category.charts] == list(order)


def test_twenty_four_modules_are_one_category_and_twenty_five_are_grouped_by_top_level_child() -> None:
    names = [f"{child}.{i}" for child in ("encoder", "decoder") for i in range(12)]

    one = categories([f"module/grad_norm/{name}" for name in names], names)
    names.append("head")
    several = categories([f"module/grad_norm/{name}" for name in names] + list(BAND), names)

    prefix = "Gradient norm by module"
    assert titles(one) == [prefix]
    assert titles(several) == ["Gradients", f"{prefix}: encoder", f"{prefix}: decoder", f"{prefix}: head"]
    assert [len(category.charts) for category in several] == [1, 12, 12, 1]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        ([f"model.net.{child}.{i}" for child in "ab" for i in range(20)], ["model.net.a", "model.net.b"]),
        ([f"net.{i}" for i in range(30)], []),
        ([f"{i}" for i in range(30)], []),
    ],
    ids=["below a wrapper", "one long child", "one long list"],
)
def test_groups_are_made_where_names_first_differ_and_only_if_they_hold_several(
    names: list[str], groups: list[str]
) -> None:
    content = categories([f"module/grad_norm/{name}" for name in names], names)

    assert [title.partition(": ")[2] for title in titles(content)] == (groups or [""])


@given(st.lists(st.floats(allow_infinity=False, width=32), min_size=0, max_size=9))
def test_the_band_is_median_smallest_and_largest_of_the_module_norms(norms: list[float]) -> None:
    found = band({"loss/train": 1e9} | {f"module/grad_norm/{i}": norm for i, norm in enumerate(norms)})

    numbers = [norm for norm in norms if not math.isnan(norm)]
    expected = (
        {}
        if len(numbers) < 3
        else dict(zip(BAND, (statistics.median(numbers), min(numbers), max(numbers)), strict=True))
    )
    assert found == expected
