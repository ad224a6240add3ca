"""The verdict: fresh models trained with several mixtures on paired seeds, compared on the test."""

from __future__ import annotations

import statistics
from typing import Any

from bilevel.problems.llm_reweight.problem import LLMReweight
from bilevel.problems.llm_reweight.training import evaluate, fit


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
    return judged(problem, losses)


def judged(problem: LLMReweight, losses: dict[str, list[float]]) -> dict[str, Any]:
    """The verdict on test losses by mixture and seed."""
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
    model = fit(problem, mixture, steps=problem.verdict_steps, seed=seed, like=like)
    return evaluate(model, problem.test_rows)


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
