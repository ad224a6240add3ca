"""The lower level by compiled loops: descent on y, and the linear solve at its end."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from bilevel.compiled import Compiled, Solved
from bilevel.descent import note_solve, plus, zeros
from bilevel.errors import InputError
from bilevel.linear import CG, LinearResult, LinearStatus
from bilevel.oracle import Gradients, Oracle, Vector
from bilevel.solver import State, finite_loss
from bilevel.staged import Staged, plain_step
from bilevel.tree import leaves, norm

STATUS = {1: LinearStatus.CURVATURE, 2: LinearStatus.DIVERGED}


def descend(lower: Staged[Compiled], state: State, *, steps: int) -> None:
    """As `bilevel.descent.descend` to rounding; steps in turn on one batch are one call.

    Whether g is finite is seen by `implicit_gradient`.

    Raises:
        InputError: If y does not move by its gradient alone.
    """
    y = state.variables["y"]
    lr = plain_step(y)
    if lr is None:
        raise InputError("engine=compiled needs a y that plain sgd moves; use engine=traced.")
    own = [p.detach() for p in leaves(y.value)]
    batches = [next(state.streams["lower"]) for _ in range(steps)]
    for _, part in groupby(batches, key=id):
        turns = list(part)
        found = lower.at(own, turns[0]).descend(own, steps=len(turns), lr=lr)
        for p, q in zip(own, found, strict=True):
            p.copy_(q)
    state.counts["lower_grad"] += steps


def implicit_gradient(
    lower: Staged[Compiled],
    oracle: Oracle,
    state: State,
    upper: Gradients,
    batch: Any,
    linear: CG,
    start: Vector | None,
) -> Vector:
    """As `bilevel.descent.implicit_gradient` to rounding, gradient, solve and J'v in one call."""
    x, y = state.variables["x"], state.variables["y"]
    own = [p.detach() for p in leaves(y.value)]
    start = None if linear.steps == 1 else start
    begun = int(start is not None)  # then one of the products judges it
    found = lower.at(own, batch).solve(
        own,
        upper.y,
        zeros(own) if start is None else start,
        steps=linear.steps - begun,
        tolerance=linear.tolerance,
        damping=linear.damping,
    )
    state.lower = finite_loss("lower", found.scalar, oracle.problem, x, y, batch)
    state.counts["lower_grad"] += 1
    state.counts["hvp"] += found.steps + begun
    state.counts["cross"] += 1
    result = LinearResult(
        solution=found.solution,
        residual=found.residual,
        products=found.steps + begun,
        status=_status(found, upper.y, linear),
    )
    note_solve(state, upper, found.values, result)
    return plus(upper.x, found.pulled, -1.0)


def _status(found: Solved, b: Vector, linear: CG) -> LinearStatus:
    if found.residual <= linear.tolerance * norm(b):
        return LinearStatus.CONVERGED
    return STATUS.get(found.stop, LinearStatus.STEPS)
