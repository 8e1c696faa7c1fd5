"""Norms: torch's bits where tensors are alike, right values where they are not, and no overflow in the exact one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.utils import get_total_norm

from safeloop.autograd.norms import are_uniform, each_norm, exact_norm


def some(n: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3 + i, 4, generator=generator).to(dtype) for i in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [True, False])
def test_the_norm_of_the_norms_has_the_bits_of_torch(dtype: torch.dtype, uniform: bool) -> None:
    gradients = some(dtype=dtype)
    ours = torch.linalg.vector_norm(each_norm(gradients, uniform=uniform))
    assert torch.equal(ours, get_total_norm(gradients))


def test_sparse_and_mixed_gradients_have_the_norm_of_their_entries() -> None:
    index = torch.tensor([[0, 0, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = torch.sparse_coo_tensor(index, torch.ones(3, 2), (4, 2))
    found = each_norm([sparse, torch.ones(9, dtype=torch.bfloat16)])
    assert found.tolist() == pytest.approx([sparse.to_dense().norm().item(), 3.0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_one_bad_entry_makes_the_norm_non_finite(poison: float) -> None:
    gradients = some()
    gradients[3][1, 2] = poison
    assert not each_norm(gradients).isfinite().all()


def test_a_huge_finite_gradient_overflows_float32_but_not_the_exact_norm() -> None:
    gradients = [torch.full((4,), 1e30)]
    assert not each_norm(gradients).isfinite().all()
    assert exact_norm(gradients).item() == pytest.approx(2e30)


def test_uniform_means_dense_one_device_one_dtype() -> None:
    assert are_uniform(some())
    assert not are_uniform([*some(1), *some(1, torch.float64)])
