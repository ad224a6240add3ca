"""Pruning: a mask over the weights of a network, learned together with how the rest retrain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import Functions, InputError, Problem, datasets, picture, projection, resolve
from bilevel.fields import out_of_range

PIXELS, CLASSES = 64, 10
Tree = dict[str, Tensor]
LAYERS = ("hidden", "head")


@dataclass(frozen=True, kw_only=True)
class Pruning(Problem):
    """g = training loss(x * y) + decay |y|^2/2 and f = validation loss(x * y), one hidden layer.

    x are masks of the weights [64, hidden] and [hidden, 10] in X = {0 <= x <= 1, sum x <= keep n},
    y the weights. At the start the network is trained without masks, and each mask is in proportion
    to the size of its weight. After the run the `keep` n largest masks become 1, the others 0, and
    the weights retrain. The lower level is not convex.

    Reference: Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu, Advancing Model Pruning via Bi-level
    Optimization, 2022 (2210.04092). Deviations: one budget for all layers, masks that may be
    fractions until the end, the upper loss on validation data.
    """

    default_solver: ClassVar[str] = "aid"
    default_steps: ClassVar[int] = 100
    solver_options: ClassVar[dict[str, Any]] = {
        "lower_optimizer": "adam",
        "lower_lr": 0.02,
    }

    keep: float = 0.05
    """Share of the weights that stay."""
    hidden: int = 24
    """Hidden units."""
    train: int = 500
    """Training rows."""
    validation: int = 500
    """Rows of the upper loss; the other digits test."""
    decay: float = 0.001
    """Weight decay."""
    data_seed: int = 0
    """Of the split and of the network before training."""

    def __post_init__(self) -> None:
        faults = out_of_range(
            "problem",
            self,
            keep="in (0, 1)",
            hidden="at least 1",
            train="at least 1",
            validation="at least 1",
            decay="positive",
        )
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
        """Pixels in [-1/2, 1/2] and labels: training, validation, test."""
        pixels, labels = datasets.digits()
        parts = datasets.split(len(labels), (self.train, self.validation), self.data_seed)
        return [(pixels[part] - 0.5, labels[part]) for part in parts]

    @property
    def kept(self) -> int:
        """Weights that stay."""
        return max(1, round(self.keep * (PIXELS + CLASSES) * self.hidden))

    @cached_property
    def dense(self) -> Tree:
        """The weights trained without masks."""
        generator = torch.Generator().manual_seed(self.data_seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5

        y = {"hidden": normal(PIXELS, self.hidden), "head": normal(self.hidden, CLASSES)}
        y |= {"bias": torch.zeros(self.hidden, dtype=torch.float64)}
        return self._retrain({name: torch.ones_like(y[name]) for name in LAYERS}, y)

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        y = {name: t.clone() for name, t in self.dense.items()}
        share = self.kept / float(torch.stack([y[name].abs().sum() for name in LAYERS]).sum())
        return self.project_upper({name: share * y[name].abs() for name in LAYERS}), y

    def lower(self, x: Tree, y: Tree, batch: Any) -> Tensor:
        size = torch.stack([t.square().sum() for t in y.values()]).sum()
        return self._loss(x, y, 0) + 0.5 * self.decay * size

    def upper(self, x: Tree, y: Tree, batch: Any) -> Tensor:
        return self._loss(x, y, 1)

    def project_upper(self, x: Tree) -> Tree:
        flat = projection.capped(torch.cat([x[name].flatten() for name in LAYERS]), self.kept)
        parts = flat.split([x[name].numel() for name in LAYERS])
        return {name: part.view_as(x[name]) for name, part in zip(LAYERS, parts, strict=True)}

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        """The accuracy of the masked network on the test rows, and how many masks are decided."""
        flat = torch.cat([x[name].detach().flatten() for name in LAYERS])
        decided = ((flat < 0.01) | (flat > 0.99)).double().mean()
        return {"accuracy": self._accuracy(x, y), "decided": float(decided)}

    def finish(self, result: Any, out: Path) -> list[str]:
        """Retrain at the decided masks; compare with magnitude and random pruning; draw masks."""
        dense = self.dense
        ones = {name: torch.ones_like(dense[name]) for name in LAYERS}
        draw = torch.Generator().manual_seed(self.data_seed + 1)
        random = {k: torch.rand(t.shape, generator=draw, dtype=t.dtype) for k, t in ones.items()}
        scores = {
            "learned masks": ({k: t.detach() for k, t in result.x.items()}, result.y),
            "largest weights": ({k: dense[k].abs() for k in LAYERS}, dense),
            "largest weights of each layer": ({k: _ranks(dense[k].abs()) for k in LAYERS}, dense),
            "random masks": (random, dense),
        }
        total = (PIXELS + CLASSES) * self.hidden
        lines = [f"{self.kept} of {total} weights stay; test accuracy after retraining:"]
        shown: dict[str, Tree] = {}
        for name, (score, y) in scores.items():
            shown[name] = self._decide(score)
            accuracy = self._accuracy(shown[name], self._retrain(shown[name], y))
            lines.append(f"  {name}: {accuracy:.3f}")
        lines.append(f"  all weights: {self._accuracy(ones, dense):.3f}")
        drawn, axes = picture.figure(1, 2, size=(7.0, 3.6))
        names = ("learned masks", "largest weights of each layer")
        most = max(float(shown[name]["hidden"].sum(1).max()) for name in names)
        options = {"cmap": "viridis", "vmin": 0, "vmax": most}
        used = [shown[name]["hidden"].sum(1).view(8, 8) for name in names]
        image = picture.image(axes[0], used[0], names[0], **options)
        picture.image(axes[1], used[1], names[1], **options)
        drawn.colorbar(image, ax=axes, label="weights kept of each pixel")
        return [*lines, picture.save(drawn, out / "masks.png")]

    def _decide(self, score: Tree) -> Tree:
        """Masks of ones at the largest scores, as many as may stay."""
        flat = torch.cat([score[name].flatten() for name in LAYERS])
        mask = torch.zeros_like(flat)
        mask[flat.argsort(descending=True, stable=True)[: self.kept]] = 1.0
        parts = mask.split([score[name].numel() for name in LAYERS])
        return {name: part.view_as(score[name]) for name, part in zip(LAYERS, parts, strict=True)}

    def _retrain(self, masks: Tree, y: Tree) -> Tree:
        def lower(x: Tree, y: Tree) -> Tensor:
            return self.lower(x, y, None)

        return resolve(Functions(lower, lower, masks, y), masks, tolerance=1e-3, steps=200).y

    def _loss(self, x: Tree, y: Tree, part: int) -> Tensor:
        pixels, labels = self.data[part]
        return cross_entropy(_scores(x, y, pixels), labels)

    def _accuracy(self, x: Tree, y: Tree) -> float:
        pixels, labels = self.data[2]
        with torch.no_grad():
            return float((_scores(x, y, pixels).argmax(1) == labels).double().mean())


def _ranks(t: Tensor) -> Tensor:
    """The share of entries that are not larger, for each."""
    return t.flatten().argsort().argsort().view_as(t).double() / t.numel()


def _scores(x: Tree, y: Tree, pixels: Tensor) -> Tensor:
    hidden = (pixels @ (x["hidden"] * y["hidden"]) + y["bias"]).tanh()
    return hidden @ (x["head"] * y["head"])
