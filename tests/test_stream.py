"""The stream of micro-batches: epochs, windows, ends."""

from __future__ import annotations

from typing import Any

import pytest

from safeloop.data.source import open_source
from safeloop.stream import DataEnded, Stream


def stream(data: Any, max_epochs: int | None = None) -> Stream:
    source = open_source(data, batch_size=2, seed=0, shuffle=False)
    return Stream(source, lambda batch: batch, len, max_epochs)


def test_epochs_follow_one_another_until_the_last_is_over() -> None:
    draw = stream(["a", "bb", "ccc"], max_epochs=2)
    assert [draw() for _ in range(6)] == ["a", "bb", "ccc"] * 2
    assert draw.num_samples == 12
    with pytest.raises(DataEnded):
        draw()
    assert draw.epoch == 2


def test_a_peeked_batch_comes_next_and_counts_once() -> None:
    draw = stream(["a", "bb"])
    assert draw.peek() == draw.peek() == "a"
    assert draw.num_samples == 0
    assert [draw(), draw()] == ["a", "bb"]
    assert draw.num_samples == 3


def test_no_window_crosses_the_end_of_an_epoch() -> None:
    draw = stream(["a", "b", "c"], max_epochs=2)
    assert [draw.window(2) for _ in range(4)] == [["a", "b"], ["c"], ["a", "b"], ["c"]]
    with pytest.raises(DataEnded):
        draw.window(2)


def test_a_window_after_a_peek_begins_with_what_was_peeked() -> None:
    draw = stream(["a", "b", "c"])
    draw.peek()
    assert draw.window(5) == ["a", "b", "c"]


def test_what_can_be_read_once_ends() -> None:
    draw = stream(iter(["a", "b"]))
    assert [draw(), draw()] == ["a", "b"]
    with pytest.raises(DataEnded):
        draw()


@pytest.mark.parametrize(
    ("size", "epochs", "drawn", "expected"),
    [
        (1, None, 0, None),
        (1, 2, 0, 6),
        (2, 2, 0, 4),
        (2, 2, 1, 3),
        (2, 2, 3, 2),
        (2, 2, 4, 1),
        (5, 2, 0, 2),
        (1, 2, 6, 0),
    ],
)
def test_the_number_of_windows_is_known_where_it_can_be(
    size: int, epochs: int | None, drawn: int, expected: int | None
) -> None:
    for peeks in (False, True):
        draw = stream(["a", "b", "c"], epochs)
        for _ in range(drawn):
            draw()
        if peeks and expected != 0:
            draw.peek()
        assert draw.num_windows(size) == expected


def test_a_length_that_is_wrong_is_not_believed() -> None:
    class Short(list[str]):
        def __len__(self) -> int:
            return 1

    draw = stream(Short(["a", "b", "c"]), max_epochs=1)
    assert [draw(), draw()] == ["a", "b"]
    assert draw.num_windows(1) is None


def test_a_step_is_not_begun_where_the_data_is_too_short_for_it() -> None:
    draw = stream(["a", "b", "c"], max_epochs=1)
    draw.expect(3, 1)
    draw()
    with pytest.raises(DataEnded):
        draw.expect(3, 1)
    assert draw() == "b"
