"""MixMin: one model per source; the mixture of their predictions that fits the target best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bilevel import InputError
from bilevel.problems.llm_reweight.baselines.lab import FORWARD, Lab, tokens
from bilevel.problems.llm_reweight.baselines.method import Found, Method
from bilevel.problems.llm_reweight.losses import token_losses
from bilevel.problems.llm_reweight.tokens import Batch


@dataclass(frozen=True, kw_only=True)
class MixMin(Method):
    """min over the simplex of the mean over tokens of -log sum_s w_s p_s(token), which is convex.

    p_s are the predictions of a model trained on source s alone, with an equal part of the budget.
    The mean is over the target's rows, of each row's trained tokens, and over several targets by
    their weights, as everywhere here.

    Reference: Thudi, Rovers, Ruan, Thrush, Maddison, MixMin: Finding Data Mixtures via Convex
    Minimization, ICML 2025 (2502.10510), eq. 2 and algorithm 1. Deviation: the multiplicative
    update of `simplex_fit` in place of exponentiated gradient with a chosen step size.
    """

    def search(self, lab: Lab) -> Found:
        there = sum(len(target.rows) for target in lab.problem.targets)
        row = sum(lab.lengths) / len(lab.lengths)
        count = min(there, max(32, int(0.1 * lab.budget / (FORWARD * row * len(lab.names)))))
        reserved = count * FORWARD * row * len(lab.names)
        share = max(lab.budget - reserved, 0.5 * lab.budget) / len(lab.names)
        columns, shares = [], torch.empty(0)
        for name in lab.names:
            only = {n: float(n == name) for n in lab.names}
            model = lab.train(only, steps=lab.steps(share, only))
            parts = []
            for batch in lab.target(count):
                parts.append(log_likelihoods(model, batch, chunk=lab.problem.loss_chunk))
                lab.tokens += FORWARD * tokens(batch)
            columns.append(torch.cat([values for values, _ in parts]))
            shares = torch.cat([share for _, share in parts])
        weights, gap = simplex_fit(torch.stack(columns, 1), shares)
        alone = ", ".join(
            f"{n} {-float(shares @ c):.3f}" for n, c in zip(lab.names, columns, strict=True)
        )
        note = f"target loss of each model: {alone}; within {gap:.1g} nats of the minimum"
        return Found(weights=dict(zip(lab.names, weights.tolist(), strict=True)), note=note)


@torch.no_grad()
def log_likelihoods(model: nn.Module, batch: Batch, *, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """The log-probability of each trained token and its share of the mean over rows, [tokens] each.

    Rows count by `batch.share`, the tokens of a row equally.
    """
    device = next(model.parameters()).device
    losses = token_losses(model, batch.ids.to(device), chunk=chunk).double().cpu()
    trained = batch.trained[:, 1:]
    shares = (batch.share / trained.sum(1)).unsqueeze(1).expand_as(trained)
    return -losses[trained], shares[trained]


def simplex_fit(
    logs: Tensor, shares: Tensor, *, tolerance: float = 1e-6, iterations: int = 20_000
) -> tuple[Tensor, float]:
    """The weights w of the simplex that minimize F(w) = -sum_i a_i log sum_s w_s exp(logs_is).

        w_s <- w_s g_s,    g_s = sum_i a_i exp(logs_is) / sum_t w_t exp(logs_it)

    is the step of expectation maximization; F never rises, and F(w) - min F <= max_s g_s - 1 since
    F is convex and sum_s w_s g_s = 1. That bound ends the iteration.

    Args:
        logs: [n, sources], log-probabilities.
        shares: [n], a, adding up to 1.
        tolerance: Of F, in nats.
        iterations: At most.

    Returns:
        The weights [sources] and the bound on how far F is from its minimum.

    >>> logs = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).double().log()
    >>> simplex_fit(logs, torch.tensor([0.75, 0.25]).double())[0]
    tensor([0.9167, 0.0833], dtype=torch.float64)
    """
    if abs(float(shares.sum()) - 1) > 1e-6:
        raise InputError(f"shares must add up to 1, got {float(shares.sum())}.")
    likely = (logs - logs.amax(1, keepdim=True)).exp()
    w = torch.full((logs.shape[1],), 1 / logs.shape[1], dtype=logs.dtype)
    gap = float("inf")
    for _ in range(iterations):
        g = (shares / (likely @ w)) @ likely
        gap = float(g.max()) - 1
        if gap <= tolerance:
            break
        w = w * g
        w = w / w.sum()
    return w, gap
