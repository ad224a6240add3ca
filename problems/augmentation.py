"""Hyperparameters of a training run: how much to augment, and the weight decay, all at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from bilevel import InputError, Problem, datasets, picture, resolve
from bilevel.fields import out_of_range

CLASSES, SIDE = 10, 8
NAMES = ("rotation", "shift", "zoom", "noise", "decay")
SCALE = 1.5  # of the pixels, so that the lower level is better conditioned
START = (0.05, 0.02, 0.02, 0.05, 0.01)
BOUNDS = ((1e-3, 1.0), (1e-3, 0.5), (1e-3, 0.5), (1e-3, 0.5), (1e-4, 1.0))
"""Radians, half images, relative size, black to white, weight decay."""


@dataclass(frozen=True, kw_only=True)
class Augmentation(Problem):
    """g = mean loss of a softmax regression on changed images + e^{x_5} |y|^2/2, f = clean loss.

    e^{x_1..x_4} are the standard deviations of random rotations, shifts, zooms and pixel noise of
    the few training digits, drawn once: `copies` of each. f is on validation digits as they are.
    What a search over hyperparameters needs many trainings for, one run finds: the closing lines
    compare it with a random search. X is a box of sensible values. The learning rate is not among
    them: where the lower level is solved, y*(x) does not depend on it. solver=maid differentiates
    grid_sample twice, which torch can from 2.13 on.

    Reference: Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit
    Differentiation, 2020 (1911.02590).
    """

    default_steps: ClassVar[int] = 150
    solver_options: ClassVar[dict[str, Any]] = {
        "upper_lr": 0.05,
        "inner_steps": 20,
    }

    train: int = 60
    """Training digits."""
    validation: int = 400
    """Digits of the upper loss; the others test."""
    copies: int = 10
    """Changed copies of each training digit."""
    trials: int = 16
    """Trainings of the random search that the answer is compared with; 0 leaves it out."""
    data_seed: int = 0
    """Of the split and of the draws."""

    def __post_init__(self) -> None:
        names = ("train", "validation", "copies")
        ranges = dict.fromkeys(names, "at least 1") | {"trials": "non-negative"}
        faults = out_of_range("problem", self, **ranges)
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
        """Pixels in [-3/4, 3/4] and labels: training, validation, test."""
        pixels, labels = datasets.digits()
        parts = datasets.split(len(labels), (self.train, self.validation), self.data_seed)
        return [(SCALE * (pixels[part] - 0.5), labels[part]) for part in parts]

    @cached_property
    def draws(self) -> tuple[Tensor, Tensor]:
        """Standard normal draws: of rotation, two shifts and zoom [4, n], and of noise [n, 64]."""
        generator = torch.Generator().manual_seed(self.data_seed + 1)
        count = self.train * self.copies
        moves = torch.randn(4, count, generator=generator, dtype=torch.float64)
        return moves, torch.randn(count, SIDE * SIDE, generator=generator, dtype=torch.float64)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.tensor(START, dtype=torch.float64).log()
        return x, torch.zeros(SIDE * SIDE + 1, CLASSES, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        labels = self.data[0][1].repeat(self.copies)
        fit = cross_entropy(_scores(y, self.changed(x)), labels)
        return fit + 0.5 * x[4].exp() * y.square().sum()

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        pixels, labels = self.data[1]
        return cross_entropy(_scores(y, pixels), labels)

    def project_upper(self, x: Tensor) -> Tensor:
        low, high = torch.tensor(BOUNDS, dtype=x.dtype).log().T
        return x.clamp(low, high)

    def changed(self, x: Tensor) -> Tensor:
        """The training digits, rotated, shifted, zoomed and with noise [train * copies, 64]."""
        (turn, right, down, zoom), noise = self.draws
        rotation, shift, scale, grain, _ = x.exp()
        angle, size = rotation * turn, (scale * zoom).exp()
        cos, sin = size * angle.cos(), size * angle.sin()
        rows = [cos, -sin, shift * right, sin, cos, shift * down]
        maps = torch.stack(rows, dim=1).view(-1, 2, 3)
        images = self.data[0][0].repeat(self.copies, 1).view(-1, 1, SIDE, SIDE)
        grid = affine_grid(maps, list(images.shape), align_corners=False)
        moved = grid_sample(images, grid, padding_mode="border", align_corners=False)
        return moved.view(-1, SIDE * SIDE) + SCALE * grain * noise

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """The accuracy of y on the test digits, and the hyperparameters."""
        values = zip(NAMES, x.detach().exp().tolist(), strict=True)
        return {"accuracy": self._accuracy(y), **dict(values)}

    def finish(self, result: Any, out: Path) -> list[str]:
        """Compare with random search by trainings; draw digits changed as much as was learned."""
        learned = resolve(self, result.x)
        values = result.x.exp().tolist()
        words = ", ".join(f"{n} {v:.3g}" for n, v in zip(NAMES, values, strict=True))
        lines = [f"learned: {words}", self._line("learned", learned)]
        lines.append(self._line("at the start", resolve(self, self.init(torch.Generator())[0])))
        if self.trials:
            best = min((resolve(self, x) for x in self._search()), key=lambda found: found.upper)
            lines.append(self._line(f"best of {self.trials} random trials", best))
        drawn, axes = picture.figure(4, 6, size=(6.4, 4.6))
        images = self.changed(result.x).view(self.copies, self.train, SIDE, SIDE)
        for k, line in enumerate(axes):
            originals = self.data[0][0].view(-1, SIDE, SIDE)
            shown = [originals[k], *images[: len(line) - 1, k]]
            for i, (one, image) in enumerate(zip(line, shown, strict=False)):
                title = {0: "digit", 1: "changed"}.get(i, "") if k == 0 else ""
                picture.image(one, image, title, vmin=-SCALE / 2, vmax=SCALE / 2)
            for one in line[len(shown) :]:
                one.set_axis_off()
        return [*lines, picture.save(drawn, out / "digits.png")]

    def _search(self) -> list[Tensor]:
        """Log-uniform draws from the box."""
        generator = torch.Generator().manual_seed(self.data_seed + 2)
        low, high = torch.tensor(BOUNDS, dtype=torch.float64).log().T
        draws = torch.rand(self.trials, len(NAMES), generator=generator, dtype=torch.float64)
        return list(low + (high - low) * draws)

    def _line(self, name: str, solved: Any) -> str:
        accuracy = self._accuracy(solved.y)
        return f"{name}: validation loss {solved.upper:.4f}, test accuracy {accuracy:.3f}"

    def _accuracy(self, y: Tensor) -> float:
        pixels, labels = self.data[2]
        return float((_scores(y.detach(), pixels).argmax(1) == labels).double().mean())


def _scores(y: Tensor, pixels: Tensor) -> Tensor:
    return pixels @ y[:-1] + y[-1]
