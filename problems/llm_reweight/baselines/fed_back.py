"""Influence taken again and again, each time after training on the weights that it last gave."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.problems.llm_reweight import training
from bilevel.problems.llm_reweight.baselines.influence import affordable, scores
from bilevel.problems.llm_reweight.baselines.lab import Lab, tokens
from bilevel.problems.llm_reweight.baselines.method import Found, Method, normalized, require


@dataclass(frozen=True, kw_only=True)
class FedBack(Method):
    """One training in rounds, the weights of a round found by influence at the end of the last one.

        w_{k+1} = keep w_k + (1 - keep) a_k / sum a_k
        a_ks = max(cos(grad l_s, grad l_target), 0)

    from uniform w_0, the gradients at the model after round k; the answer is the mean of the
    weights after the first round (of one round, its own). A source whose score is low because it
    has too much weight loses some and scores again, where a single look drops it. Every round looks
    at other rows.

    Reference: ours, after `influence`; where it helps is in docs/when-bilevel.md.
    """

    rounds: int = 6
    """How often the weights are found."""
    keep: float = 0.5
    """What a round keeps of the weights before it."""
    warmup: float = 0.75
    """Share of the budget that the training takes, at most; the gradients have the rest."""

    def __post_init__(self) -> None:
        require(self, rounds="at least 1", keep="in [0, 1)", warmup="in (0, 1)")

    def search(self, lab: Lab) -> Found:
        problem = lab.problem
        steps = max(1, lab.steps(self.warmup * lab.budget) // self.rounds)
        count = affordable(lab, (1 - self.warmup) * lab.budget / self.rounds)
        model = lab.fresh()
        optimizer = training.adamw(problem, model)
        weights, path = list(lab.uniform.values()), []
        for number in range(self.rounds):
            seed = 1_000 * lab.seed + number
            rows = training.Drawn(problem.rows, weights, total=problem.batch, seed=seed)
            for _ in range(steps):
                batch = next(rows)
                lab.tokens += tokens(batch)
                problem.losses(model, batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            looked = scores(lab, model, count, measure="cosine", draw=number)
            found = [max(a, 0.0) for a in looked]
            if sum(found) > 0:
                weights = [
                    self.keep * w + (1 - self.keep) * a / sum(found)
                    for w, a in zip(weights, found, strict=True)
                ]
            path.append(weights)
        mean = torch.tensor(path[1:] or path, dtype=torch.float64).mean(0).tolist()
        return Found(weights=normalized(lab.names, mean))
