"""The folder of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

from safeloop.faults import FaultError
from safeloop.folder import make_run_folder, save_weights, write_text


def test_a_second_run_of_a_name_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [make_run_folder(tmp_path / "runs", "digits") for _ in range(3)]
    assert [folder.name for folder in folders] == ["digits", "digits-2", "digits-3"]
    assert folders[0].stat().st_mode & 0o777 == 0o700


def test_a_root_that_is_a_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.write_text("mine")
    with pytest.raises(FaultError) as caught:
        make_run_folder(root, "digits")
    assert (caught.value.fault.code, caught.value.exit_code) == ("SL856", 6)
    assert root.read_text() == "mine"


def test_a_text_is_private_and_never_written_over(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.txt", "one")
    assert (tmp_path / "plan.txt").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "plan.txt", "two")


def test_saved_weights_are_loaded_bitwise_tied_ones_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "n": nn.BatchNorm1d(3)})
    model["b"].weight = model["a"].weight
    path = save_weights(model, tmp_path, 7)
    save_weights(model, tmp_path, 8)
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "n": nn.BatchNorm1d(3)})
    other["b"].weight = other["a"].weight
    load_model(other, path)
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
