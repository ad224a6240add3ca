"""Fresh models trained on a mixture; for a seed every mixture has the same start and row orders."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bilevel import optimizer_by_name
from bilevel.lora import Adapter
from bilevel.precision import masters
from bilevel.problems.llm_reweight.model import example_losses
from bilevel.problems.llm_reweight.problem import LLMReweight
from bilevel.problems.llm_reweight.tokens import Batch, Rows, collate

EVALUATED = 256  # rows, about; twice as many where there are


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a training stands after a step, and the batch of that step."""

    number: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch


def path(
    problem: LLMReweight,
    mixture: dict[str, float],
    *,
    steps: int,
    seed: int,
    like: Any = None,
    model_seed: int | None = None,
    rows: Sequence[Rows] | None = None,
) -> Iterator[Step]:
    """Train a fresh model on rows drawn by `mixture`: AdamW, its step size falling by a cosine.

    Args:
        problem: Whose sources, model, batch size and `verdict_lr` are used.
        mixture: The share of each source, by name.
        steps: Of the whole training.
        seed: Of the rows that are drawn.
        like: An adapter, where one of its kind trains on the model; else everything trains.
        model_seed: Of random weights; 1000 + seed without it.
        rows: What is mixed; the sources without it.
    """
    model = fresh(problem, 1000 + seed if model_seed is None else model_seed, like=like, seed=seed)
    sources = rows or problem.rows
    shares = [mixture[source.name] for source in sources]
    drawn = Drawn(sources, shares, total=problem.batch, seed=seed)
    yield from trained(problem, model, drawn, steps=steps)


def trained(
    problem: LLMReweight, model: nn.Module, batches: Iterator[Batch], *, steps: int
) -> Iterator[Step]:
    """Train a model on batches, as `path` does."""
    optimizer = adamw(problem, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number in range(1, steps + 1):
        batch = next(batches)
        problem.losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield Step(number=number, model=model, optimizer=optimizer, batch=batch)


def fit(
    problem: LLMReweight, mixture: dict[str, float], *, steps: int, seed: int, like: Any = None
) -> nn.Module:
    """The model at the end of `path`."""
    return end(path(problem, mixture, steps=steps, seed=seed, like=like))


def end(training: Iterable[Step]) -> nn.Module:
    """The model at the end of a training, of which no batch is kept."""
    (last,) = deque(training, maxlen=1)
    return last.model


def fresh(problem: LLMReweight, model_seed: int, *, like: Any = None, seed: int = 0) -> nn.Module:
    """A model as every training starts from it, or an adapter like `like` on such a model."""
    if not isinstance(like, Adapter):
        return problem.fresh_model(model_seed)
    with like.options.loading():
        base = problem.fresh_model(model_seed)
    return like.renewed(base, seed=seed)


def adamw(problem: LLMReweight, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what trains, with float32 masters where the model is in half precision."""
    make = optimizer_by_name("adamw", problem.verdict_lr, fused=True)
    return masters(make)(list(model.parameters()))


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows) -> float:
    """Mean loss per example over evenly spaced rows, nats per token."""
    chosen = range(0, len(rows), max(1, len(rows) // EVALUATED))
    picks = [(0, i) for i in chosen]
    parts = [picks[i : i + 32] for i in range(0, len(picks), 32)]
    losses = [example_losses(model, collate([rows], p, [1.0] * len(p))) for p in parts]
    return float(torch.cat(losses).double().mean())


class Drawn(Iterator[Batch]):
    """Batches of `total` rows drawn by the shares of the sources, each in its own random order."""

    def __init__(
        self, rows: Sequence[Rows], shares: Sequence[float], *, total: int, seed: int
    ) -> None:
        self.rows, self.total = rows, total
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self._drawn = [0] * len(rows)
        self._orders = [_order(source, seed) for source in rows]

    def __next__(self) -> Batch:
        picks = []
        for k, count in enumerate(counts(self.shares, self.total, self.generator)):
            for _ in range(count):
                place = self._drawn[k] % len(self.rows[k])
                picks.append((k, int(self._orders[k][place])))
                self._drawn[k] += 1
        return collate(self.rows, picks, [1 / len(picks)] * len(picks))


def counts(shares: torch.Tensor, total: int, generator: torch.Generator) -> list[int]:
    """Systematic sampling: each count is within one of shares * total, and right on average."""
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    edges = (shares.cumsum(0) / shares.sum() * total + offset).floor().long()
    edges = torch.cat([torch.zeros(1, dtype=torch.long), edges])
    edges[-1] = total
    return edges.clamp(max=total).diff().tolist()


def _order(rows: Rows, seed: int) -> torch.Tensor:
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).int()
