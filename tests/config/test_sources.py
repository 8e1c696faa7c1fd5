from __future__ import annotations

import os

import pytest

from safeloop.config import ConfigError, load
from safeloop.config.sources import MAX_FILES

HAVE = ["model", "data", "trainer"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Writes files of the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_what_is_nearer_wins_and_every_value_keeps_its_origin(here):
    here(
        base="run: {seed: 1, max_steps: 1, max_epochs: 1, name: base}\noptimizers: {main: {type: SGD, lr: 0.1}}\n",
        a="extends: base.yaml\nrun: {seed: 2, max_epochs: 2}\n",
    )
    loaded = load(
        "a.yaml",
        environment={"SAFELOOP__RUN__MAX_STEPS": "3", "SAFELOOP__RUN__MAX_EPOCHS": "3", "SAFELOOP_OTHER": "x"},
        overrides=["run.max_epochs=4", "optimizers.main.lr=1e-2"],
        sections={"run": {"name": "code"}, "log": {"every": 5}},
        given=HAVE,
    )
    run = loaded.config.run
    assert (run.seed, run.max_steps, run.max_epochs, run.name) == (2, 3, 4, "code")
    assert loaded.config.optimizers["main"].lr == 1e-2
    assert loaded.where("run.seed") == "a.yaml:2:13"
    assert loaded.where("run.max_steps") == "SAFELOOP__RUN__MAX_STEPS"
    assert loaded.where("run.max_epochs") == "command line"
    assert loaded.where(("run", "name")) == "keyword run"
    assert loaded.where("optimizers.main.type") == "base.yaml:2:27"
    assert loaded.where("run.device") == ""
    assert loaded.where("log.every") == "keyword log"


def test_extended_files_are_laid_left_to_right(here):
    here(
        a="run: {max_steps: 1, seed: 1}",
        b="run: {max_steps: 2}",
        c="extends: [a.yaml, b.yaml]\noptimizers: {type: SGD}",
    )
    run = load("c.yaml", environment={}, given=HAVE).config.run
    assert (run.max_steps, run.seed) == (2, 1)


def test_extends_is_relative_to_the_file_that_names_it(here):
    root = here(a="extends: sub/b.yaml")
    (root / "sub").mkdir()
    (root / "sub" / "b.yaml").write_text("extends: ../c.yaml\nrun: {seed: 3}")
    here(c="run: {max_steps: 1}\noptimizers: {type: SGD}")
    loaded = load(root / "a.yaml", environment={}, given=HAVE)
    assert (loaded.config.run.seed, loaded.where("run.seed")) == (3, "sub/b.yaml:2:13")


@pytest.mark.parametrize("tag", ["type: Adam", 'target: "torch.nn:Linear"'])
def test_another_type_or_target_replaces_the_whole_block(here, tag):
    here(
        base="run: {max_steps: 1}\noptimizers: {main: {type: SGD, momentum: 0.9, max_norm: 1.0}}\n"
        'model: {target: "torch.nn:Identity", args: {in_features: 3}}',
        a="extends: base.yaml\noptimizers: {main: {type: Adam}}\n"
        'model: {target: "torch.nn:Linear", args: {in_features: 1, out_features: 1}}',
    )
    loaded = load("a.yaml", environment={}, given=["data", "trainer"])
    main = loaded.config.optimizers["main"]
    assert (main.type, main.max_norm, main.arguments()) == ("Adam", None, {})
    assert loaded.config.model.args == {"in_features": 1, "out_features": 1}


def test_the_same_type_is_merged(here):
    here(
        base="run: {max_steps: 1}\noptimizers: {main: {type: SGD, momentum: 0.9}}",
        a="extends: base.yaml\noptimizers: {main: {type: SGD, lr: 0.5}}",
    )
    assert load("a.yaml", environment={}, given=HAVE).config.optimizers["main"].arguments() == {
        "lr": 0.5,
        "momentum": 0.9,
    }


def test_overrides_of_another_type_hold_in_any_order(here):
    here(a="run: {max_steps: 1}\noptimizers: {main: {type: AdamW, betas: [0.5, 0.5]}}")
    for overrides in (["optimizers.main.lr=0.5", "optimizers.main.type=SGD"], ["optimizers.main={type: SGD, lr: 0.5}"]):
        main = load("a.yaml", environment={}, overrides=overrides, given=HAVE).config.optimizers["main"]
        assert (main.type, main.arguments()) == ("SGD", {"lr": 0.5})


def test_one_nameless_optimizer_is_called_main_in_every_layer(here):
    here(
        base="run: {max_steps: 1}\noptimizers: {type: SGD, lr: 0.1}",
        a="extends: base.yaml\noptimizers: {lr: 0.2}",
    )
    loaded = load("a.yaml", environment={}, overrides=["optimizers.momentum=0.9"], given=HAVE)
    assert loaded.config.optimizers["main"].arguments() == {"lr": 0.2, "momentum": 0.9}
    loaded = load("a.yaml", environment={}, overrides=["optimizers.main.lr=0.3"], given=HAVE)
    assert loaded.config.optimizers["main"].lr == 0.3
    loaded = load("a.yaml", environment={}, sections={"optimizers": {"type": "Adam"}}, given=HAVE)
    assert loaded.config.optimizers["main"].type == "Adam"


def test_a_named_optimizer_can_join_a_nameless_one(here):
    here(a="run: {max_steps: 1}\noptimizers: {type: SGD, params: ['a.*']}")
    found = load(
        "a.yaml", environment={}, sections={"optimizers": {"b": {"type": "Adam", "params": "rest"}}}, given=HAVE
    )
    assert list(found.config.optimizers) == ["main", "b"]


def test_an_override_sets_one_item_of_a_list(here):
    here(a="run: {max_steps: 1}\noptimizers: {type: Adam, betas: [0.9, 0.99]}")
    loaded = load("a.yaml", environment={}, overrides=["optimizers.main.betas.0=0.5"], given=HAVE)
    assert loaded.config.optimizers["main"].betas == (0.5, 0.99)
    assert loaded.where("optimizers.main.betas.0") == "command line"


def test_a_variable_in_capitals_finds_the_key_as_it_is_spelled(here):
    here(a="run: {max_steps: 1}\noptimizers: {Critic: {type: SGD, scheduler: {type: CosineAnnealingLR}}}")
    environment = {"SAFELOOP__OPTIMIZERS__CRITIC__SCHEDULER__T_MAX": "7"}
    assert load("a.yaml", environment=environment, given=HAVE).config.optimizers["Critic"].scheduler.T_max == 7


def test_the_process_environment_is_read_by_default(here, monkeypatch):
    here(a="run: {max_steps: 1}\noptimizers: {type: SGD}")
    monkeypatch.setenv("SAFELOOP__RUN__SEED", "5")
    assert os.environ["SAFELOOP__RUN__SEED"] == "5"
    assert load("a.yaml", given=HAVE).config.run.seed == 5


@pytest.mark.parametrize(
    ("options", "code", "where", "caret"),
    [
        ({"overrides": ["run.sed=1"]}, "SL101", "command line (run.sed)", "^^^^^^^"),
        ({"overrides": ["run.seed=x"]}, "SL103", "command line (run.seed)", "         ^"),
        ({"overrides": ["run.seed"]}, "SL109", "command line", "^^^^^^^^"),
        ({"overrides": ["run..seed=1"]}, "SL109", "command line", "^^^^^^^^^"),
        ({"overrides": ["--run.seed=1"]}, "SL109", "command line", "^^^^^^^^^^"),
        ({"overrides": ["=1"]}, "SL109", "command line", "^"),
        ({"overrides": [".".join("a" * 100) + "=1"]}, "SL109", "command line", "^"),
        ({"overrides": ["run.seed=[1"]}, "SL107", "command line", " " * 11 + "^"),
        ({"overrides": ["extends=b.yaml"]}, "SL101", "command line (extends)", "^^^^^^^"),
        ({"environment": {"SAFELOOP__RUN__SED": "1"}}, "SL101", "SAFELOOP__RUN__SED (run.sed)", "^" * 18),
        ({"environment": {"SAFELOOP__RUN__SEED": "-5"}}, "SL104", "SAFELOOP__RUN__SEED (run.seed)", " " * 20 + "^^"),
        ({"environment": {"SAFELOOP__RUN____SEED": "5"}}, "SL109", "SAFELOOP__RUN____SEED", "^"),
        ({"sections": {"run": {"sed": 1}}}, "SL101", "keyword run (run.sed)", "^^^^^^^"),
        ({"sections": {"run": {"seed": "1"}}}, "SL103", "keyword run (run.seed)", " " * 11 + "^^^"),
        ({"sections": {"rum": {"seed": 1}}}, "SL101", "keyword rum (rum)", "^^^"),
        ({"sections": {"run": 3}}, "SL103", "keyword run (run)", "      ^"),
    ],
)
def test_what_is_wrong_outside_of_files_is_shown_with_a_caret_too(here, options, code, where, caret):
    here(a="run: {max_steps: 1}\noptimizers: {type: SGD}")
    with pytest.raises(ConfigError) as caught:
        load("a.yaml", **{"environment": {}, **options}, given=HAVE)
    assert (caught.value.fault.code, caught.value.fault.where) == (code, where)
    assert f"  | {caret}" in str(caught.value)


def test_a_keyword_that_holds_itself_is_refused():
    loop = {}
    loop["a"] = loop
    with pytest.raises(ConfigError, match="deeper than 64"):
        load(sections={"model": loop}, environment={})


def test_missing_files_are_named_with_the_nearest_one(here):
    here(digits="run: {max_steps: 1}", a="run: {max_steps: 1}\nextends: [digit.yaml, nowhere/x.yaml]")
    with pytest.raises(ConfigError) as caught:
        load("digit.yaml", environment={})
    assert caught.value.fault.code == "SL108"
    assert "did you mean digits.yaml?" in caught.value.fault.fix
    with pytest.raises(ConfigError) as caught:
        load("a.yaml", environment={})
    assert [(p.fault.code, str(p.at)) for p in caught.value.problems] == [
        ("SL108", "a.yaml:2:11"),
        ("SL108", "a.yaml:2:23"),
    ]


@pytest.mark.parametrize("name", [".", "nul\0.yaml", "/dev/zero", "x" * 300 + ".yaml"])
def test_what_is_no_regular_file_is_refused(here, name):
    here()
    with pytest.raises(ConfigError) as caught:
        load(name, environment={})
    assert caught.value.fault.code == "SL108"


def test_a_circle_of_files_is_refused(here):
    here(a="extends: b.yaml\nrun: {max_steps: 1}", b="extends: a.yaml")
    with pytest.raises(ConfigError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml") as caught:
        load("a.yaml", environment={})
    assert caught.value.fault.where == "b.yaml:1:10 (extends)"


def test_files_that_multiply_are_refused(here):
    texts = {f"f{i}": f"extends: [f{i + 1}.yaml, f{i + 1}.yaml, f{i + 1}.yaml]" for i in range(12)}
    here(**texts, f12="run: {max_steps: 1}")
    with pytest.raises(ConfigError, match=f"more than {MAX_FILES} files"):
        load("f0.yaml", environment={})


@pytest.mark.parametrize("extends", ["3", "[3]", "{a: b}", "true"])
def test_extends_names_files(here, extends):
    here(a=f"extends: {extends}\nrun: {{max_steps: 1}}\noptimizers: {{type: SGD}}")
    with pytest.raises(ConfigError) as caught:
        load("a.yaml", environment={}, given=HAVE)
    assert caught.value.fault.code == "SL103"


def test_a_file_that_is_no_section_too_large_or_not_text_is_refused(here):
    root = here(a="- 1", big="# " + "x" * 1_000_001)
    (root / "latin.yaml").write_bytes(b"run: {}\nname: caf\xe9\n")
    for name, code, place in (
        ("a", "SL103", "a.yaml:1:1"),
        ("big", "SL107", "big.yaml"),
        ("latin", "SL107", "latin.yaml:2:10"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(f"{name}.yaml", environment={})
        assert (caught.value.fault.code, caught.value.fault.where.split(" ")[0]) == (code, place)


def test_a_byte_order_mark_does_not_shift_columns(here):
    root = here()
    (root / "a.yaml").write_bytes(b"\xef\xbb\xbfrun: {seed: x}")
    with pytest.raises(ConfigError, match=r"a\.yaml:1:13"):
        load("a.yaml", environment={})
