"""Family R: ridge regression whose strength is chosen on validation data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import InputError, Problem, Solution
from bilevel.fields import out_of_range

RANGE = (-12.0, 6.0)
"""Of log strengths searched for the best one: from no effect to almost no coefficients."""


@dataclass(frozen=True, kw_only=True)
class Ridge(Problem):
    """g = |Aw - a|^2/(2n) + sum_j e^{x_j} w_j^2/2 and f = |Vw - b|^2/(2n), float64.

    y = w, x one log strength, or one for each coefficient. With H = A'A/n + diag(e^x),

        y*(x) = H^{-1} A'a/n,    dF_j = -e^{x_j} y*_j (H^{-1} V'(Vy* - b)/n)_j

    and for one strength dF is the sum. There the singular values of A give y* for all x.
    """

    features: int = 8
    """Coefficients."""
    rows: int = 16
    """Training rows n, and as many validation rows."""
    noise: float = 1.0
    """Standard deviation of the noise in a and b."""
    strengths: Literal["one", "each"] = "one"
    """One strength for all coefficients, or each its own."""
    data_seed: int = 0
    """Of the random data."""

    def __post_init__(self) -> None:
        faults = out_of_range(
            "problem", self, features="at least 1", rows="at least 1", noise="non-negative"
        )
        if faults:
            raise InputError(faults)

    def data(self) -> dict[str, Tensor]:
        """A and V [rows, features], a and b [rows]."""
        return _data(self.features, self.rows, self.noise, self.data_seed)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = () if self.strengths == "one" else (self.features,)
        start = torch.zeros(shape, dtype=torch.float64)
        return start, torch.zeros(self.features, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        d = self.data()
        fit = 0.5 * (d["A"] @ y - d["a"]).square().mean()
        return fit + 0.5 * (x.exp() * y.square()).sum()

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        d = self.data()
        return 0.5 * (d["V"] @ y - d["b"]).square().mean()

    def solution(self) -> Solution:
        d = self.data()
        u, s, vt = torch.linalg.svd(d["A"], full_matrices=False)
        gram = d["A"].T @ d["A"] / self.rows

        def lower_one(x: Tensor) -> Tensor:
            return vt.T @ (s / (s.square() + self.rows * x.exp()) * (u.T @ d["a"]))

        def lower_each(x: Tensor) -> Tensor:
            return torch.linalg.solve(gram + x.exp().diag(), d["A"].T @ d["a"] / self.rows)

        lower = lower_one if self.strengths == "one" else lower_each

        def hypergradient(x: Tensor) -> Tensor:
            y = lower(x)
            r = d["V"].T @ (d["V"] @ y - d["b"]) / self.rows
            v = torch.linalg.solve(gram + x.exp().expand(self.features).diag(), r)
            each = -x.exp() * y * v
            return each.sum() if self.strengths == "one" else each

        optimum = self._best(lower_one) if self.strengths == "one" else None
        return Solution(x=optimum, lower=lower, hypergradient=hypergradient)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        return {"strength": float(x.detach().exp().mean())}

    def _best(self, lower: Any) -> Tensor | None:
        """The best single log strength, None if more or less is always better."""
        from scipy.optimize import minimize_scalar

        def value(x: float) -> float:
            at = torch.tensor(x, dtype=torch.float64)
            return float(self.upper(at, lower(at), None))

        grid = torch.linspace(*RANGE, 181, dtype=torch.float64)
        k = min(range(len(grid)), key=lambda i: value(float(grid[i])))
        if k in (0, len(grid) - 1):
            return None
        bounds = float(grid[k - 1]), float(grid[k + 1])
        found: Any = minimize_scalar(
            value, bounds=bounds, method="bounded", options={"xatol": 1e-10}
        )
        return torch.tensor(float(found.x), dtype=torch.float64)


@lru_cache(maxsize=64)
def _data(features: int, rows: int, noise: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true = normal(features)
    A, V = normal(rows, features), normal(rows, features)
    a, b = (m @ true + noise * normal(rows) for m in (A, V))
    return {"A": A, "a": a, "V": V, "b": b}
