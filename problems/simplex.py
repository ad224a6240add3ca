"""Family D: a lower level on the simplex, whose solution is the projection of a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel import InputError, Problem, Solution, projection
from bilevel.fields import out_of_range


@dataclass(frozen=True, kw_only=True)
class Simplex(Problem):
    """g = |y - Bx|^2/2 over y >= 0, sum y = 1, and f = |y - c|^2/2, float64.

        y*(x) = proj(Bx),    dF = B' (I_s - 1_s 1_s'/|s|) (y* - c),    s = {i: y*_i > 0}

    F has kinks where the support s changes. The forward penalty estimate is dF/(1 + nu) exactly
    while it does not. The lower level is constrained, so implicit differentiation refuses it.
    """

    dim_x: int = 3
    """Upper variables."""
    dim_y: int = 5
    """Lower variables."""
    data_seed: int = 0
    """Of the random B and c."""

    def __post_init__(self) -> None:
        if faults := out_of_range("problem", self, dim_x="at least 1", dim_y="at least 1"):
            raise InputError(faults)

    def data(self) -> dict[str, Tensor]:
        """The matrix B [dim_y, dim_x] and the target c [dim_y], inside the simplex."""
        return _data(self.dim_x, self.dim_y, self.data_seed)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.zeros(self.dim_x, dtype=torch.float64)
        return start, torch.full((self.dim_y,), 1 / self.dim_y, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (y - self.data()["B"] @ x).square().sum()

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (y - self.data()["c"]).square().sum()

    def project_lower(self, y: Tensor) -> Tensor:
        return projection.simplex(y)

    def solution(self) -> Solution:
        d = self.data()

        def lower(x: Tensor) -> Tensor:
            return self.project_lower(d["B"] @ x)

        def hypergradient(x: Tensor) -> Tensor:
            y = lower(x)
            s = y > 0
            r = s * (y - d["c"])
            return d["B"].T @ (r - s * r.sum() / s.sum())

        return Solution(lower=lower, hypergradient=hypergradient)


@lru_cache(maxsize=64)
def _data(dim_x: int, dim_y: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(dim_y, dim_x, generator=generator, dtype=torch.float64)
    return {"B": B, "c": torch.randn(dim_y, generator=generator, dtype=torch.float64).softmax(0)}
