"""Differences of paired seeds: their mean with its interval, as numbers and in words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def differences(others: Sequence[float], own: Sequence[float]) -> list[float]:
    """By how much each of `own` is below its pair."""
    return [other - mine for other, mine in zip(others, own, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean by Student's t; infinite for one value.

    >>> [round(end, 4) for end in interval([0.30, 0.32, 0.31])]
    [0.2852, 0.3348]
    """
    if len(values) < 2:
        return -float("inf"), float("inf")
    mean, half = statistics.fmean(values), half_interval(values)
    return mean - half, mean + half


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean, t(0.975, n - 1) s / sqrt(n)."""
    from scipy import stats

    spread = statistics.stdev(values) / len(values) ** 0.5
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread


def spanned(values: Sequence[float]) -> str:
    """A mean with its interval, in words."""
    low, high = interval(values)
    if len(values) < 2:
        return f"{values[0]:+.3f} nats in one pair, which has no interval"
    return f"{statistics.fmean(values):+.3f} nats, 95 % interval {low:+.3f} to {high:+.3f}"
