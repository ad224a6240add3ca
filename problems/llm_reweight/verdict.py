"""The verdict: fresh models trained with several mixtures on paired seeds, compared on the test."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bilevel import optimizer_by_name
from bilevel.lora import Adapter
from bilevel.precision import masters
from bilevel.problems.llm_reweight.model import example_losses
from bilevel.problems.llm_reweight.problem import LLMReweight
from bilevel.problems.llm_reweight.tokens import Rows, collate

LEARNING_RATE = 3e-3  # AdamW with cosine decay; trains the tiny model well, see docs/log.md
TEST_ROWS = 256


def mixtures(problem: LLMReweight, weights: dict[str, float]) -> dict[str, dict[str, float]]:
    """What the verdict compares: learned, uniform and, if it is known, the right source alone."""
    found = {"learned": weights, "uniform": dict.fromkeys(weights, 1 / len(weights))}
    if problem.data.relevant:
        found["oracle"] = {n: float(n == problem.data.relevant[0]) for n in weights}
    return found


def compare(
    problem: LLMReweight, mixtures: dict[str, dict[str, float]], like: Any = None
) -> dict[str, Any]:
    """Train fresh models with every mixture; "learned" and "uniform" must be among them.

    Where `like` is an adapter, of fresh models an adapter of that kind trains; else everything.
    Seeds are paired: the same start, the same order within each source. Returns the test losses
    (mean over examples, nats per token), the paired differences and the sentences to print.
    """
    seeds = range(problem.verdict_seeds)
    losses = {n: [train(problem, m, seed=s, like=like) for s in seeds] for n, m in mixtures.items()}
    gains = [u - w for u, w in zip(losses["uniform"], losses["learned"], strict=True)]
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    gap = means["uniform"] - means.get("oracle", means["uniform"])
    return {
        "steps": problem.verdict_steps,
        "losses": losses,
        "gain_over_uniform": gains,
        "gap_closed": statistics.fmean(gains) / gap if gap > 0 else None,
        "sentences": _sentences(means, gains, gap),
    }


def train(problem: LLMReweight, mixture: dict[str, float], *, seed: int, like: Any = None) -> float:
    """The test loss of a fresh model trained on rows drawn by `mixture`, nats per token."""
    model = problem.fresh_model(1000 + seed)
    if isinstance(like, Adapter):
        model = like.renewed(model, seed=seed)
    rows = problem.rows
    shares = torch.tensor([mixture[n] for n in problem.names], dtype=torch.float64)
    adamw = optimizer_by_name("adamw", LEARNING_RATE, fused=True)
    optimizer = masters(adamw)(list(model.parameters()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, problem.verdict_steps)
    drawn = [0] * len(rows)
    orders = [_order(source, seed) for source in rows]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(problem.verdict_steps):
        picks = []
        for k, count in enumerate(_counts(shares, problem.batch, generator)):
            for _ in range(count):
                picks.append((k, orders[k][drawn[k] % len(rows[k])]))
                drawn[k] += 1
        batch = collate(rows, picks, [1 / len(picks)] * len(picks))
        problem.losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return evaluate(model, problem.test_rows)


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: Rows) -> float:
    """Mean loss per example over evenly spaced rows."""
    chosen = range(0, len(rows), max(1, len(rows) // TEST_ROWS))
    picks = [(0, i) for i in chosen]
    parts = [picks[i : i + 32] for i in range(0, len(picks), 32)]
    losses = [example_losses(model, collate([rows], p, [1.0] * len(p))) for p in parts]
    return float(torch.cat(losses).double().mean())


def _counts(shares: torch.Tensor, total: int, generator: torch.Generator) -> list[int]:
    """Systematic sampling: each count is within one of shares * total, and right on average."""
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    edges = (shares.cumsum(0) / shares.sum() * total + offset).floor().long()
    edges = torch.cat([torch.zeros(1, dtype=torch.long), edges])
    edges[-1] = total
    return edges.clamp(max=total).diff().tolist()


def _order(rows: Rows, seed: int) -> list[int]:
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()


def _sentences(means: dict[str, float], gains: list[float], gap: float) -> list[str]:
    table = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    lines = [f"test loss of fresh models, mean over {len(gains)} paired seeds: {table}"]
    mean, half = statistics.fmean(gains), _half_interval(gains)
    span = f"{mean:+.3f} nats, 95 % interval {mean - half:+.3f} to {mean + half:+.3f}"
    if mean - half > 0:
        won = sum(g > 0 for g in gains)
        lines.append(f"the learned mixture beats uniform in {won} of {len(gains)} seeds ({span})")
    elif mean + half < 0:
        lines.append(f"the learned mixture is worse than uniform ({span})")
    else:
        lines.append(f"no evidence against uniform ({span})")
    if gap > 0:
        share = f"{mean / gap:.0%}"
        lines.append(f"{share} of the gap from uniform to the one right source is closed")
    return lines


def _half_interval(values: list[float]) -> float:
    """Half the 95 % interval of a mean by Student's t; infinite for one value."""
    if len(values) < 2:
        return float("inf")
    from scipy import stats

    spread = statistics.stdev(values) / len(values) ** 0.5
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread
