"""Family M: a lower level with many minimizers, of which the optimistic solution takes the best."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import InputError, Problem, Solution
from bilevel.fields import out_of_range


@dataclass(frozen=True, kw_only=True)
class ManyMinimisers(Problem):
    """g = mu |u - Bx|^2/2, f = |u - a|^2/2 + |w - Ex|^2/2 + u'Kw + |x|^2/2, y = (u, w), float64.

    The minimizers of g are u = Bx with any w. The optimistic problem min_x min_{y in S(x)} f has

        w* = Ex - K'u*,    dF = x + B'(u* - a + Kw*) - E'(w* - Ex)

    Forward penalty methods find it: g + nu f has one minimizer, off by O(nu). Those of order 2
    do not, since g - nu f has none. Implicit differentiation meets a singular H and says so;
    unrolling ends at a point that depends on where w starts.
    """

    default_solver: ClassVar[str] = "f2ba"
    default_steps: ClassVar[int] = 600

    dim_x: int = 3
    """Upper variables."""
    dim_u: int = 3
    """Lower variables that the lower loss determines."""
    dim_w: int = 2
    """Lower variables that it leaves free."""
    mu: float = 5.0
    """Curvature of the lower loss in u; the answer does not depend on it."""
    data_seed: int = 0
    """Of the random matrices."""

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("dim_x", "dim_u", "dim_w"), "at least 1")
        if faults := out_of_range("problem", self, mu="positive", **ranges):
            raise InputError(faults)

    def data(self) -> dict[str, Tensor]:
        """B [u, x], a [u], E [w, x] of norm 1, and K [u, w] of norm 1/2, which bounds F below."""
        return _data(self.dim_x, self.dim_u, self.dim_w, self.data_seed)

    def init(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x, u, w = (torch.zeros(n, dtype=torch.float64) for n in self._sizes())
        return x, {"u": u, "w": w}

    def lower(self, x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return 0.5 * self.mu * (y["u"] - self.data()["B"] @ x).square().sum()

    def upper(self, x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        d, u, w = self.data(), y["u"], y["w"]
        apart = 0.5 * (u - d["a"]).square().sum() + 0.5 * (w - d["E"] @ x).square().sum()
        return apart + u @ d["K"] @ w + 0.5 * x @ x

    def solution(self) -> Solution:
        d = self.data()

        def lower(x: Tensor) -> dict[str, Tensor]:
            u = d["B"] @ x
            return {"u": u, "w": d["E"] @ x - d["K"].T @ u}

        def hypergradient(x: Tensor) -> Tensor:
            y = lower(x)
            along_u = d["B"].T @ (y["u"] - d["a"] + d["K"] @ y["w"])
            return x + along_u - d["E"].T @ (y["w"] - d["E"] @ x)

        constant = hypergradient(torch.zeros(self.dim_x, dtype=torch.float64))
        columns = [hypergradient(e) - constant for e in torch.eye(self.dim_x, dtype=torch.float64)]
        optimum = torch.linalg.solve(torch.stack(columns, dim=1), -constant)
        return Solution(x=optimum, lower=lower, hypergradient=hypergradient)

    def _sizes(self) -> tuple[int, int, int]:
        return self.dim_x, self.dim_u, self.dim_w


@lru_cache(maxsize=64)
def _data(dim_x: int, dim_u: int, dim_w: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, a, E, K = normal(dim_u, dim_x), normal(dim_u), normal(dim_w, dim_x), normal(dim_u, dim_w)
    return {
        "B": B,
        "a": a,
        "E": E / torch.linalg.matrix_norm(E, 2),
        "K": 0.5 * K / torch.linalg.matrix_norm(K, 2),
    }
