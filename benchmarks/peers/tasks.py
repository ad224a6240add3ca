"""The tasks: their data as files, the exact hypergradient, and the honest upper loss.

All in float64. The lower level is solved by L-BFGS and Newton steps with a dense Hessian (banded on
the quadratic), which shares no code with any library that is measured, ours among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import losses
import numpy as np
import torch

TASKS: dict[str, dict[str, Any]] = {
    "cleaning": {"family": "cleaning", "decay": 0.005, "lower_lr": 2.0, "upper_lr": 300.0},
    "strengths": {"family": "strengths", "decay": 0.0, "lower_lr": 1.0, "upper_lr": 1.0},
    "cleaning-mlp": {"family": "cleaning", "decay": 0.005, "lower_lr": 0.5, "upper_lr": 100.0},
    "strengths-mlp": {"family": "strengths", "decay": 0.01, "lower_lr": 0.3, "upper_lr": 1.0},
    "few-shot": {"family": "fewshot", "decay": 0.05, "lower_lr": 0.3, "upper_lr": 3.0},
    **{
        f"quadratic-{n}": {"family": "quadratic", "decay": 0.0, "lower_lr": 0.5, "upper_lr": 1.0}
        for n in (100, 10_000, 1_000_000)
    },
}
"""Hyper-cleaning and strengths of L2 per feature on digits, a small network, few-shot, a chain.

