"""RegMix: short runs on random mixtures, a regression of their losses, and its best mixtures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from bilevel.problems.llm_reweight.baselines.lab import Lab
from bilevel.problems.llm_reweight.baselines.method import Found, Method, require
from bilevel.problems.llm_reweight.baselines.random_search import dirichlet

FLOOR = 0.01
"""Added to a weight before its logarithm: below it a source is as good as absent."""
SIMULATED, AVERAGED = 20_000, 100
"""Mixtures whose loss is predicted, and how many of the best are averaged, as in the paper."""
PENALTIES = [10.0**k for k in range(-6, 3)]


@dataclass(frozen=True, kw_only=True)
class RegMix(Method):
    """The mean of the mixtures with the lowest predicted loss, among many drawn at random.

    `ridge` predicts linearly from the centered log-ratios c_s = log(w_s + 0.01) - mean, `quadratic`
    from these and their squares, `boosting` by trees of scikit-learn on w. The penalty of the
    first two is that of the smallest error on runs left out.

    Reference: Liu et al., RegMix: Data Mixture as Regression for Language Model Pre-training, ICLR
    2025 (2407.01492), section 3. Deviations: ridge in place of LightGBM; runs on Dirichlet draws
    that do not follow the sizes; 20,000 simulated mixtures; uniform is among the runs.
    """

    runs: int = 16
    """Short runs, which share the budget evenly."""
    model: Literal["ridge", "quadratic", "boosting"] = "quadratic"
    """What predicts the loss of a mixture."""

    def __post_init__(self) -> None:
        require(self, runs="at least 1")

    def check(self, names: list[str]) -> list[str]:
        faults = []
        if self.runs < 4:
            faults.append(f"regmix:runs must be at least 4, got {self.runs}.")
        if self.model == "boosting" and not find_spec("sklearn"):
            faults.append(
                "regmix:model=boosting needs scikit-learn; install it with: pip install "
                "'bilevel[search]'."
            )
        return faults

    def search(self, lab: Lab) -> Found:
        mixtures = dirichlet(lab, self.runs, 1.0)
        mixtures[0] = 1 / len(lab.names)
        found = [
            lab.trial(dict(zip(lab.names, w, strict=True)), lab.budget / self.runs)
            for w in mixtures.tolist()
        ]
        losses = torch.tensor(found, dtype=torch.float64)
        squares, note = self.model == "quadratic", ""
        simulated = dirichlet(lab, SIMULATED, 1.0, salt=1)
        if self.model == "boosting":
            predicted = boosted(mixtures, losses, seed=lab.seed)(simulated)
        else:
            predict, left = ridge(features(mixtures, squares=squares), losses)
            explained = 1 - float((left - losses).square().mean() / losses.var(correction=0))
            note = f"{explained:.0%} of the variance of runs left out is explained"
            predicted = predict(features(simulated, squares=squares))
        best = predicted.argsort()[:AVERAGED]
        weights = simulated[best].mean(0)
        return Found(weights=dict(zip(lab.names, weights.tolist(), strict=True)), note=note)


def features(mixtures: Tensor, *, squares: bool) -> Tensor:
    """[n, sources or twice that], centered log-ratios of [n, sources] weights, and squares."""
    logs = (mixtures + FLOOR).log()
    ratios = logs - logs.mean(1, keepdim=True)
    return torch.cat([ratios, ratios.square()], 1) if squares else ratios


def ridge(x: Tensor, y: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Least squares on standardized features, penalized by what predicts left-out rows best.

        min over b of |y - mean - X b|^2 + n c |b|^2

    The error on a row left out is r_i / (1 - h_ii), r the residual and h the hat matrix.

    Args:
        x: [n, features]
        y: [n]

    Returns:
        The prediction as a function of features, and [n], that of each row from the others.
    """
    center, scale = x.mean(0), x.std(0).clamp(min=1e-12)
    n = len(x)
    z = (x - center) / scale
    best, errors = torch.zeros(z.shape[1], dtype=x.dtype), torch.full((n,), float("inf"))
    for penalty in PENALTIES:
        system = z.T @ z + n * penalty * torch.eye(z.shape[1], dtype=x.dtype)
        solved = torch.linalg.solve(system, z.T)
        hat = z @ solved + 1 / n
        residual = y - hat @ y
        found = residual / (1 - hat.diagonal()).clamp(min=1e-9)
        if found.square().sum() < errors.square().sum():
            best, errors = solved @ (y - y.mean()), found
    return lambda new: y.mean() + (new - center) / scale @ best, y - errors


def boosted(x: Tensor, y: Tensor, *, seed: int) -> Callable[[Tensor], Tensor]:
    """Gradient boosting of scikit-learn on the weights themselves."""
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(max_depth=2, subsample=0.8, random_state=seed)
    model.fit(x.numpy(), y.numpy())
    return lambda new: torch.from_numpy(model.predict(new.numpy()))
