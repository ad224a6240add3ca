"""Family N: a lower level that is not convex, yet has one minimizer that descent finds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel import InputError, Problem, Solution
from bilevel.fields import out_of_range


@dataclass(frozen=True, kw_only=True)
class NonconvexPL(Problem):
    """g = sum_i phi((y - Bx)_i), phi(t) = t^2 + 3 sin^2 t, f = |y - c|^2/2 + rho |x - s|^2/2.

        y*(x) = Bx,    H(y*) = 8 I,    dF = rho(x - s) + B'(y* - c)

    in float64. The curvature phi'' = 2 + 6 cos 2t is between -4 and 8, and g satisfies the
    Polyak-Lojasiewicz inequality |grad_y g|^2/2 >= 0.175 (g - min g). Away from y* conjugate
    gradients can meet negative curvature.
    """

    dim_x: int = 3
    """Upper variables."""
    dim_y: int = 5
    """Lower variables."""
    rho: float = 1.0
    """Curvature of the upper loss in x."""
    start: float = 2.0
    """Every entry of y at the start: beyond 0.96 from Bx = 0 the lower loss is not convex."""
    data_seed: int = 0
    """Of the random B, c and s."""

    def __post_init__(self) -> None:
        ranges = {"dim_x": "at least 1", "dim_y": "at least 1", "rho": "positive"}
        if faults := out_of_range("problem", self, **ranges):
            raise InputError(faults)

    def data(self) -> dict[str, Tensor]:
        """The matrix B [dim_y, dim_x], c [dim_y] and s [dim_x]."""
        return _data(self.dim_x, self.dim_y, self.data_seed)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.zeros(self.dim_x, dtype=torch.float64)
        return start, torch.full((self.dim_y,), self.start, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        t = y - self.data()["B"] @ x
        return (t.square() + 3 * t.sin().square()).sum()

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        d = self.data()
        return 0.5 * (y - d["c"]).square().sum() + 0.5 * self.rho * (x - d["s"]).square().sum()

    def solution(self) -> Solution:
        d = self.data()

        def lower(x: Tensor) -> Tensor:
            return d["B"] @ x

        def hypergradient(x: Tensor) -> Tensor:
            return self.rho * (x - d["s"]) + d["B"].T @ (lower(x) - d["c"])

        hessian = d["B"].T @ d["B"] + self.rho * torch.eye(self.dim_x, dtype=torch.float64)
        optimum = torch.linalg.solve(hessian, d["B"].T @ d["c"] + self.rho * d["s"])
        return Solution(x=optimum, lower=lower, hypergradient=hypergradient)


@lru_cache(maxsize=64)
def _data(dim_x: int, dim_y: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {"B": normal(dim_y, dim_x) / dim_y**0.5, "c": normal(dim_y), "s": normal(dim_x)}
