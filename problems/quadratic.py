"""Family Q: quadratic lower and upper losses, with everything known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel import Problem, Solution


@dataclass(frozen=True, kw_only=True)
class Quadratic(Problem):
    """g = y'Ay/2 - y'(Bx + b) + |x|^2/2 and f = |Cy - c|^2/2 + x'Dy + rho |x - s|^2/2, float64.

    y*(x) = A^{-1}(Bx + b), r = C'(Cy* - c) + D'x, dF = rho(x - s) + Dy* + B'A^{-1}r.
    """

    dim_x: int = 3
    """Upper variables."""
    dim_y: int = 5
    """Lower variables."""
    condition: float = 10.0
    """Ratio of the extreme eigenvalues of A; the smallest is 1."""
    rho: float = 1.0
    """Curvature of the upper loss in x."""
    data_seed: int = 0
    """Of the random matrices."""

    def data(self) -> dict[str, Tensor]:
        """The matrices A, B, b, C, c, D, s."""
        return _data(self.dim_x, self.dim_y, self.condition, self.data_seed)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.zeros(self.dim_x, dtype=torch.float64)
        return start, torch.zeros(self.dim_y, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        d = self.data()
        return 0.5 * y @ d["A"] @ y - y @ (d["B"] @ x + d["b"]) + 0.5 * x @ x

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        d = self.data()
        fit = 0.5 * (d["C"] @ y - d["c"]).square().sum()
        return fit + x @ d["D"] @ y + 0.5 * self.rho * (x - d["s"]).square().sum()

    def solution(self) -> Solution:
        d = self.data()
        inverse = torch.linalg.inv(d["A"])

        def lower(x: Tensor) -> Tensor:
            return inverse @ (d["B"] @ x + d["b"])

        def hypergradient(x: Tensor) -> Tensor:
            y = lower(x)
            r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
            return self.rho * (x - d["s"]) + d["D"] @ y + d["B"].T @ inverse @ r

        zero = torch.zeros(self.dim_x, dtype=torch.float64)
        constant = hypergradient(zero)
        columns = [hypergradient(e) - constant for e in torch.eye(self.dim_x, dtype=torch.float64)]
        optimum = torch.linalg.solve(torch.stack(columns, dim=1), -constant)
        return Solution(x=optimum, lower=lower, hypergradient=hypergradient)


@lru_cache(maxsize=64)
def _data(n: int, m: int, condition: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(m, m)).Q
    spectrum = torch.linspace(1.0, condition, m, dtype=torch.float64)
    return {
        "A": basis @ torch.diag(spectrum) @ basis.T,
        "B": normal(m, n),
        "b": normal(m),
        "C": normal(m, m) / m**0.5,
        "c": normal(m),
        "D": 0.1 * normal(n, m),
        "s": normal(n),
    }