`lower_lr` is about 1 over the largest curvature of g; all libraries step by it from the same start.
"""

WORDS = {
    "cleaning": "hyper-cleaning, softmax regression: 1,000 weights of rows, 650 lower variables",
    "strengths": "a strength of L2 per feature, softmax regression: 65 strengths, 650 lower",
    "cleaning-mlp": "hyper-cleaning, 16 hidden tanh: 1,000 weights, 1,200 lower variables",
    "strengths-mlp": "a strength of L2 per feature, 16 hidden tanh: 65 strengths, 1,200 lower",
    "few-shot": "features for 40 tasks of 5 digits, 2 shots: 1,040 upper, 3,200 lower variables",
    "quadratic-100": "quadratic chain, 10 upper and 100 lower variables",
    "quadratic-10000": "quadratic chain, 10 upper and 10,000 lower variables",
    "quadratic-1000000": "quadratic chain, 10 upper and 1,000,000 lower variables",
}


def write(name: str, folder: Path) -> Path:
    """The file of a task, made if it is not there."""
    path = folder / f"{name}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = TASKS[name]
        if options["family"] == "quadratic":
            arrays = _quadratic(int(name.split("-")[1]))
        elif options["family"] == "fewshot":
            arrays = _few_shot()
        else:
            arrays = _digits(options["family"], hidden=16 if name.endswith("-mlp") else 0)
        np.savez(path, options=json.dumps({"name": name, **options}), **arrays)
    return path


class Exact:
    """The exact hypergradient of a task at x0, and honest upper losses at any x."""

    def __init__(self, path: Path) -> None:
        self.task = losses.load(path)
        self._shapes = [p.shape for p in self.task.y0]

    def hypergradient(self) -> np.ndarray:
        """dF(x0) = grad_x f - J'H^{-1} grad_y f at the y*(x0) that descent from y0 ends at."""
        x = self.task.x0.clone().requires_grad_()
        y = self._solved(x.detach()).requires_grad_()
        f = self.task.upper(x, self._split(y))
        slope = torch.autograd.grad(f, [x, y], allow_unused=True, materialize_grads=True)
        v = self._divided(x.detach(), y.detach(), slope[1])
        g = torch.autograd.grad(self.task.lower(x, self._split(y)), y, create_graph=True)[0]
        return (slope[0] - torch.autograd.grad(g, x, v)[0]).numpy()

    def upper(self, x: np.ndarray) -> float:
        """f(x, y*(x)) with the lower level solved from y0."""
        at = torch.tensor(x)
        y = self._solved(at, descent=False)
        return float(self.task.upper(at, self._split(y)))

    def largest(self) -> float:
        """The largest curvature of g along y at (x0, y0) and at (x0, y*)."""
        places = [torch.cat([p.flatten() for p in self.task.y0]), self._solved(self.task.x0, False)]
        return max(float(torch.linalg.eigvalsh(self._hessian(self.task.x0, y))[-1]) for y in places)

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat.split([s.numel() for s in self._shapes])
        return [p.view(s) for p, s in zip(parts, self._shapes, strict=True)]

    def _gradient(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, torch.Tensor]:
        y = y.detach().requires_grad_()
        loss = self.task.lower(x, self._split(y))
        return float(loss.detach()), torch.autograd.grad(loss, y)[0]

    def _hessian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.func.hessian(lambda v: self.task.lower(x, self._split(v)))(y)

    def _divided(self, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """H^{-1} r."""
        if self.task.options["family"] == "quadratic":
            return _banded(self.task.data["d"], r)
        return torch.linalg.solve(self._hessian(x, y), r)

    def _solved(self, x: torch.Tensor, descent: bool = True) -> torch.Tensor:
        """y*(x): by descent from y0 where there are many, then L-BFGS, then Newton."""
        from scipy.optimize import minimize

        y = torch.cat([p.flatten() for p in self.task.y0])
        if self.task.options["family"] == "quadratic":
            b = self.task.data["b"].view(-1, len(x)) * x
            return _banded(self.task.data["d"], b.flatten())
        if descent and len(self._shapes) > 1:  # to the minimizer that every library's descent nears
            for _ in range(5000):
                y = y - self.task.lower_lr * self._gradient(x, y)[1]

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = self._gradient(x, torch.from_numpy(flat))
            return value, slope.numpy()

        enough = 500 if len(self._shapes) > 1 and not descent else 3000  # four digits of f
        options = {"maxiter": enough, "maxfun": 6000, "ftol": 0.0, "gtol": 1e-7}
        found = minimize(evaluate, y.numpy(), jac=True, method="L-BFGS-B", options=options)
        y = torch.from_numpy(found.x)
        for _ in range(2 if descent else 0):
            y = y - torch.linalg.solve(self._hessian(x, y), self._gradient(x, y)[1])
        return y


def _digits(family: str, *, hidden: int) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.concatenate([pixels / 16 - 0.5, np.ones((len(pixels), 1))], 1)
    random = np.random.default_rng(0)
    order = random.permutation(len(labels))
    cleaning = family == "cleaning"
    first, second = (1000, 500) if cleaning else (200, 600)
    train, valid = order[:first], order[first : first + second]
    given = labels[train].copy()
    if cleaning:  # half of the labels are wrong
        wrong = random.permutation(first) < first // 2
        given = np.where(wrong, (given + random.integers(1, 10, first)) % 10, given)
    y0 = [np.zeros((65, 10))]
    if hidden:
        y0 = [random.normal(size=(65, hidden)) / 8, random.normal(size=(hidden, 10)) / 4]
    return {
        "train": pixels[train],
        "labels": given,
        "valid": pixels[valid],
        "valid_labels": labels[valid],
        "x0": np.zeros(first) if cleaning else np.full(65, -4.0),
        **{f"y0_{i}": p for i, p in enumerate(y0)},
    }


def _few_shot(
    tasks: int = 40, ways: int = 5, shots: int = 2, queries: int = 10, width: int = 16
) -> dict[str, np.ndarray]:
    """Tasks that tell some of the digits apart; rows [tasks, rows, 65], labels flat."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.concatenate([pixels / 16 - 0.5, np.ones((len(pixels), 1))], 1)
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(tasks):
        digits = random.choice(10, ways, replace=False)
        rows = [random.permutation(np.flatnonzero(labels == d))[: shots + queries] for d in digits]
        drawn.append(pixels[np.array(rows)])  # [ways, shots + queries, 65]
    rows = np.array(drawn)
    flat = {"support": rows[:, :, :shots], "query": rows[:, :, shots:]}
    own = np.arange(ways)
    return {
        **{name: part.reshape(tasks, -1, part.shape[-1]) for name, part in flat.items()},
        **{
            f"{name}_labels": np.tile(np.repeat(own, part.shape[2]), tasks)
            for name, part in flat.items()
        },
        "x0": random.normal(size=65 * width) / 8,
        "y0_0": np.zeros((tasks, width, ways)),
    }


def _quadratic(size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "d": random.uniform(0.1, 1.0, size),
        "b": random.normal(size=size),
        "c": random.normal(size=size),
        "x0": np.ones(10),
        "y0_0": np.zeros(size),
    }


def _banded(d: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """(diag(d) + L/4)^{-1} r, L the Laplacian of a chain."""
    from scipy.linalg import solveh_banded

    degree = np.full(len(d), 2.0)
    degree[[0, -1]] = 1.0
    beside = np.full(len(d), -0.25)
    return torch.from_numpy(solveh_banded(np.stack([beside, d.numpy() + degree / 4]), r.numpy()))
