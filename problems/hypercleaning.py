"""Data hyper-cleaning: find wrong labels by learning how much each training row should count."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import Functions, InputError, Problem, datasets, picture, projection, resolve
from bilevel.fields import out_of_range

CLASSES = 10


class Rows(NamedTuple):
    """Digits with the labels that are trained on, and whether these are wrong."""

    pixels: Tensor
    labels: Tensor
    wrong: Tensor


@dataclass(frozen=True, kw_only=True)
class Hypercleaning(Problem):
    """g = mean_i w_i loss_i(y) + decay |y|^2/2 on corrupted digits, f = mean loss on clean ones.

    y is a softmax regression, one weight w_i a training row. `weights` says what x is:

        sigmoid    w_i = sigmoid(x_i), x free
        box        w_i = x_i, x in [0, 1]
        simplex    w_i = x_i, x >= 0, the mean of x is 1
        sparse     as simplex, and at most `keep` entries of x are not zero

    With `sources` > 0 the rows come from that many sources, the first half of them corrupted, and
    w and x have one entry a source. The solver never sees which labels are wrong; the found
    corruption is scored by the area under the ROC curve (AUROC) of -w. The lower loss is strongly
    convex. The set of `sparse` is not convex: its projection is exact, but descent on it finds a
    local answer, and rows dropped at once may not come back.

    Reference: Franceschi, Donini, Frasconi, Pontil, Forward and Reverse Gradient-Based
    Hyperparameter Optimization, 2017 (1703.01785), on MNIST.
    """

    default_solver: ClassVar[str] = "aid"
    default_steps: ClassVar[int] = 100
    solver_options: ClassVar[dict[str, Any]] = {"upper_optimizer": "sgd", "upper_lr": 300.0}

    weights: Literal["sigmoid", "box", "simplex", "sparse"] = "sigmoid"
    """What x is, and the set that it lives in."""
    train: int = 1000
    """Training rows."""
    validation: int = 500
    """Clean rows of the upper loss; the other digits test."""
    corrupted: float = 0.5
    """Share of the training rows (without sources) or of the sources whose labels are wrong."""
    sources: int = 0
    """Sources of the training rows, one weight each; 0 gives every row its own."""
    keep: int = 0
    """Most weights that are not zero, for weights=sparse; 0 keeps half."""
    decay: float = 0.005
    """Weight decay of the softmax regression."""
    data_seed: int = 0
    """Of the split and the wrong labels."""

    def __post_init__(self) -> None:
        faults = out_of_range(
            "problem",
            self,
            train="at least 1",
            validation="at least 1",
            corrupted="in [0, 1)",
            sources="non-negative",
            keep="non-negative",
            decay="positive",
        )
        if self.train + self.validation >= 1797:
            faults.append(
                "problem.train and problem.validation must leave test rows of the 1797 digits, "
                f"got {self.train} and {self.validation}."
            )
        if self.sources > self.train:
            faults.append(f"problem.sources must be at most train, got {self.sources}.")
        if faults:
            raise InputError(faults)

    def check(self) -> list[str]:
        return [*datasets.missing(), *picture.missing()]

    @cached_property
    def data(self) -> tuple[Rows, Rows, Rows]:
        """Training, validation and test rows; pixels in [-1/2, 1/2], and a constant last column."""
        pixels, labels = datasets.digits()
        pixels = torch.cat([pixels - 0.5, torch.ones(len(pixels), 1, dtype=pixels.dtype)], 1)
        parts = datasets.split(len(labels), (self.train, self.validation), self.data_seed)
        generator = torch.Generator().manual_seed(self.data_seed + 1)
        if self.sources:
            wrong = self.source < round(self.corrupted * self.sources)
        else:
            order = torch.randperm(self.train, generator=generator)
            wrong = order < round(self.corrupted * self.train)
        shift = torch.randint(1, CLASSES, (self.train,), generator=generator)
        given = torch.where(wrong, (labels[parts[0]] + shift) % CLASSES, labels[parts[0]])
        none = torch.zeros(len(labels), dtype=torch.bool)
        validation, test = (Rows(pixels[p], labels[p], none[p]) for p in parts[1:])
        return Rows(pixels[parts[0]], given, wrong), validation, test

    @property
    def source(self) -> Tensor:
        """Of each training row the entry of x that weighs it."""
        return torch.arange(self.train) % (self.sources or self.train)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = self.sources or self.train
        start = {"sigmoid": 0.0, "box": 0.5}.get(self.weights, 1.0)
        x = torch.full((count,), start, dtype=torch.float64)
        return x, torch.zeros(self.data[0].pixels.shape[1], CLASSES, dtype=torch.float64)

    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return self._weighted(y, self._per_row(x)) + 0.5 * self.decay * y.square().sum()

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        clean = self.data[1]
        return cross_entropy(clean.pixels @ y, clean.labels)

    def project_upper(self, x: Tensor) -> Tensor:
        kept = self.keep or max(1, len(x) // 2)
        sets: dict[str, Callable[[], Tensor]] = {
            "sigmoid": lambda: x,
            "box": lambda: x.clamp(0.0, 1.0),
            "simplex": lambda: projection.simplex(x, len(x)),
            "sparse": lambda: projection.sparse_simplex(x, kept, len(x)),
        }
        return sets[self.weights]()

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """The AUROC of found corruption, and the accuracy of y on the test rows."""
        return {"auroc": self._auroc(x), "accuracy": self._accuracy(y)}

    def headline(self, record: dict[str, Any]) -> str:
        return f"upper {record['upper']:.4g}, AUROC of found corruption {record['auroc']:.4f}"

    def finish(self, result: Any, out: Path) -> list[str]:
        """Draw the weights of clean and corrupted rows; score against training on other rows."""
        x, train = result.x, self.data[0]
        learned = resolve(self, x)
        even = torch.ones(self.train, dtype=torch.float64)
        rivals = {"all rows alike": even, "the clean rows only": (~train.wrong).to(even)}
        w = self._per_row(x).detach()
        lines = [
            f"AUROC of found corruption: {self._auroc(x):.4f} "
            f"({int(train.wrong.sum())} of {self.train} labels are wrong)",
            f"test accuracy, trained with the learned weights: {self._accuracy(learned.y):.3f}",
        ]
        for name, weights in rivals.items():
            lines.append(
                f"test accuracy, trained on {name}: {self._accuracy(self._fit(weights)):.3f}"
            )
        drawn, axes = picture.figure()
        groups = [w[~train.wrong].numpy(), w[train.wrong].numpy()]
        axes.hist(groups, bins=30, label=["clean", "wrong"], color=picture.COLORS[:2])
        axes.set(xlabel="weight", ylabel="training rows", yscale="log")
        axes.set_title(f"AUROC {self._auroc(x):.4f}", fontsize=10)
        axes.legend(frameon=False, title="label")
        return [*lines, picture.save(drawn, out / "weights.png")]

    def _per_row(self, x: Tensor) -> Tensor:
        w = x.sigmoid() if self.weights == "sigmoid" else x
        return w[self.source] if self.sources else w

    def _weighted(self, y: Tensor, weights: Tensor) -> Tensor:
        rows = self.data[0]
        losses = cross_entropy(rows.pixels @ y, rows.labels, reduction="none")
        return weights @ losses / len(losses)

    def _auroc(self, x: Tensor) -> float:
        from sklearn.metrics import roc_auc_score

        wrong = self.data[0].wrong
        if wrong.all() or not wrong.any():
            return math.nan
        return float(roc_auc_score(wrong, -self._per_row(x.detach())))

    def _accuracy(self, y: Tensor) -> float:
        test = self.data[2]
        return float(((test.pixels @ y.detach()).argmax(1) == test.labels).double().mean())

    def _fit(self, weights: Tensor) -> Tensor:
        """The lower level at given weights of the rows."""

        def lower(x: Tensor, y: Tensor) -> Tensor:
            return self._weighted(y, x) + 0.5 * self.decay * y.square().sum()

        start = self.init(torch.Generator())[1]
        return resolve(Functions(lower, lower, weights, start), weights).y
