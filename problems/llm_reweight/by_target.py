"""Test losses on each of several targets: before a training, after it, and against uniform."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import nn

from bilevel.problems.llm_reweight import training
from bilevel.problems.llm_reweight.journal import Journal
from bilevel.problems.llm_reweight.paired import differences, interval, spanned
from bilevel.problems.llm_reweight.problem import LLMReweight
from bilevel.problems.llm_reweight.spread import TAIL

Losses = dict[str, float]
"""By target, the mean loss over examples of its test set, nats per token."""


def evaluated(problem: LLMReweight, model: nn.Module) -> Losses:
    """The test loss of a model on each target."""
    return {target.name: training.evaluate(model, target.test) for target in problem.targets}


def weighted(problem: LLMReweight, losses: Losses) -> float:
    """sum_t w_t l_t."""
    return sum(weight * losses[name] for name, weight in problem.target_weights.items())


def untrained(
    problem: LLMReweight, journal: Journal, *, like: Any = None, where: str = ""
) -> list[Losses]:
    """The test losses before a training, for each seed of a verdict; none for one target.

    A pretrained model is the same for every seed. As for `verdict.kept_losses`.
    """
    if len(problem.targets) == 1:
        return []
    seeds = range(problem.verdict_seeds if problem.model == "tiny" else 1)
    return [
        journal.keep(
            {"before": seed, "where": where},
            lambda seed=seed: evaluated(
                problem, training.fresh(problem, 1000 + seed, like=like, seed=seed)
            ),
        )
        for seed in seeds
    ]


def judged(
    problem: LLMReweight, losses: dict[str, list[Losses]], before: Sequence[Losses] = ()
) -> list[dict[str, Any]]:
    """What a verdict says of each target; nothing for one alone.

    Args:
        problem: Whose targets these are.
        losses: By mixture, "learned" and "uniform" among them, an entry for each seed.
        before: Of untrained models.
    """
    if len(problem.targets) == 1:
        return []
    found = []
    for name, weight in problem.target_weights.items():
        own = {mixture: [seed[name] for seed in seeds] for mixture, seeds in losses.items()}
        gains = differences(own["uniform"], own["learned"])
        found.append(
            {
                "name": name,
                "weight": weight,
                "before": [seed[name] for seed in before],
                "losses": own,
                "gain_over_uniform": gains,
                "interval": finite(gains),
            }
        )
    return found


def finite(values: Sequence[float]) -> list[float] | None:
    """The interval of a mean as JSON can hold it, None where one value has none."""
    return list(interval(values)) if len(values) > 1 else None


def sentences(found: Sequence[dict[str, Any]]) -> list[str]:
    """What `judged` found, a sentence for each target."""
    lines = []
    for target in found:
        gains = target["gain_over_uniform"]
        low, high = interval(gains)
        words = "no evidence against uniform"
        words = "better than uniform" if low > 0 else "worse than uniform" if high < 0 else words
        means = {name: statistics.fmean(own) for name, own in target["losses"].items()}
        means = ({"before": statistics.fmean(target["before"])} if target["before"] else {}) | means
        table = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
        lines.append(
            f"on target {target['name']}, weight {target['weight']:.3g}: {words} "
            f"({spanned(gains)}); test loss {table}"
        )
    return lines


def compared(losses: Sequence[Losses], base: Sequence[Losses]) -> dict[str, dict[str, Any]]:
    """For each target the mean loss of a method and its gain over uniform, `base`."""
    found = {}
    for name in losses[0]:
        own, other = ([seed[name] for seed in seeds] for seeds in (losses, base))
        gains = differences(other, own)
        found[name] = {"loss": statistics.fmean(own), "gain_over_uniform": statistics.fmean(gains)}
        found[name]["interval"] = finite(gains)
    return found


def described(problem: LLMReweight, histories: Sequence[Any]) -> list[dict[str, Any]]:
    """The targets as weights.json has them before a verdict.

    `search` holds the loss in the batches of y, the copy that sees the target: its mean over the
    first and over the last quarter of the steps.
    """
    found = []
    for target in problem.targets:
        source = problem.data.targets[target.name]
        found.append(
            {
                "name": target.name,
                "path": source.path,
                "format": source.format,
                "records": len(source.examples),
                "test_records": len(problem.data.tests[target.name].examples),
                "weight": target.weight,
                "search": _ends(histories, target.name),
                "loss": {"before": None, "uniform": None, "learned": None},
                "gain_over_uniform": None,
                "interval": None,
            }
        )
    return found


def filled(
    described: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The targets as weights.json has them after a verdict."""
    found = []
    for target, own in zip(described, judged, strict=True):
        losses = {name: statistics.fmean(own["losses"][name]) for name in ("uniform", "learned")}
        before = statistics.fmean(own["before"]) if own["before"] else None
        gain = statistics.fmean(own["gain_over_uniform"])
        more = {"gain_over_uniform": gain, "interval": own["interval"]}
        found.append({**target, "loss": {"before": before} | losses, **more})
    return found


def whole(filled: Sequence[dict[str, Any]], judged: dict[str, Any]) -> dict[str, Any]:
    """What weights.json tells of all targets by their weights, after a verdict."""
    losses = {
        key: sum(target["weight"] * target["loss"][key] for target in filled)
        for key in filled[0]["loss"]
        if filled[0]["loss"][key] is not None
    }
    gains = judged["gain_over_uniform"]
    return {
        "loss": losses,
        "gain_over_uniform": statistics.fmean(gains),
        "interval": finite(gains),
    }


def _ends(histories: Sequence[Any], name: str) -> dict[str, float | None]:
    """The mean loss in the first and in the last quarter of the steps of all seeds."""
    first, last = [], []
    for history in histories:
        losses = [row["targets"][name] for row in history if row.get("targets")]
        losses = [loss for loss in losses if loss is not None]
        quarter = max(1, int(TAIL * len(losses)))
        first += losses[:quarter]
        last += losses[-quarter:]
    means = (statistics.fmean(own) if own else None for own in (first, last))
    return dict(zip(("first", "last"), means, strict=True))
