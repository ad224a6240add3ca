"""Family S: data weighting in miniature, with penalty hypergradients known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel import Problem, Solution


@dataclass(frozen=True, kw_only=True)
class SoftmaxMixture(Problem):
    """g = sum_k p_k |y - m_k|^2/2 with p = softmax(x), f = |y - t|^2/2, float64.

    y*(x) = sum_k p_k m_k and dF_k = p_k (m_k - y*)'(y* - t). The forward penalty estimate is
    dF/(1 + nu), the central one dF/(1 - nu^2), exactly.
    """

    sources: int = 4
    """Number of centers m_k."""
    dim: int = 3
    """Dimension of y."""
    data_seed: int = 0
    """Of the random centers."""

    def centers(self) -> tuple[Tensor, Tensor]:
        """The centers m [sources, dim] and the target t [dim]."""
        return _centers(self.sources, self.dim, self.data_seed)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.zeros(self.sources, dtype=torch.float64)
        return start, torch.zeros(self.dim, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        m, _ = self.centers()
        return x.softmax(0) @ (0.5 * (y - m).square().sum(1))

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        _, t = self.centers()
        return 0.5 * (y - t).square().sum()

    def solution(self) -> Solution:
        m, t = self.centers()

        def lower(x: Tensor) -> Tensor:
            return x.softmax(0) @ m

        def hypergradient(x: Tensor) -> Tensor:
            y = lower(x)
            return x.softmax(0) * ((m - y) @ (y - t))

        return Solution(lower=lower, hypergradient=hypergradient)


@lru_cache(maxsize=64)
def _centers(sources: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(sources, dim, generator=generator, dtype=torch.float64)
    return m, m[0] + 0.1 * torch.randn(dim, generator=generator, dtype=torch.float64)
