"""Real data that comes with installed packages: nothing is downloaded."""

from __future__ import annotations

from typing import Literal

import torch
from torch.utils.data import TensorDataset

_SPLIT_SEED = 1797
_TRAIN_FRACTION = 0.8


class Digits(TensorDataset):
    """The UCI handwritten digits: 1,797 images of 8 x 8 pixels, 1,437 for training and 360 for testing.

    The split is fixed.     A sample is (image, label): float32 [1, 8, 8] in 0..1 ([64] when `flat`), and int64 0..9.

    Raises:
        ModuleNotFoundError: without scikit-learn, which holds them (the extra `examples`).
        ValueError: when `split` is another word.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
    its test part.
    """

    def __init__(self, split: Literal["train", "test"] = "train", flat: bool = False) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}; it can be 'train' or 'test'")
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Digits needs scikit-learn: pip install 'safeloop[examples]'", name=error.name
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        shape = (-1, 64) if flat else (-1, 1, 8, 8)
        images = torch.tensor(pixels, dtype=torch.float32, device="cpu").div_(16).reshape(shape)
        generator = torch.Generator().manual_seed(_SPLIT_SEED)
        order = torch.randperm(len(images), generator=generator, device="cpu")
        num_train = int(len(images) * _TRAIN_FRACTION)
        chosen = order[:num_train] if split == "train" else order[num_train:]
        super().__init__(images[chosen], torch.tensor(labels, dtype=torch.int64, device="cpu")[chosen])
