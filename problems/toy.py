"""Family T: the one-dimensional example of the penalty literature, with several local minima."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import InputError, Problem, Solution, picture

UPPER_END = 3.0


@dataclass(frozen=True, kw_only=True)
class Toy(Problem):
    """f = cos(4y + 2)/(1 + e^{2 - 4x}) + log((4x - 2)^2 + 1)/2, g = (x + y)^2 + x sin^2(x + y).

        y*(x) = -x,    dF = grad_x f - grad_y f,    x in [0, 3]

    in float64. F has several local minima; which one a solver finds depends on the start.

    Reference: Shen and Chen, On Penalty-based Bilevel Gradient Descent Method, 2023 (2302.05185).
    """

    start: float = 1.5
    """x at the start, between 0 and 3."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= UPPER_END:
            raise InputError(f"problem.start must be between 0 and 3, got {self.start}.")

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.start, dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return (x + y).square() + x * (x + y).sin().square()

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return torch.sigmoid(4 * x - 2) * (4 * y + 2).cos() + 0.5 * (4 * x - 2).square().log1p()

    def project_upper(self, x: Tensor) -> Tensor:
        return x.clamp(0.0, UPPER_END)

    def solution(self) -> Solution:
        def hypergradient(x: Tensor) -> Tensor:
            y, gate, t = -x, torch.sigmoid(4 * x - 2), 4 * x - 2
            along_x = 4 * gate * (1 - gate) * (4 * y + 2).cos() + 4 * t / (t.square() + 1)
            return along_x + 4 * gate * (4 * y + 2).sin()

        return Solution(lower=lambda x: -x, hypergradient=hypergradient)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        return {"x": float(x.detach())}

    def finish(self, result: Any, out: Path) -> list[str]:
        """Draw F over [0, 3] with the points that the run passed."""
        passed = torch.tensor([self.start, *(row["x"] for row in result.history)])
        curve = torch.linspace(0, UPPER_END, 500, dtype=torch.float64)
        drawn, axes = picture.figure()
        axes.plot(curve, self.upper(curve, -curve, None), color="0.4", label="F(x) = f(x, y*(x))")
        points = passed.double()
        axes.plot(points, self.upper(points, -points, None), ".", label="steps")
        end = points[-1:]
        axes.plot(end, self.upper(end, -end, None), "o", color=picture.COLORS[1], label="end")
        axes.set(xlabel="x", ylabel="F")
        axes.legend(frameon=False)
        known = self.solution().hypergradient
        slope = float(known(end[0])) if known else float("nan")
        words = f"x = {float(end):.4f} with F = {float(self.upper(end, -end, None)):.4f}"
        return [f"{words} and dF = {slope:.2g}", picture.save(drawn, out / "path.png")]
