"""Random search: short runs on mixtures drawn from the simplex, of which the best is taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from bilevel.problems.llm_reweight.baselines.lab import Lab
from bilevel.problems.llm_reweight.baselines.method import Found, Method, require


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Method):
    """The mixture of the lowest target loss among uniform and draws from a Dirichlet.

    All runs of a search have the same start and the same orders of rows.
    """

    runs: int = 12
    """Short runs, which share the budget evenly."""
    concentration: float = 1.0
    """Of the Dirichlet: 1 is even on the simplex, less prefers its corners."""

    def __post_init__(self) -> None:
        require(self, runs="at least 1", concentration="positive")

    def search(self, lab: Lab) -> Found:
        draws = dirichlet(lab, self.runs - 1, self.concentration).tolist()
        tried = [lab.uniform, *(dict(zip(lab.names, w, strict=True)) for w in draws)]
        losses = [lab.trial(mixture, lab.budget / self.runs) for mixture in tried]
        best = losses.index(min(losses))
        note = f"target loss {losses[best]:.3f}, the best of {len(losses)}; uniform {losses[0]:.3f}"
        return Found(weights=tried[best], note=note)


def dirichlet(lab: Lab, count: int, concentration: float, *, salt: int = 0) -> Tensor:
    """[count, sources], draws from the symmetric Dirichlet distribution, float64."""
    draw = numpy.random.default_rng([lab.seed, salt])
    return torch.from_numpy(draw.dirichlet([concentration] * len(lab.names), size=count))
