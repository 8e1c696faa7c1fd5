"""Mutations of a valid config are loaded or refused with a ConfigError; nothing else ever comes out."""

from __future__ import annotations

import copy

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from safeloop.config import ConfigError, load

TEXT = """\
run: {name: digits, max_steps: 100, seed: 1, device: cpu}
model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
data: {train: {target: "torch.utils.data:TensorDataset"}, batch_size: 64}
optimizers:
  main: {type: AdamW, lr: 0.001, betas: [0.9, 0.99], max_norm: 1.0, groups: [{params: [a], lr: 1.0}]}
  other: {type: SGD, params: rest, scheduler: {type: OneCycleLR, max_lr: [1.0, 2.0], total_steps: 5}}
losses: {ce: {type: CrossEntropyLoss, inputs: [output, batch.1]}, own: {target: "torch.nn:L1Loss"}, w: {weight: 2.0}}
metrics: {m: {target: "torch.nn:L1Loss", inputs: [output]}}
audit: {accept: {SL206: [a]}}
log: {sinks: [console, {type: jsonl}], grad_norms: [total]}
"""
BASE = yaml.safe_load(TEXT)


def paths(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*path, key))


PATHS = list(paths(BASE))[1:]
WORDS = st.sampled_from(
    ["type", "target", "args", "AdamW", "SGD", "main", "declared", "[key]", "params", "rest", "0", "<<", "lr"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(PATHS), st.sampled_from(["set", "drop", "add", "rename"]), WORDS, VALUES),
    min_size=1,
    max_size=3,
)


def mutated(mutations):
    config = copy.deepcopy(BASE)
    for path, how, word, value in mutations:
        try:
            parent = config
            for part in path[:-1]:
                parent = parent[part]
            if how == "set":
                parent[path[-1]] = value
            elif how == "drop":
                del parent[path[-1]]
            elif how == "add":
                parent[path[-1]][word] = value
            else:
                parent[word] = parent.pop(path[-1])
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    return config


def loads_or_refuses(*args, **options):
    try:
        loaded = load(*args, environment={}, **options)
    except ConfigError as error:
        str(error).encode()
        assert error.problems
        return
    assert load(sections=loaded.config.written(), environment={}, **options).config == loaded.config


@settings(deadline=None, max_examples=250)
@given(MUTATIONS)
def test_a_mutated_config_is_loaded_or_refused(mutations):
    loads_or_refuses(sections=mutated(mutations), allow_modules=["torch.utils.data"])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 30), st.text(max_size=4))
def test_a_text_with_a_hole_or_a_splinter_is_loaded_or_refused(tmp_path_factory, start, length, splinter):
    path = tmp_path_factory.mktemp("fuzz") / "a.yaml"
    path.write_text(TEXT[:start] + splinter + TEXT[start + length :], encoding="utf-8", errors="surrogatepass")
    loads_or_refuses(path, allow_modules=["torch.utils.data"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(max_size=20), max_size=3), st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=3)
)
def test_overrides_and_variables_are_loaded_or_refused(overrides, environment):
    variables = {f"SAFELOOP__{name}": value for name, value in environment.items()}
    try:
        load(sections=BASE, overrides=overrides, environment=variables, allow_modules=["torch.utils.data"])
    except ConfigError as error:
        str(error).encode()
