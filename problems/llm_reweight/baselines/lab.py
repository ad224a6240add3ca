"""The place where a method searches: fresh models, trainings, losses and gradients, all counted.

The unit of cost is the token that goes through a model forward and backward; one that goes forward
only counts a third. Padding is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Memory, Solver
from bilevel.problems.llm_reweight import training
from bilevel.problems.llm_reweight.problem import LLMReweight
from bilevel.problems.llm_reweight.targets import shared_out
from bilevel.problems.llm_reweight.tokens import Batch, Rows, collate

FORWARD = 1 / 3
"""Of the cost of a pass forward and backward."""
CHUNK = 32
"""Rows of a pass outside of trainings."""
SAMPLED = 256
"""Rows whose lengths are averaged."""


@dataclass(kw_only=True)
class Lab:
    """One search of one method; `tokens` is what it has used so far."""

    problem: LLMReweight
    budget: float
    """Tokens the search may use."""
    seed: int = 0
    """Of start values and of rows, so that searches with equal seeds can be compared in pairs."""
    solver: Solver | None = None
    """The solver of the run, for methods that use one; the problem's default without it."""
    memory: Memory | None = None
    """The memory strategy of that solver."""
    like: Any = None
    """An adapter, where one of its kind trains on a fresh model; else everything trains."""
    tokens: float = 0.0

    @property
    def names(self) -> list[str]:
        return self.problem.names

    @cached_property
    def uniform(self) -> dict[str, float]:
        return dict.fromkeys(self.names, 1 / len(self.names))

    def fresh(self, salt: int = 0) -> nn.Module:
        """A model as every training of this search starts from it."""
        return training.fresh(self.problem, self._model_seed(salt), like=self.like, seed=self.seed)

    def path(
        self,
        mixture: dict[str, float],
        *,
        steps: int,
        salt: int = 0,
        rows: Sequence[Rows] | None = None,
    ) -> Iterator[training.Step]:
        """A training on a mixture of the sources or of other rows, step by step."""
        options = {"model_seed": self._model_seed(salt), "like": self.like, "rows": rows}
        for step in training.path(self.problem, mixture, steps=steps, seed=self.seed, **options):
            self.tokens += tokens(step.batch)
            yield step

    def train(self, mixture: dict[str, float], *, steps: int, salt: int = 0) -> nn.Module:
        """The model at the end of a training."""
        return training.end(self.path(mixture, steps=steps, salt=salt))

    def steps(self, spend: float, mixture: dict[str, float] | None = None) -> int:
        """The steps of a training on a mixture (uniform without one) that cost `spend` tokens."""
        mixture = mixture or self.uniform
        lengths = zip(self.names, self.lengths, strict=True)
        row = sum(mixture[name] * length for name, length in lengths)
        return max(1, int(spend / (self.problem.batch * row)))

    @cached_property
    def lengths(self) -> list[float]:
        """Mean tokens of a row of each source."""
        return [mean_length(rows) for rows in self.problem.rows]

    @cached_property
    def target_length(self) -> float:
        """Mean tokens of a row of the targets, by their weights."""
        return sum(t.weight * mean_length(t.rows) for t in self.problem.targets)

    def rows(self, source: Rows, count: int, draw: int = 0) -> Iterator[Batch]:
        """About `count` rows, a random one of each of as many equal parts, in batches of `CHUNK`.

        Equal draws of equal seeds give equal rows. Evenly spaced ones would miss some kinds of rows
        in files that go through their kinds in turn.
        """
        count = min(count, len(source))
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + draw)
        within = torch.rand(count, generator=generator, dtype=torch.float64)
        places = (torch.arange(count) + within) * (len(source) / count)
        chosen = [(0, min(len(source) - 1, int(place))) for place in places]
        for start in range(0, count, CHUNK):
            part = chosen[start : start + CHUNK]
            yield collate([source], part, [1 / count] * len(part))

    def gradient(self, model: nn.Module, source: Rows, count: int, draw: int = 0) -> list[Tensor]:
        """The gradient of the mean loss over about `count` rows, one tensor a parameter."""
        return self._gradient(model, self.rows(source, count, draw))

    def target(self, count: int, draw: int = 0) -> Iterator[Batch]:
        """About `count` rows of all targets; the shares of each add up to its weight."""
        targets = self.problem.targets
        for target, own in zip(targets, shared_out(targets, count), strict=True):
            for batch in self.rows(target.rows, own, draw):
                yield replace(batch, share=target.weight * batch.share)

    def target_gradient(self, model: nn.Module, count: int, draw: int = 0) -> list[Tensor]:
        """That of the weighted target loss over about `count` rows, one tensor a parameter."""
        return self._gradient(model, self.target(count, draw))

    def _gradient(self, model: nn.Module, batches: Iterable[Batch]) -> list[Tensor]:
        moving = [p for p in model.parameters() if p.requires_grad]
        total = [torch.zeros_like(p, dtype=torch.float32) for p in moving]
        for batch in batches:
            losses = self.problem.losses(model, batch).double()
            loss = (batch.share.to(losses.device) * losses).sum()
            found = torch.autograd.grad(loss, moving, allow_unused=True)
            for place, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    place += gradient
            self.tokens += tokens(batch)
        return total

    @torch.no_grad()
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[rows], the loss of each row, on the CPU in float64."""
        self.tokens += FORWARD * tokens(batch)
        return self.problem.losses(model, batch).double().cpu()

    def trial(self, mixture: dict[str, float], spend: float) -> float:
        """The target loss after a training on a mixture, both within `spend` tokens.

        A seventh of the tokens at most goes into evaluation, on as many rows as the verdict takes.
        """
        row, there = FORWARD * self.target_length, sum(len(t.rows) for t in self.problem.targets)
        count = max(8, min(training.EVALUATED, there, int(spend / 7 / row)))
        model = self.train(mixture, steps=self.steps(spend - count * row, mixture))
        parts = list(self.target(count))
        return float(sum((part.share * self.losses(model, part)).sum() for part in parts))

    def train_on_target(self, spend: float) -> nn.Module:
        """A model trained on the targets alone, by their weights, for `spend` tokens."""
        steps = max(1, int(spend / (self.problem.batch * self.target_length)))
        mixture = {target.rows.name: target.weight for target in self.problem.targets}
        rows = [target.rows for target in self.problem.targets]
        return training.end(self.path(mixture, steps=steps, rows=rows))

    def _model_seed(self, salt: int) -> int:
        return 1_000_000 + 1_000 * self.seed + salt


def tokens(batch: Batch) -> int:
    """Tokens of a batch without its padding: up to the last trained one of each row."""
    places = torch.arange(1, batch.trained.shape[1] + 1)
    return int((batch.trained * places).amax(1).sum())


def mean_length(rows: Rows) -> float:
    """Mean tokens of a row, over evenly spaced ones."""
    chosen = range(0, len(rows), max(1, len(rows) // SAMPLED))
    return sum(len(rows.ids[i]) for i in chosen) / len(chosen)


def search_tokens(problem: LLMReweight, counts: dict[str, int]) -> float:
    """What a solver's oracle calls cost, where a product with second derivatives is two gradients.

    Args:
        problem: Whose batches the calls were made on.
        counts: As in a result.
    """
    each = problem.batch // len(problem.rows)
    lower = each * sum(map(mean_length, problem.rows))
    drawn = shared_out(problem.targets, problem.target_batch)
    upper = sum(n * mean_length(t.rows) for n, t in zip(drawn, problem.targets, strict=True))
    total = 0.0
    for name, count in counts.items():
        batch = upper if name.startswith("upper") else lower
        price = 1.0 if name.endswith("_grad") else 2.0
        total += 0.0 if name == "sweeps" else count * price * batch
    return total
