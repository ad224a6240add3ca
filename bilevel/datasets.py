"""Real data that ships with scikit-learn, as float64 tensors; nothing is downloaded."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

MISSING = (
    "this problem's data ships with scikit-learn; install it: pip install 'bilevel[examples]'."
)


def missing() -> list[str]:
    """What to install before data can be read, nothing if all is there."""
    return [] if find_spec("sklearn") else [MISSING]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits: pixels [n, 64] in [0, 1] and labels [n].

    Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float64) / 16, torch.tensor(labels)


@lru_cache(maxsize=1)
def photographs() -> list[Tensor]:
    """The two photographs, a temple and a flower, in gray: two images [427, 640] in [0, 1]."""
    from sklearn.datasets import load_sample_images

    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # ITU-R BT.601
    images = load_sample_images()["images"]
    return [torch.tensor(image, dtype=torch.float64) @ luma / 255 for image in images]


def split(count: int, sizes: tuple[int, ...], seed: int) -> list[Tensor]:
    """Disjoint random index sets of the given sizes, and one more with the rest.

    >>> [len(part) for part in split(10, (3, 2), seed=0)]
    [3, 2, 5]
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order.split([*sizes, count - sum(sizes)]))
