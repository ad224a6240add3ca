"""Total-variation denoising of photographs: learn how strongly and how sharply to smooth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import Functions, InputError, Problem, datasets, picture, resolve
from bilevel.fields import out_of_range

CORNERS = ((80, 250), (60, 330), (140, 420), (260, 300))
"""Upper left corners of the crops in each photograph: those of the first photograph train."""
MOST = 96  # side of a crop
HIGHEST, LOWEST = -1.5, -5.0  # log strength and log smoothing
SCALE = 8.0  # of the lower loss


@dataclass(frozen=True, kw_only=True)
class Denoising(Problem):
    """g = (|y - noisy|^2/2 + e^{x_1} sum sqrt(|grad y|^2 + e^{2 x_2})/2)/8, f = mean (y - clean)^2.

    y are four crops of the photograph of a temple, x the log strength and the log smoothing of the
    total variation; the gradient is by forward differences, zero at the border. The learned x is
    tested on crops of the photograph of a flower. The lower loss has mu = 1/8 and
    L = (1 + 4 e^{x_1 - x_2})/8; X = {x_1 <= -1.5, x_2 >= -5} keeps L below 17, so that steps of 0.1
    on y converge.

    Reference: Ehrhardt, Roberts, Analyzing Inexact Hypergradients for Bilevel Learning, 2023
    (2301.04764); Salehi, Mukherjee, Roberts, Ehrhardt, MAID, 2023 (2308.10098). Deviations:
    photographs of scikit-learn, f is a mean without the factor 1/2, g is divided by 8, the set X.
    """

    default_solver: ClassVar[str] = "aid"
    default_steps: ClassVar[int] = 150
    solver_options: ClassVar[dict[str, Any]] = {"upper_lr": 0.05, "inner_steps": 20}

    size: int = 48
    """Side of the square crops, pixels."""
    noise: float = 0.1
    """Standard deviation of the noise, on a scale where white is 1."""
    start: tuple[float, float] = (-5.0, -5.0)
    """The log strength and the log smoothing at the start."""
    data_seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        faults = out_of_range("problem", self, noise="positive")
        if not 2 <= self.size <= MOST:
            faults.append(f"problem.size must be between 2 and {MOST}, got {self.size}.")
        if faults:
            raise InputError(faults)

    def check(self) -> list[str]:
        return [*datasets.missing(), *picture.missing()]

    @cached_property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        """Clean and noisy crops [4, size, size] of the first and of the second photograph."""
        generator = torch.Generator().manual_seed(self.data_seed)
        found = []
        for photograph in datasets.photographs():
            ends = [(row + self.size, column + self.size) for row, column in CORNERS]
            pairs = zip(CORNERS, ends, strict=True)
            clean = torch.stack([photograph[a:c, b:d] for (a, b), (c, d) in pairs])
            noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
            found.append((clean, clean + self.noise * noise))
        return found

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.start, dtype=torch.float64), self.data[0][1].clone()

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return _energy(x, y, self.data[0][1])

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return (y - self.data[0][0]).square().mean()

    def project_upper(self, x: Tensor) -> Tensor:
        return torch.stack([x[0].clamp(max=HIGHEST), x[1].clamp(min=LOWEST)])

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """The peak signal-to-noise ratio of y on the training crops, and x."""
        strength, smoothing = x.detach().tolist()
        psnr = _psnr(y.detach(), self.data[0][0])
        return {"psnr": psnr, "log_strength": strength, "log_smoothing": smoothing}

    def headline(self, record: dict[str, Any]) -> str:
        return (
            f"PSNR {record['psnr']:.2f} dB at x = "
            f"({record['log_strength']:.2f}, {record['log_smoothing']:.2f})"
        )

    def finish(self, result: Any, out: Path) -> list[str]:
        """Denoise the other photograph's crops; draw clean, noisy and denoised."""
        lines = []
        for name, (clean, noisy) in zip(("trained on", "new"), self.data, strict=True):
            denoised = self.denoise(result.x, noisy)
            gain = f"{_psnr(noisy, clean):.2f} dB -> {_psnr(denoised, clean):.2f} dB"
            lines.append(f"PSNR of the crops {name}: {gain}")
        clean, noisy = self.data[1]
        rows = [clean, noisy, self.denoise(result.x, noisy)]
        drawn, axes = picture.figure(3, len(CORNERS), size=(8.0, 6.4))
        for name, images, line in zip(("clean", "noisy", "denoised"), rows, axes, strict=True):
            for image, clear, one in zip(images, clean, line, strict=True):
                words = "" if name == "clean" else f", {_psnr(image, clear):.1f} dB"
                picture.image(one, image, name + words, vmin=0, vmax=1)
        return [*lines, picture.save(drawn, out / "images.png")]

    def denoise(self, x: Tensor, noisy: Tensor) -> Tensor:
        """The minimizer of the lower loss for other images [n, rows, columns]."""

        def lower(x: Tensor, y: Tensor) -> Tensor:
            return _energy(x, y, noisy)

        return resolve(Functions(lower, lower, x, noisy), x).y


def _energy(x: Tensor, y: Tensor, noisy: Tensor) -> Tensor:
    down = torch.nn.functional.pad(y.diff(dim=1), (0, 0, 0, 1))
    right = torch.nn.functional.pad(y.diff(dim=2), (0, 1))
    slope = (down.square() + right.square() + (2 * x[1]).exp()).sqrt()
    return 0.5 * ((y - noisy).square().sum() + x[0].exp() * slope.sum()) / SCALE


def _psnr(image: Tensor, clean: Tensor) -> float:
    """10 log10(1 / mean squared error), decibels."""
    return float(-10 * (image - clean).square().mean().log10())
