from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeloop.config import ConfigError, load
from safeloop.config.document import MAX_NODES, parse, parse_value, to_yaml


def read(text):
    problems = []
    node = parse(text, "a.yaml", problems)
    assert problems == []
    return node.plain()


def faults(text):
    problems = []
    parse(text, "a.yaml", problems)
    return [(problem.fault.code, str(problem.at), problem.fault.what) for problem in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.0E+5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("on", "on"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("2026-11-22", "2026-11-22"),
        ("-.inf", -math.inf),
        ("+.INF", math.inf),
        ("=", "="),
        ("!!str 1", "1"),
        ("'1'", "1"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number():
    assert math.isnan(read("a: .NaN")["a"])


def test_every_value_and_key_knows_its_place():
    root = parse("run: {seed: 7}\nlist:\n- 1\n-  'two'\n", "a.yaml", [])
    seed = root.find(("run", "seed"))
    assert (str(seed.at), seed.at.width) == ("a.yaml:1:13", 1)
    assert (str(seed.key), seed.key.width) == ("a.yaml:1:7", 4)
    assert str(root.find(("list", 1)).at) == "a.yaml:4:4"
    assert root.find(("list", 1)).at.text == "-  'two'"


def test_an_empty_document_is_an_empty_section():
    assert read("") == read("# nothing\n") == {}


def test_a_duplicate_key_is_refused_at_the_second_place():
    assert faults("a: 1\nb: {c: 1, c: 2}\na: 3") == [
        ("SL106", "a.yaml:2:11", "duplicate key 'c', first at line 2"),
        ("SL106", "a.yaml:3:1", "duplicate key 'a', first at line 1"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [ls]",
        "a: !!python/name:os.system",
        "a: !!binary aGk=",
        "a: !!timestamp 2026-01-01",
        "a: !mine 1",
        "a: !!set {x}",
        "a: !!int abc",
        "a: !!float abc",
        "a: !!bool 3",
        "a: " + "9" * 5000,
        "1: x",
        "null: x",
        "? [a]\n: x",
        "a: &x {b: 1}\nc:\n  <<: *x",
        "a: [1",
        "a: {b",
        "a: 1\n---\nb: 2",
        "a: *nowhere",
        "\ta: 1",
        "a: '\x07'",
        'a: "\\UFFFFFFFF"',
        "%YAML 9.9\n---\na: 1",
        "@",
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_a_place(text):
    (found,) = faults(text)
    assert found[0] == "SL107"
    assert found[1].startswith("a.yaml:")


def test_an_alias_is_read_and_a_bomb_of_aliases_is_refused_quickly():
    assert read("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 6)]
    start = time.perf_counter()
    assert [code for code, _, what in faults("\n".join(lines))] == ["SL107"]
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "a: &a {b: *a}", "a: " + "[" * 5000, "[" * 65 + "]" * 65, "- " * 500 + "x"]
)
def test_what_is_too_deep_or_holds_itself_is_refused(text):
    assert [code for code, _, what in faults(text) if "deeper than 64" in what] == ["SL107"]


def test_too_many_values_are_refused():
    assert "more than 10,000" in faults("[" + "1," * (MAX_NODES + 1) + "]")[0][2]


def test_the_value_of_an_override_knows_its_column():
    node = parse_value("[1, x]", "command line", "a.b=[1, x]", [])
    assert (node.find((1,)).at.column, str(node.at)) == (9, "command line")
    assert parse_value("", "command line", "a.b=", []).value is None
    problems = []
    assert parse_value("[1", "command line", "a.b=[1", problems) is None
    assert problems[0].at.text == "a.b=[1"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.text(min_size=1).filter(lambda key: key != "<<"), plain, max_size=5))
def test_what_is_written_is_read_back(data):
    data = without_merge_keys(data)
    assert read(to_yaml(data)) == data
    line = to_yaml(data, one_line=True)
    assert read(line) == data


def without_merge_keys(value):
    if isinstance(value, dict):
        return {key: without_merge_keys(inner) for key, inner in value.items() if key != "<<"}
    return [without_merge_keys(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("text", ["1e-3", "on", "0o7", "1:30", "null", "=", "2026-11-22", ".inf", "0x1", "yes", "1_0"])
def test_text_that_looks_like_something_else_is_quoted(text):
    assert read(to_yaml({"a": text})) == {"a": text}
    assert "'" in to_yaml({"a": text})


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_bytes_are_loaded_or_refused_and_nothing_else(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("fuzz") / "a.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load(path, environment={})
    str(caught.value).encode()


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet="{}[]:,-?&*!|>'\"%@`#\n ab1.\\xu~\t=<\x85\u2028", max_size=60))
def test_punctuation_is_read_or_refused_and_nothing_else(text):
    problems = []
    node = parse(text, "a.yaml", problems)
    assert node is not None or problems
