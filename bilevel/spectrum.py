"""The extreme eigenvalues of a symmetric matrix of which only products are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.tree import flatten, unflatten


def extremes(
    matvec: Callable[[list[Tensor]], list[Tensor]], like: Sequence[Tensor], *, steps: int = 20
) -> tuple[float, float]:
    """The least and the largest eigenvalue, by Lanczos steps with full orthogonalization.

    Exact in as many steps as there are distinct eigenvalues. Short of that each Ritz value is moved
    outward by the norm of its residual, within which there is an eigenvalue, though not always the
    extreme one; the least by at most half of itself. Holds `steps` vectors in float64.

    Args:
        matvec: v -> H v.
        like: Tensors of the shape of v.
        steps: Most products.

    Raises:
        NonFiniteError: If a product is not finite.

    >>> spectrum = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    >>> low, high = extremes(lambda v: [spectrum * v[0]], [torch.zeros_like(spectrum)])
    >>> round(low, 9), round(high, 9)
    (1.0, 5.0)
    """

    def apply(flat: Tensor) -> Tensor:
        return flatten(matvec(unflatten(flat, like))).double().cpu()

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(t.numel() for t in like), generator=generator, dtype=torch.float64)
    basis, diagonal, beside = [q / q.norm()], [], []
    while True:
        image = apply(basis[-1])
        if not bool(image.isfinite().all()):
            raise NonFiniteError("a product with a second derivative is not finite")
        diagonal.append(float(basis[-1] @ image))
        rows = torch.stack(basis)
        for _ in range(2):  # one pass leaves rounding of the size of the eigenvalues
            image = image - rows.T @ (rows @ image)
        rest = float(image.norm())
        scale = max(map(abs, [*diagonal, *beside]))
        done = len(basis) == len(q) or not rest > 1e-12 * scale
        if done or len(basis) >= steps:
            break
        beside.append(rest)
        basis.append(image / rest)
    side = torch.tensor(beside, dtype=torch.float64)
    center = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(center + torch.diag(side, 1) + torch.diag(side, -1))
    off = torch.zeros_like(values) if done else rest * vectors[-1].abs()
    low, high = float(values[0]), float(values[-1])
    return low - min(float(off[0]), abs(low) / 2), high + float(off[-1])
