"""Projections on sets that weights live in, Euclidean unless said: boxes, simplices, budgets."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.errors import InputError


def simplex(v: Tensor, total: float = 1.0) -> Tensor:
    """The nearest point of {p >= 0, sum p = total}.

        p = max(v - t, 0) with t such that the sum is right

    Args:
        v: A vector.
        total: Sum of the entries, positive.

    >>> simplex(torch.tensor([1.0, 0.5, -1.0]))
    tensor([0.7500, 0.2500, 0.0000])

    Reference: Held, Wolfe, Crowder, Validation of Subgradient Optimization, 1974.
    """
    ordered = v.sort(descending=True).values
    count = torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)
    shifts = (ordered.cumsum(0) - total) / count
    support = int((ordered > shifts).sum())
    return (v - shifts[max(support, 1) - 1]).clamp(min=0.0)


def sparse_simplex(v: Tensor, keep: int, total: float = 1.0) -> Tensor:
    """A nearest point of the simplex with at most `keep` entries that are not zero.

    The `keep` largest entries are projected on the simplex, the rest are zero. The set is not
    convex; among equal entries the first are kept.

    Args:
        v: A vector.
        keep: Entries that may differ from zero, at least 1.
        total: Sum of the entries, positive.

    >>> sparse_simplex(torch.tensor([0.5, 0.4, 0.3]), 2)
    tensor([0.5500, 0.4500, 0.0000])

    Reference: Kyrillidis, Becker, Cevher, Koch, Sparse projections onto the simplex, ICML 2013
    (1206.1529).
    """
    if keep < 1:
        raise InputError(f"keep must be at least 1, got keep={keep}.")
    kept = v.sort(descending=True, stable=True).indices[:keep]
    return torch.zeros_like(v).index_copy(0, kept, simplex(v[kept], total))


def capped(v: Tensor, budget: float) -> Tensor:
    """The nearest point of {0 <= p <= 1, sum p <= budget}.

        p = clip(v - t, 0, 1) with t = 0 if that is within the budget, else with sum p = budget

    The sum falls in t, piecewise linearly; the piece is found among the sorted kinks.

    Args:
        v: A vector.
        budget: Largest sum, not negative.

    >>> capped(torch.tensor([2.0, 0.5, 0.5]), 1.5)
    tensor([1.0000, 0.2500, 0.2500])
    """
    inside = v.clamp(0.0, 1.0)
    if float(inside.sum()) <= budget:
        return inside
    kinks = torch.cat([v, v - 1.0]).sort().values  # sum p is linear in t between two of these
    low, high = 0, len(kinks) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if float((v - kinks[middle]).clamp(0.0, 1.0).sum()) >= budget:
            low = middle
        else:
            high = middle
    at = (kinks[low] + kinks[high]) / 2
    free = (v > at) & (v < at + 1.0)
    full = (v >= at + 1.0).sum()
    shift = (v[free].sum() + full - budget) / free.sum().clamp(min=1)
    shift = torch.where(free.any(), shift, at)
    return (v - shift).clamp(0.0, 1.0)


def kl_box(p: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The point of {low <= w <= high, sum w = 1} nearest to p in relative entropy, KL(w || p).

        w = clip(t p, low, high) with t such that the sum is 1

    The sum rises in t, piecewise linearly; the piece is found among the sorted kinks. It is the
    projection that a multiplicative step calls for: entries off their bounds keep their ratios.

    Args:
        p: A vector with positive entries.
        low: Its floors, not negative, with a sum of at most 1.
        high: Its ceilings, not below `low`, with a sum of at least 1.

    >>> kl_box(torch.tensor([0.7, 0.2, 0.1]), torch.zeros(3), torch.tensor([0.4, 1.0, 1.0]))
    tensor([0.4000, 0.4000, 0.2000])

    Reference: Herbster, Warmuth, Tracking the Best Linear Predictor, JMLR 2001, section 5, for
    ceilings and floors that are the same for all.
    """
    kinks = torch.cat([low / p, high / p]).sort().values
    kinks = kinks[kinks.isfinite()]
    left, right = 0, len(kinks) - 1
    while right - left > 1:
        middle = (left + right) // 2
        if float((kinks[middle] * p).clamp(low, high).sum()) >= 1:
            right = middle
        else:
            left = middle
    at = (kinks[left] + kinks[right]) / 2
    free = (at * p > low) & (at * p < high)
    held = torch.where(at * p >= high, high, low)[~free].sum()
    scale = (1 - held) / p[free].sum() if bool(free.any()) else at
    return (scale * p).clamp(low, high)
