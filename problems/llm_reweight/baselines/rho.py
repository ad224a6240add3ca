"""RHO: train on the rows that a model of the target finds easier than the model being trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.problems.llm_reweight import training
from bilevel.problems.llm_reweight.baselines.differences import excess
from bilevel.problems.llm_reweight.baselines.lab import FORWARD, Lab, tokens
from bilevel.problems.llm_reweight.baselines.method import Found, Method, normalized, require
from bilevel.problems.llm_reweight.tokens import Stratified, pick


@dataclass(frozen=True, kw_only=True)
class RHO(Method):
    """The share of each source among the rows of the largest reducible loss, over a training.

        d_i = l_i(model) - l_i(reference),    the reference trained on the target

    At each step the `batch` rows of the largest d_i among `pool` times as many, evenly from all
    sources, are trained on. Weights are the shares among those of the second half.

    Reference: Mindermann et al., Prioritized Training on Points that are Learnable, Worth Learning,
    and Not Yet Learnt, ICML 2022, eq. 3. Deviations: the holdout set is the target; the losses of
    the reference are computed at each step, and counted.
    """

    reference: float = 0.25
    """Share of the budget that training the reference takes."""
    pool: int = 4
    """Rows looked at for one that is trained on."""

    def __post_init__(self) -> None:
        require(self, reference="in (0, 1)", pool="at least 1")

    def search(self, lab: Lab) -> Found:
        problem, before = lab.problem, lab.tokens
        reference = lab.train_on_target(self.reference * lab.budget)
        each = max(1, problem.batch * self.pool // len(lab.names))
        looked = each * len(lab.names)
        kept = max(1, looked // self.pool)
        row = sum(lab.lengths) / len(lab.lengths)
        left = lab.budget - (lab.tokens - before)
        steps = max(2, int(left / (row * (2 * FORWARD * looked + kept))))
        stream = Stratified(problem.rows, rows=[each] * len(lab.names), seed=lab.seed)
        model = lab.fresh()
        optimizer = training.adamw(problem, model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        taken = torch.zeros(len(lab.names))
        for step in range(steps):
            batch = next(stream)
            gaps = excess(lab, lab.losses(model, batch), reference, batch)
            chosen = pick(batch, gaps.topk(kept).indices)
            problem.losses(model, chosen).mean().backward()
            lab.tokens += tokens(chosen)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step >= steps // 2:
                taken += torch.bincount(chosen.source, minlength=len(lab.names))
        return Found(weights=normalized(lab.names, taken.tolist()), note=f"{steps} steps")
