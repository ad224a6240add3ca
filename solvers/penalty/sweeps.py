"""Passes over the copies of y that all penalty methods share, and what is read off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.descent import finite_norm
from bilevel.launch import Launcher
from bilevel.problem import Problem
from bilevel.solver import State, finite_loss
from bilevel.tree import dot, dtypes, leaves
from bilevel.variable import Variable

ROUNDING = 64  # roundings of the losses below which a difference of them says nothing


@dataclass(frozen=True, kw_only=True)
class Point:
    """A copy of y that minimizes h = scale g + weight f, and the share of h in the step of x."""

    copy: Variable
    weight: float
    share: float
    scale: float = 1.0


@dataclass(frozen=True)
class Seen:
    """The losses of one sweep at one copy; f is 0 where it has no weight."""

    upper: float
    lower: float
    pull: float = 0.0
    """|weight grad_y f|, where it was asked for."""

    def at(self, point: Point) -> float:
        """h = scale g + weight f."""
        return point.scale * self.lower + point.weight * self.upper

    def noise(self, point: Point) -> float:
        """What rounding may have added to h."""
        eps = max(torch.finfo(kind).eps for kind in dtypes(point.copy.value))
        size = abs(point.scale * self.lower) + abs(point.weight * self.upper)
        return ROUNDING * eps * size


def sweep(
    problem: Problem,
    launcher: Launcher,
    state: State,
    point: Point,
    batches: tuple[Any, Any],
    *,
    measured: bool = False,
) -> Seen:
    """One pass of h at a copy, forward and backward; x gathers share grad_x h.

    Args:
        problem: The two losses.
        launcher: Runs the backward passes.
        state: Holds x; counts the gradients.
        point: The copy and its weights.
        batches: Of the upper and the lower loss.
        measured: Whether the norm of what f adds to the copy's gradient is wanted.

    Raises:
        NonFiniteError: If a loss is not finite.
    """
    x, copy = state.variables["x"], point.copy
    copy.fetch()
    upper = lower = size = 0.0
    with x.weighted(point.share):
        if point.weight:
            parts = launcher.parts(problem, batches[0])
            for part in parts:
                loss = problem.upper(x.value, copy.value, part)
                launcher.backward(point.weight * loss, last=measured and part is parts[-1])
                upper += float(loss.detach())
            state.counts["upper_grad"] += 1
            if measured:
                size = launcher.gathered(copy)
        parts = launcher.parts(problem, batches[1])
        for part in parts:
            loss = problem.lower(x.value, copy.value, part)
            scaled = loss if point.scale == 1.0 else point.scale * loss
            launcher.backward(scaled, last=part is parts[-1])
            lower += float(loss.detach())
    state.counts["lower_grad"] += 1
    state.counts["sweeps"] += 1
    seen = Seen(*launcher.total([upper, lower]), pull=size)
    told = explained(launcher, batches) or (None, None)
    finite_loss("upper", seen.upper, problem, x, copy, told[0])
    finite_loss("lower", seen.lower, problem, x, copy, told[1])
    return seen


def explained(launcher: Launcher, batches: tuple[Any, Any]) -> tuple[Any, ...]:
    """The batches that a problem may explain a number with that is not finite.

    None on several processes: each would look at its own share, and wait for the others.
    """
    return batches if launcher.world_size == 1 else ()


def clip(
    problem: Problem, x: Variable, copies: Sequence[Variable], largest: float, *batches: Any
) -> list[float]:
    """Clip what each copy gathered to a norm, each by itself; 0 clips nothing.

    Returns:
        The norms before.

    Raises:
        NonFiniteError: If a norm is not finite.
    """
    norms = [finite_norm(problem, x, copy, *batches) for copy in copies]
    for copy, length in zip(copies, norms, strict=True):
        if largest:
            copy.clip(largest, length)
    return norms


def pull(copy: Variable, centers: Sequence[Tensor], rho: float) -> None:
    """Add the gradient of |y - center|^2 / 2 rho to what a copy gathered, where it may move."""
    for p, center in zip(leaves(copy.value), centers, strict=True):
        if p.grad is not None:
            p.grad.add_(p.detach() - center, alpha=1 / rho)


def draw_in(points: Sequence[Point], factor: float) -> None:
    """Move the copies to where they belong at `factor` times their weights, to first order.

        y_j <- c + factor (y_j - c),    c the copy of weight 0, or the mean of the opposite two

    since y_j = y* + j nu d + O(nu^2): without it, copies lag behind a growing penalty.
    """
    if factor == 1.0:
        return
    near = sorted(points, key=lambda point: abs(point.weight))
    middle = near[:1] if near[0].weight == 0 else near[:2]
    columns = zip(*(leaves(point.copy.value) for point in middle), strict=True)
    centers = [torch.stack([p.detach() for p in column]).mean(0) for column in columns]
    for point in points:
        point.copy.assign(
            [
                c.lerp(p.detach(), factor)
                for c, p in zip(centers, leaves(point.copy.value), strict=True)
            ]
        )


def bends_down(anchor: Point, probe: Point, seen: tuple[Seen, Seen], rho: float = 0.0) -> bool:
    """Whether h of a probe has negative curvature between the probe z and an anchor y.

        h(y) - h(z) - <grad_y h(z), y - z> < 0,    with |y - z|^2 / 2 rho added if rho > 0

    up to rounding. It costs one inner product: the sweep has left losses and gradient. Where part
    of y is not trained now, the answer is no.
    """
    y, z = leaves(anchor.copy.value), leaves(probe.copy.value)
    slopes = [p.grad for p in z if p.grad is not None]
    if len(slopes) < len(z):
        return False
    gaps = [(a - b).detach() for a, b in zip(y, z, strict=True)]
    slope = float(dot(slopes, gaps))
    moved = Point(copy=anchor.copy, weight=probe.weight, share=0.0, scale=probe.scale)
    gain = seen[0].at(moved) - seen[1].at(probe) - slope
    if rho:
        gain += float(dot(gaps, gaps)) / (2 * rho)
    return gain < -(seen[0].noise(moved) + seen[1].noise(probe))
