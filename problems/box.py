"""Family B: a lower level with bounds, whose solution is a clipped linear map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel import InputError, Problem, Solution
from bilevel.fields import out_of_range


@dataclass(frozen=True, kw_only=True)
class Box(Problem):
    """g = |y - Bx|^2/2 over |y_i| <= bound, and f = |y - c|^2/2, float64.

        y*(x) = clip(Bx),    dF = B'(inside * (y* - c))

    with inside_i = 1 where |(Bx)_i| < bound, else 0. F has kinks where (Bx)_i = bound. The forward
    penalty estimate is dF/(1 + nu) exactly while no bound becomes active or inactive. The lower
    level is constrained, so implicit differentiation refuses it.
    """

    dim_x: int = 3
    """Upper variables."""
    dim_y: int = 5
    """Lower variables."""
    bound: float = 1.0
    """Largest size of an entry of y."""
    data_seed: int = 0
    """Of the random B and c."""

    def __post_init__(self) -> None:
        ranges = {"dim_x": "at least 1", "dim_y": "at least 1", "bound": "positive"}
        if faults := out_of_range("problem", self, **ranges):
            raise InputError(faults)

    def data(self) -> dict[str, Tensor]:
        """The matrix B [dim_y, dim_x] and the target c [dim_y]."""
        return _data(self.dim_x, self.dim_y, self.data_seed)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.zeros(self.dim_x, dtype=torch.float64)
        return start, torch.zeros(self.dim_y, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (y - self.data()["B"] @ x).square().sum()

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (y - self.data()["c"]).square().sum()

    def project_lower(self, y: Tensor) -> Tensor:
        return y.clamp(-self.bound, self.bound)

    def solution(self) -> Solution:
        d = self.data()

        def lower(x: Tensor) -> Tensor:
            return self.project_lower(d["B"] @ x)

        def hypergradient(x: Tensor) -> Tensor:
            inside = (d["B"] @ x).abs() < self.bound
            return d["B"].T @ (inside * (lower(x) - d["c"]))

        return Solution(lower=lower, hypergradient=hypergradient)


@lru_cache(maxsize=64)
def _data(dim_x: int, dim_y: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(dim_y, dim_x, generator=generator, dtype=torch.float64)
    return {"B": B, "c": torch.randn(dim_y, generator=generator, dtype=torch.float64)}
