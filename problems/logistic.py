"""Multinomial logistic regression on digits with one strength of regularization a pixel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import InputError, Problem, datasets, picture, resolve
from bilevel.fields import out_of_range

CLASSES, SIDE = 10, 8
LEAST, MOST = -6.0, 1.0  # log strength
SCALE = 1.5  # of the pixels, from black to white
GRID = 13  # single strengths tried, one e apart, as the answer that a user has now


@dataclass(frozen=True, kw_only=True)
class Logistic(Problem):
    """g = mean training loss + sum_j e^{x_j} |y_j|^2/2, f = mean validation loss.

    y_j [10] are the coefficients of pixel j, x_j its log strength [64], and one more for the
    constant. A random half of the pixels is noisy, as of a bad sensor; these should be switched
    off, and one strength for all cannot do so. The solver does not know which they are. The lower
    loss is strongly convex with mu = min_j e^{x_j}; X = {-6 <= x_j <= 1} keeps its curvature
    below 12, so that steps of 0.1 on y converge, and e^1 is as good as off.

    Reference: Pedregosa, Hyperparameter optimization with approximate gradient, 2016 (1602.02355),
    with one strength for all; several in Bengio, Gradient-Based Optimization of Hyperparameters,
    2000.
    """

    default_solver: ClassVar[str] = "aid"
    default_steps: ClassVar[int] = 150
    solver_options: ClassVar[dict[str, Any]] = {"upper_lr": 0.05}

    train: int = 200
    """Training rows."""
    validation: int = 600
    """Rows of the upper loss; the other digits test."""
    noise: float = 0.5
    """Standard deviation of the noise on half of the pixels; black is 0, white 1."""
    start: float = -3.5
    """Every log strength at the start, between -6 and 1."""
    data_seed: int = 0
    """Of the split, the noisy pixels and the noise."""

    def __post_init__(self) -> None:
        ranges = {"train": "at least 1", "validation": "at least 1", "noise": "non-negative"}
        faults = out_of_range("problem", self, **ranges)
        if not LEAST <= self.start <= MOST:
            faults.append(f"problem.start must be between -6 and 1, got {self.start}.")
        if self.train + self.validation >= 1797:
            faults.append(
                "problem.train and problem.validation must leave test rows of the 1797 digits, "
                f"got {self.train} and {self.validation}."
            )
        if faults:
            raise InputError(faults)

    def check(self) -> list[str]:
        return [*datasets.missing(), *picture.missing()]

    @cached_property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        """Noisy pixels and a constant column, and labels: training, validation, test."""
        pixels, labels = datasets.digits()
        generator = torch.Generator().manual_seed(self.data_seed)
        noise = self.noise * torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype)
        pixels = SCALE * (pixels - 0.5 + self.noisy * noise)
        pixels = torch.cat([pixels, torch.ones(len(pixels), 1, dtype=pixels.dtype)], 1)
        parts = datasets.split(len(labels), (self.train, self.validation), self.data_seed)
        return [(pixels[part], labels[part]) for part in parts]

    @property
    def noisy(self) -> Tensor:
        """Which pixels carry noise [64]."""
        generator = torch.Generator().manual_seed(self.data_seed + 1)
        return torch.randperm(SIDE * SIDE, generator=generator) < SIDE * SIDE // 2

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        features = self.data[0][0].shape[1]
        x = torch.full((features,), self.start, dtype=torch.float64)
        return x, torch.zeros(features, CLASSES, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return self._loss(y, 0) + 0.5 * x.exp() @ y.square().sum(1)

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return self._loss(y, 1)

    def project_upper(self, x: Tensor) -> Tensor:
        return x.clamp(LEAST, MOST)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """The accuracy and loss of y on the test rows."""
        return {"accuracy": self._accuracy(y), "test_loss": float(self._loss(y.detach(), 2))}

    def finish(self, result: Any, out: Path) -> list[str]:
        """Draw the strength of every pixel; compare with the best of a grid of single ones."""
        learned = resolve(self, result.x, tolerance=1e-6)
        grid = torch.linspace(-9.0, 3.0, GRID, dtype=torch.float64)
        single = [resolve(self, s.expand_as(result.x).clone(), tolerance=1e-6) for s in grid]
        best = min(range(GRID), key=lambda i: single[i].upper)
        words = f"best of {GRID} single strengths, e^{float(grid[best]):.0f}"
        drawn, axes = picture.figure(1, 2, size=(8.0, 3.6))
        noisy = self.noisy.view(SIDE, SIDE)
        picture.image(axes[0], noisy, "noisy pixels (white), hidden from the solver")
        strengths = result.x[:-1].view(SIDE, SIDE)
        shown = picture.image(axes[1], strengths, "learned log strength", cmap="viridis")
        drawn.colorbar(shown, ax=axes[1], label="low: used, high: switched off")
        return [
            self._line("one strength a pixel", learned),
            self._line(words, single[best]),
            picture.save(drawn, out / "strengths.png"),
        ]

    def _line(self, name: str, solved: Any) -> str:
        y, loss = solved.y, float(self._loss(solved.y, 2))
        losses = f"validation loss {solved.upper:.4f}, test loss {loss:.4f}"
        return f"{name}: {losses}, test accuracy {self._accuracy(y):.3f}"

    def _loss(self, y: Tensor, part: int) -> Tensor:
        pixels, labels = self.data[part]
        return cross_entropy(pixels @ y, labels)

    def _accuracy(self, y: Tensor) -> float:
        pixels, labels = self.data[2]
        return float(((pixels @ y.detach()).argmax(1) == labels).double().mean())
