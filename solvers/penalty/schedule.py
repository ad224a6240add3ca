"""When the penalty may grow: while its bias, not the inner steps, limits the estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.problem import Problem, constrained
from bilevel.solvers.penalty.sweeps import Point, Seen
from bilevel.tree import dot, norm, snapshot
from bilevel.variable import Variable


@dataclass(frozen=True)
class End:
    """An inner step near the end: the residual r of the copies, the batches, |grad_y f| at y."""

    residual: list[Tensor]
    batches: tuple[Any, Any]
    pull: float


def end(problem: Problem, points: Sequence[Point], seen: Seen, batches: tuple[Any, Any]) -> End:
    """What the gathered gradients leave of the linear system that the copies solve together.

        r = (1/nu) sum_j c_j grad_y (g + nu_j f)(y_j) = grad_y f + H v + O(nu^p),
        v = (1/nu) sum_j c_j y_j

    J^T H^{-1} r is the error of dF that it leaves. An error that the copies share is not in r, nor
    is noise of grad_y g that they share; what noise is left does not depend on nu. Where Y is
    constrained y_j - P(y_j - gradient) takes the place of the gradient, which need not vanish.

    Args:
        problem: Whose projection P is.
        points: The copies, y first.
        seen: Of the sweep at y, with its pull.
        batches: Of the sweeps.
    """
    slopes = _move if constrained(problem, "lower") else Variable.gradient
    total = [points[0].share * g for g in slopes(points[0].copy)]
    for point in points[1:]:
        for sum_, g in zip(total, slopes(point.copy), strict=True):
            sum_.add_(g, alpha=point.share)
    return End(total, batches, seen.pull / points[0].weight)


def lag(ends: Sequence[End]) -> float:
    """|r| / |grad_y f|, the relative residual at the end of the inner steps, without noise.

    Where the last two steps had batches of their own, noise cancels in <r, r'>, whose mean is that
    of |r|^2 without it; there the answer is sqrt(max(0, <r, r'>)) / |grad_y f|. It errs either way,
    and where noise is all there is lets the penalty grow in every other step.

    Args:
        ends: Of the last two inner steps, the newest last, or of one where there is no more.
    """
    first, last = ends[0], ends[-1]
    if not last.pull:
        return 0.0
    if all(a is b for a, b in zip(first.batches, last.batches, strict=True)):
        return norm(last.residual) / last.pull
    return max(0.0, float(dot(first.residual, last.residual))) ** 0.5 / last.pull


def _move(copy: Variable) -> list[Tensor]:
    """What a projected gradient step of size 1 would move a copy by, downhill; it stays."""
    here = snapshot(copy.value)
    copy.assign([p - g for p, g in zip(here, copy.gradient(), strict=True)])
    assert copy.project is not None
    with torch.no_grad():
        there = snapshot(copy.project(copy.value))
    copy.assign(here)
    return [p - q for p, q in zip(here, there, strict=True)]
