from __future__ import annotations

import subprocess
import sys

import torch

from safeloop.autograd.names import ParameterNames
from safeloop.autograd.sites import Site, code_site, user_code, user_site
from safeloop.autograd.writes import Write, WriteLog, storage_pointer

PLACE = Site("net.py", 3, "f")


def test_writes_are_found_by_the_storage_that_they_share():
    log, x = WriteLog(), torch.zeros(6)
    log.note(x[2:].data, "Tensor.mul_", PLACE)
    log.note(x.view(2, 3), "numpy()", None)
    assert log.since(storage_pointer(x), 0) == (Write("Tensor.mul_", PLACE), Write("numpy()", None))
    assert log.since(storage_pointer(x), 1) == (Write("numpy()", None),)
    assert log.since(storage_pointer(torch.zeros(6)), 0) == ()


def test_a_write_in_a_loop_is_told_once():
    log, x = WriteLog(), torch.zeros(6)
    for _ in range(3):
        log.note(x, "Tensor.mul_", PLACE)
    assert log.since(storage_pointer(x), 0) == (Write("Tensor.mul_", PLACE),)
    assert log.count == 3


def test_a_cleared_log_counts_on():
    log, x = WriteLog(), torch.zeros(6)
    log.note(x, "Tensor.mul_", PLACE)
    log.clear()
    assert log.since(storage_pointer(x), 0) == ()
    assert log.count == 1


def test_what_has_no_storage_is_not_noted():
    log = WriteLog()
    log.note(torch.empty(3, device="meta"), "Tensor.mul_", PLACE)
    assert log.count == 0


def test_a_sparse_tensor_has_the_storage_of_its_values():
    x = torch.eye(3).to_sparse()
    assert storage_pointer(x) == storage_pointer(x._values()) != 0


def test_the_innermost_line_outside_of_torch_and_safeloop_is_found_from_inside_of_torch():
    seen = []
    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(user_site()) or t.detach(), lambda t: t):
        torch.nn.Softplus()(x)
    assert {line.path for line in seen} == {__file__}
    assert code_site(user_code()).name.endswith(
        "test_the_innermost_line_outside_of_torch_and_safeloop_is_found_from_inside_of_torch"
    )


def test_code_that_is_in_no_file_is_not_the_users():
    script = "import torch; from safeloop.autograd.sites import user_site; assert user_site() is None"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_parameter_is_named_by_identity_or_by_the_memory_it_shares():
    flat = torch.zeros(10)
    first, second = torch.nn.Parameter(flat[:4]), torch.nn.Parameter(flat[4:])
    names = ParameterNames({"first": first, "second": second})
    assert names.of(first) == "first"
    assert names.of(second.t()) == names.of(flat[6:]) == "second"
    assert names.of(torch.zeros(4)) == ""
    assert names.of(torch.zeros(4), origin=second) == "second"
