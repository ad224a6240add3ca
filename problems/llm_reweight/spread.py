"""The weights of several seeds: their mean, their deviation, and which these cannot tell apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bilevel.problems.llm_reweight.paired import half_interval

Weights = dict[str, float]
"""The weight of each source by name."""

TAIL = 0.25
"""The last part of a path that is averaged: a single step's weights still hold its noise."""
SETTLED = 0.05
"""Weight that may still move from one source to another in the last quarter of a settled path."""
ALIKE = 0.25
"""Largest mean difference of interchangeable sources, as a share of the mean of both weights."""


def averaged_weights(history: Sequence[dict[str, Any]], *, tail: float = TAIL) -> Weights:
    """Mean of the weights over the last `tail` of the path."""
    return _mean(history[-max(1, int(tail * len(history))) :])


def mean_weights(seeds: Sequence[Weights]) -> Weights:
    """The mean of each weight over the seeds."""
    return {name: statistics.fmean(w[name] for w in seeds) for name in seeds[0]}


def deviations(seeds: Sequence[Weights]) -> dict[str, float | None]:
    """The standard deviation of each weight over the seeds, None where there is one seed alone."""
    if len(seeds) < 2:
        return dict.fromkeys(seeds[0])
    return {name: statistics.stdev(w[name] for w in seeds) for name in seeds[0]}


def drift(history: Sequence[dict[str, Any]]) -> float:
    """How much weight went from source to source between the last quarter and the one before it.

    drift = 1/2 sum_s |w_s - v_s|, from 0 to 1, for the mean weights w and v of the two quarters.
    """
    quarter = max(1, int(TAIL * len(history)))
    if len(history) < 2 * quarter:
        return 1.0
    last, before = _mean(history[-quarter:]), _mean(history[-2 * quarter : -quarter])
    return 0.5 * sum(abs(last[name] - before[name]) for name in last)


def interchangeable(seeds: Sequence[Weights]) -> list[list[str]]:
    """Groups of sources that the seeds cannot tell apart, heaviest first; none for one seed.

    Two sources a and b belong together if, with d = w_a - w_b in each seed, Student's 95 % interval
    of the mean of d holds zero and |mean of d| <= ALIKE (w_a + w_b) / 2 for the mean weights. In a
    group that is so of every pair.
    """
    if len(seeds) < 2:
        return []
    mean = mean_weights(seeds)
    groups: list[list[str]] = []
    for name in sorted(mean, key=lambda name: (-mean[name], name)):
        if groups and all(_alike(seeds, name, other) for other in groups[-1]):
            groups[-1].append(name)
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def sentences(seeds: Sequence[Weights]) -> list[str]:
    """What the spread over seeds says, in words."""
    if len(seeds) < 2:
        return [
            "the spread of the weights over seeds was not measured; seeds=3 measures it, in three "
            "times the time."
        ]
    found = [
        f"sources {', '.join(group[:-1])} and {group[-1]} are interchangeable: over {len(seeds)} "
        "seeds their weights do not differ by more than noise."
        for group in interchangeable(seeds)
    ]
    name, most = max(deviations(seeds).items(), key=lambda item: item[1] or 0.0)
    return [
        *found,
        f"over {len(seeds)} seeds a weight has a standard deviation of at most {most:.3f} ({name})",
    ]


def _alike(seeds: Sequence[Weights], a: str, b: str) -> bool:
    differences = [weights[a] - weights[b] for weights in seeds]
    mean = abs(statistics.fmean(differences))
    both = statistics.fmean(weights[a] + weights[b] for weights in seeds) / 2
    return mean <= ALIKE * both and mean <= half_interval(differences)


def _mean(rows: Sequence[dict[str, Any]]) -> Weights:
    return {n: sum(r["weights"][n] for r in rows) / len(rows) for n in rows[0]["weights"]}
