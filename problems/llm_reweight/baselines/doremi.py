"""DoReMi, which knows no target: weight goes where a model can still catch up with another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.problems.llm_reweight import training
from bilevel.problems.llm_reweight.baselines.differences import by_source, excess
from bilevel.problems.llm_reweight.baselines.lab import FORWARD, Lab, tokens
from bilevel.problems.llm_reweight.baselines.method import Found, Method, normalized, require
from bilevel.problems.llm_reweight.tokens import Stratified


@dataclass(frozen=True, kw_only=True)
class DoReMi(Method):
    """Target-free: it seeks a mixture that does well on every source, not on the target.

        d_s = mean over rows of max(l_i(proxy) - l_i(reference), 0)
        w <- (1 - c) w exp(rate d) / sum_t w_t exp(rate d_t) + c / n

    and the proxy takes a step on sum_s w_s l_s. The reference is trained on the size-proportional
    mixture first. The answer is the mean of w.

    Reference: Xie et al., DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining,
    NeurIPS 2023 (2305.10429), algorithm 1. Deviations: the difference is cut off at zero for each
    row, not for each token; every batch holds equally many rows of every source.
    """

    rate: float = 1.0
    """Step size of the weights."""
    smoothing: float = 1e-3
    """Weight c that is spread evenly at each step."""

    def __post_init__(self) -> None:
        require(self, rate="positive", smoothing="in [0, 1)")

    def search(self, lab: Lab) -> Found:
        problem, count = lab.problem, len(lab.names)
        sizes = normalized(lab.names, [float(len(rows)) for rows in problem.rows])
        before = lab.tokens
        reference = lab.train(sizes, steps=lab.steps(lab.budget / (2 + FORWARD), sizes))
        each = problem.batch // count
        left = lab.budget - (lab.tokens - before)
        steps = max(1, int(left / ((1 + FORWARD) * each * sum(lab.lengths))))
        stream = Stratified(problem.rows, rows=[each] * count, seed=lab.seed)
        model = lab.fresh()
        optimizer = training.adamw(problem, model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
        total = torch.zeros(count, dtype=torch.float64)
        for _ in range(steps):
            batch = next(stream)
            losses = problem.losses(model, batch).double()
            gaps = excess(lab, losses, reference, batch).clamp(min=0.0)
            weights = weights * (self.rate * by_source(gaps, batch, count)).exp()
            weights = (1 - self.smoothing) * weights / weights.sum() + self.smoothing / count
            shares = (weights[batch.source] * batch.share).to(losses.device)
            (shares * losses).sum().backward()
            lab.tokens += tokens(batch)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += weights
        found = normalized(lab.names, total.tolist())
        return Found(weights=found, note=f"target-free: it never saw the target; {steps} steps")
