from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from safeloop.faults import FaultError
from safeloop.target import DEFAULT_MODULES, TargetSpec, allowed_modules, argument_faults, resolve_target

HOSTILE = [
    "os:system",
    "subprocess:Popen",
    "builtins:eval",
    "builtins:exec",
    "builtins:__import__",
    "torch.hub:load",
    "torch:load",
    "torch.nn:Module.load_state_dict",
    "torch.nn.modules.module:os",
    "torch.nn.functional:relu",
    "torch.nn:_reduction",
    "torch.nn._reduction:get_enum",
    "torch.nn:__builtins__",
    "torch.nn.modules.module:OrderedDict",
    "torch.nnevil:Linear",
    "torch.nn.:Linear",
    ".torch.nn:Linear",
    "torch/nn:Linear",
    "torch.nn:Linear:Linear",
    "torch.nn:",
    ":Linear",
    "torch.nn",
    "",
    "torch.nn :Linear",
    "torch.nn:Linear()",
    "torch.nn:Linear\n",
    "torch.nn:lambda",
    "tｏrch.nn:Linear",
    "../evil:Linear",
    "safeloop.target:importlib",
]


@pytest.mark.parametrize("target", HOSTILE)
def test_a_hostile_target_is_refused(target):
    with pytest.raises(FaultError) as caught:
        resolve_target(target, nn.Module, DEFAULT_MODULES)
    assert caught.value.fault.code in ("SL110", "SL111", "SL112")
    assert caught.value.exit_code == 2


def test_an_allowed_class_is_found():
    assert resolve_target("torch.nn:Linear", nn.Module, DEFAULT_MODULES) is nn.Linear
    assert resolve_target("torch.nn.modules.linear:Linear", (dict, nn.Module), DEFAULT_MODULES) is nn.Linear


def test_the_nearest_name_is_suggested():
    with pytest.raises(FaultError, match=r"torch\.nn:Linear'") as caught:
        resolve_target("torch.nn:Linaer", nn.Module, DEFAULT_MODULES)
    assert caught.value.fault.code == "SL111"
    with pytest.raises(FaultError, match=r"no module named 'torch\.nn\.modulez'"):
        resolve_target("torch.nn.modulez:Linear", nn.Module, DEFAULT_MODULES)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a pyproject.toml that allows `mine`, and files of that package; it is the current directory."""
    names = set(sys.modules)
    (tmp_path / "pyproject.toml").write_text('[tool.safeloop]\nallow_modules = ["mine", "loud"]\n')
    (tmp_path / "mine").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / "mine" / f"{name}.py").write_text(text)

    yield write
    for name in set(sys.modules) - names:
        if name.partition(".")[0] in ("mine", "loud"):
            del sys.modules[name]


def test_a_module_outside_the_list_is_not_even_imported(project):
    project(a="raise SystemExit('imported')")
    with pytest.raises(FaultError) as caught:
        resolve_target("mine.a:X", object, DEFAULT_MODULES)
    assert caught.value.fault.code == "SL110"
    assert "mine.a" not in sys.modules
    assert '"mine"' in caught.value.fault.fix


def test_the_pyproject_above_allows_modules_and_makes_its_folder_importable(project):
    project(net="from torch import nn\nclass Net(nn.Module):\n    pass\n")
    before = list(sys.path)
    allow = allowed_modules()
    assert allow == (*DEFAULT_MODULES, "mine", "loud")
    net = resolve_target("mine.net:Net", nn.Module, allow)
    assert issubclass(net, nn.Module)
    assert sys.path == before


def test_a_class_that_is_merely_imported_there_is_refused(project):
    project(a="from subprocess import Popen\nfrom logging import os\nimport torch.nn\nfrom torch.nn import Linear\n")
    allow = allowed_modules()
    with pytest.raises(FaultError, match="really lives in 'subprocess'") as caught:
        resolve_target("mine.a:Popen", object, allow)
    assert caught.value.fault.code == "SL110"
    with pytest.raises(FaultError) as caught:
        resolve_target("mine.a:os", object, allow)
    assert caught.value.fault.code == "SL112"
    assert resolve_target("mine.a:Linear", nn.Module, allow) is nn.Linear


def test_a_private_class_or_module_is_refused(project):
    project(a="class _Hidden:\n    pass\n", _b="class X:\n    pass\n")
    for target in ("mine.a:_Hidden", "mine._b:X"):
        with pytest.raises(FaultError, match="private") as caught:
            resolve_target(target, object, allowed_modules())
        assert caught.value.fault.code == "SL110"


def test_a_module_that_cannot_be_imported_says_why(project):
    project(broken="import nowhere_at_all\n", syntax="def\n", raising="raise ValueError('no data')\n")
    for name, reason in (("broken", "nowhere_at_all"), ("syntax", "SyntaxError"), ("raising", "no data")):
        with pytest.raises(FaultError, match=reason) as caught:
            resolve_target(f"mine.{name}:X", object, allowed_modules())
        assert caught.value.fault.code == "SL111"
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[tool.safeloop]\nallow_modules = 'mine'", "SL103"),
        ("[tool.safeloop]\nallow_modules = [1]", "SL103"),
        ("[tool", "SL107"),
    ],
)
def test_a_broken_pyproject_is_refused(tmp_path, text, code):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(FaultError) as caught:
        allowed_modules(start=tmp_path)
    assert caught.value.fault.code == code


def test_a_pyproject_without_our_table_allows_nothing(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\n")
    assert allowed_modules(["extra"], start=tmp_path) == (*DEFAULT_MODULES, "extra")


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"in_features": 3, "out_features": 2}, []),
        ([3, 2], []),
        ({"in_features": 3, "out_feature": 2}, ["out_feature"]),
        ({"in_features": 3}, [None]),
        ([3], [None]),
        ({"in_features": 3, "colour": 1}, ["colour", None]),
    ],
)
def test_arguments_are_bound_to_the_signature_first(args, found):
    faults = list(argument_faults(nn.Linear, args))
    assert [name for name, _ in faults] == found
    assert all(fault.code == "SL113" for _, fault in faults)


def test_wrong_arguments_are_refused_before_anything_is_built():
    with pytest.raises(FaultError, match="did you mean 'out_features'"):
        TargetSpec(target="torch.nn:Linear", args={"in_features": 1, "out_feature": 2}).build(
            nn.Module, DEFAULT_MODULES
        )


def test_nested_targets_are_built_first():
    layers = [{"target": "torch.nn:Linear", "args": [3, 2]}, {"target": "torch.nn:ReLU"}]
    net = TargetSpec(target="torch.nn:Sequential", args=layers).build(nn.Module, DEFAULT_MODULES)
    assert net(torch.ones(1, 3)).shape == (1, 2)
    with pytest.raises(FaultError, match="not allowed"):
        TargetSpec(target="torch.nn:Sequential", args=[{"target": "os:system", "args": ["ls"]}]).build(
            nn.Module, DEFAULT_MODULES
        )


def test_what_the_class_itself_raises_is_left_as_it_is():
    with pytest.raises(TypeError):
        TargetSpec(target="torch.nn:Linear", args={"in_features": "x", "out_features": 2}).build(
            nn.Module, DEFAULT_MODULES
        )


def test_a_slot_can_want_a_protocol():
    assert resolve_target("torch.nn:ModuleList", Iterable, DEFAULT_MODULES) is nn.ModuleList
    with pytest.raises(FaultError) as caught:
        resolve_target("torch.nn:Linear", Iterable, DEFAULT_MODULES)
    assert caught.value.fault.code == "SL112"
