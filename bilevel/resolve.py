"""Solve the lower level again at a given x: the y that honest numbers are taken at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.errors import InputError
from bilevel.linear import CG, LinearStatus, norm
from bilevel.oracle import Oracle, Vector
from bilevel.problem import Problem, constrained
from bilevel.tree import (
    Value,
    clone,
    flatten,
    leaves,
    map_leaves,
    shape_faults,
    snapshot,
    unflatten,
)

POLISH = 5  # Newton steps after L-BFGS, which alone stops near the square root of the precision


@dataclass(frozen=True, kw_only=True)
class Lower:
    """The lower level solved at one x, on all data.

    `gradient` is |grad_y g|, or the length of a projected gradient step of size 1 where y is
    constrained; `upper` is f(x, y), the honest upper loss; `gradients` were spent.
    """

    y: Value
    lower: float
    upper: float
    gradient: float
    gradients: int
    converged: bool

    def __repr__(self) -> str:
        state = "solved" if self.converged else "NOT solved"
        return (
            f"Lower({state}: upper {self.upper:.6g}, lower {self.lower:.6g}, "
            f"|grad_y g| {self.gradient:.2g}, {self.gradients} gradients)"
        )


def resolve(
    problem: Problem,
    x: Value,
    y: Value | None = None,
    *,
    tolerance: float = 1e-8,
    steps: int = 2000,
) -> Lower:
    """y*(x) = argmin_y g(x, y) on all data, whatever the scale of g.

    Solved means that the gradient fell by `tolerance`, or that a Newton step is shorter than that,
    relative to 1 + |y|; where Y is constrained, that a projected gradient step of size 1 is.

    A penalty method's own y is trained partly on the upper loss and flatters itself; reports and
    comparisons use this one. SciPy's L-BFGS, then a few Newton steps; where Y is constrained,
    accelerated projected gradients.

    Args:
        problem: Whose lower level is solved, on the batches of `Problem.whole`.
        x: Upper variable.
        y: Start; the problem's own without it. It stays as it is.
        tolerance: Relative, as above.
        steps: Most iterations.

    Raises:
        InputError: If the lower loss or its gradient is not finite at the start; without a `y` also
            if x is not shaped as the problem's.

    >>> from bilevel.problems.quadratic import Quadratic
    >>> problem = Quadratic()
    >>> x = torch.ones(3, dtype=torch.float64)
    >>> bool(torch.allclose(resolve(problem, x).y, problem.solution().lower(x)))
    True

    Reference: Liu and Nocedal, 1989 (L-BFGS); Beck and Teboulle, FISTA, 2009, with the restart of
    O'Donoghue and Candes, 2015.
    """
    if y is None:
        like, y = problem.init(torch.Generator().manual_seed(0))
        if faults := shape_faults("x", x, like):
            raise InputError(faults)
    y = clone(y)
    upper_batch, batch = problem.whole()
    oracle = Oracle(problem, {})
    start = oracle.lower(x, y, batch)
    if not torch.isfinite(torch.tensor([start.value, norm(start.y)])).all():
        raise InputError(
            f"the lower loss is {start.value} with a gradient of norm {norm(start.y)} where "
            "resolve starts; pass a finite start y."
        )
    goal = tolerance * norm(start.y)
    if constrained(problem, "lower"):
        goal = tolerance * max(1.0, norm(start.y))
        size = _projected(problem, oracle, x, y, batch, goal, steps)
        converged = size <= goal
    else:
        _lbfgs(oracle, x, y, batch, goal, steps)
        size, short = _newton(oracle, x, y, batch, goal, tolerance)
        converged = size <= goal or short
    with torch.no_grad():
        parts = [problem.upper(x, y, part) for part in problem.split(upper_batch)]
    return Lower(
        y=y if isinstance(y, torch.nn.Module) else _detached(y),
        lower=oracle.lower(x, y, batch).value,
        upper=float(sum(map(float, parts))),
        gradient=size,
        gradients=oracle.counts["lower_grad"],
        converged=converged,
    )


def _lbfgs(oracle: Oracle, x: Value, y: Value, batch: object, goal: float, steps: int) -> None:
    import numpy as np
    from scipy.optimize import minimize

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        _assign(y, unflatten(torch.as_tensor(flat), leaves(y)))
        here = oracle.lower(x, y, batch)
        return here.value, flatten(here.y).double().cpu().numpy()

    start = flatten(snapshot(y)).double().cpu().numpy()
    tolerance = goal / len(start) ** 0.5
    options = {"maxiter": steps, "maxfun": 2 * steps, "ftol": 0.0, "gtol": tolerance}
    found = minimize(evaluate, start, jac=True, method="L-BFGS-B", options=options)
    _assign(y, unflatten(torch.as_tensor(found.x), leaves(y)))


def _newton(
    oracle: Oracle, x: Value, y: Value, batch: object, goal: float, tolerance: float
) -> tuple[float, bool]:
    """Newton steps by conjugate gradients while they lower the gradient.

    Returns its norm, and whether the last step was shorter than tolerance (1 + |y|).
    """
    here = oracle.lower(x, y, batch)
    size, short = norm(here.y), False
    for _ in range(POLISH):
        if size <= goal or short:
            break
        try:
            bend = oracle.curvature(x, y, batch)
            result = CG(steps=50, tolerance=1e-8).solve(bend.hvp, here.y)
        except RuntimeError:  # no second derivatives: L-BFGS has to do
            break
        if result.status is LinearStatus.CURVATURE:
            break
        before = snapshot(y)
        eps = max(torch.finfo(p.dtype).eps for p in before)
        short = norm(result.solution) <= max(tolerance, 100 * eps) * (1 + norm(before))
        _assign(y, [p - v for p, v in zip(before, result.solution, strict=True)])
        here = oracle.lower(x, y, batch)
        if not norm(here.y) < size:
            _assign(y, before)
            break
        size = norm(here.y)
    return size, short


def _projected(
    problem: Problem,
    oracle: Oracle,
    x: Value,
    y: Value,
    batch: object,
    goal: float,
    steps: int,
) -> float:
    """Accelerated projected gradients with backtracking; returns the length of a unit step."""
    size, momentum = 1.0, 1.0
    _assign(y, leaves(problem.project_lower(y)))
    point = snapshot(y)
    previous = point
    for _ in range(steps):
        _assign(y, point)
        here = oracle.lower(x, y, batch)
        while True:
            _assign(y, [p - size * g for p, g in zip(point, here.y, strict=True)])
            with torch.no_grad():
                _assign(y, leaves(problem.project_lower(y)))
            new = snapshot(y)
            move = [a - b for a, b in zip(new, point, strict=True)]
            with torch.no_grad():
                value = sum(float(problem.lower(x, y, part)) for part in problem.split(batch))
            slope = sum(float((g * m).sum()) for g, m in zip(here.y, move, strict=True))
            room = 1e-12 * max(1.0, abs(here.value))
            if value <= here.value + slope + norm(move) ** 2 / (2 * size) + room or size < 1e-12:
                break
            size /= 2
        if norm(move) <= goal * min(1.0, size):
            break
        step = [a - b for a, b in zip(new, previous, strict=True)]
        if sum(float((m * s).sum()) for m, s in zip(move, step, strict=True)) < 0:
            momentum = 1.0  # it has overshot: begin again
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        factor = (momentum - 1) / following
        point = [n + factor * s for n, s in zip(new, step, strict=True)]
        previous, momentum = new, following
    return _unit_step(problem, oracle, x, y, batch)


def _unit_step(problem: Problem, oracle: Oracle, x: Value, y: Value, batch: object) -> float:
    """The length of a projected gradient step of size 1, which is not taken."""
    here = oracle.lower(x, y, batch)
    before = snapshot(y)
    _assign(y, [p - g for p, g in zip(before, here.y, strict=True)])
    with torch.no_grad():
        moved = snapshot(problem.project_lower(y))
    _assign(y, before)
    return norm([a - b for a, b in zip(moved, before, strict=True)])


def _detached(y: Value) -> Value:
    return map_leaves(torch.Tensor.detach, y)


def _assign(y: Value, tensors: Vector) -> None:
    with torch.no_grad():
        for p, t in zip(leaves(y), [t.clone() for t in tensors], strict=True):
            p.copy_(t)
