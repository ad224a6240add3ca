"""Influence: how well the mean gradient of each source points along that of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal

from torch import nn

from bilevel.linear import norm
from bilevel.problems.llm_reweight.baselines.lab import Lab
from bilevel.problems.llm_reweight.baselines.method import Found, Method, normalized, require
from bilevel.problems.llm_reweight.tokens import Rows
from bilevel.tree import dot


@dataclass(frozen=True, kw_only=True)
class Influence(Method):
    """One training on the uniform mixture, then a gradient for each source and the target.

        a_s = <grad l_s(y), grad l_target(y)>, over the two norms where `measure` is cosine
        w_s ~ max(a_s, 0)^sharpness

    A step along -grad l_s lowers l_target by a_s to first order. The inner product counts how large
    the gradient of a source is too; so sources not yet learned, noise among them, weigh more.

    Reference: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent
    (TracIn), NeurIPS 2020, eq. 1, between means of sources. Deviations: one point, the end of the
    warm-up; cosine; scores below zero give no weight, others a power of them.
    """

    measure: Literal["cosine", "inner"] = "cosine"
    """What is compared: directions alone, or lengths too."""
    sharpness: float = 1.0
    """Power of the score; the larger, the more the best sources take."""
    warmup: float = 0.75
    """Share of the budget that the training takes, at most; the gradients have the rest."""

    def __post_init__(self) -> None:
        require(self, sharpness="positive", warmup="in (0, 1)")

    def search(self, lab: Lab) -> Found:
        model = lab.train(lab.uniform, steps=lab.steps(self.warmup * lab.budget))
        count = affordable(lab, (1 - self.warmup) * lab.budget)
        found = scores(lab, model, count, measure=self.measure)
        weights = normalized(lab.names, [max(a, 0.0) ** self.sharpness for a in found])
        shown = ", ".join(f"{n} {a:.3g}" for n, a in zip(lab.names, found, strict=True))
        return Found(weights=weights, note=f"{self.measure}: {shown}")


def scores(
    lab: Lab,
    model: nn.Module,
    count: int,
    *,
    measure: Literal["cosine", "inner"],
    draw: int = 0,
) -> list[float]:
    """a_s of every source at a model, from about `count` rows of each, and `share` of the target.

    Another `draw` takes other rows.
    """
    sources = lab.problem.rows
    target = lab.target_gradient(model, ceil(count * share(sources)), draw)
    found = []
    for rows in sources:
        own = lab.gradient(model, rows, count, draw)
        lengths = norm(own) * norm(target) if measure == "cosine" else 1.0
        found.append(float(dot(own, target)) / max(lengths, 1e-300))
    return found


def affordable(lab: Lab, spend: float) -> int:
    """Rows of each source whose gradients, with those of the target, cost `spend` tokens."""
    target = share(lab.problem.rows) * lab.target_length
    return max(1, int(spend / (sum(lab.lengths) + target)))


def share(sources: Sequence[Rows]) -> float:
    """Rows of the target for one of each source, sqrt(sources).

    The error of the target's gradient is in every score, that of a source in its own: the sum of
    the scores' variances, S (1/n + 1/m) for n rows of each of S sources and m of the target, is
    least at a cost S n + m where m = sqrt(S) n.
    """
    return sqrt(len(sources))
