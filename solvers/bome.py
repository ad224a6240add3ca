"""BOME: first-order steps on f that a dynamic barrier keeps descending on the lower gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bilevel.descent import begin, converged, plus, step_with_upper
from bilevel.errors import NonFiniteError
from bilevel.launch import Launcher
from bilevel.linear import norm
from bilevel.memory import Memory
from bilevel.oracle import Oracle, Vector
from bilevel.problem import Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, require
from bilevel.tree import dot, leaves
from bilevel.variable import Variable, optimizer_by_name


@dataclass(frozen=True, kw_only=True)
class BOME(Solver):
    """Bilevel optimization made easy: no penalty to choose, no second derivatives.

    z is y after `inner_steps` gradient steps on g, and q = g(x, y) - g(x, z), z a constant. Then

        lam = max((phi - <grad f, grad q>) / |grad q|^2, 0),   phi = barrier |grad q|^2 or barrier q
        (x, y) <- (x, y) - lr (grad f + lam grad q)

    with grad over (x, y), so that <grad q, grad f + lam grad q> >= phi. An upper step costs
    `inner_steps` + 1 gradients of g and one of f. `numbers` show lam as "multiplier", and q. Where
    it ends, x is off by O(lr), and by what `inner_steps` of unrolled differentiation leave out.

    Reference: Liu, Ye, Wright, Stone, Liu, BOME! Bilevel Optimization Made Easy, 2022 (2209.08709).
    Deviations: x and y may have their own step sizes and optimizers; equal ones of sgd are the
    paper's. |grad q|^2 is kept above 1e-12. lam is a ratio of noisy numbers on small batches.
    """

    order: ClassVar[int] = 1

    inner_steps: int = 10
    """Gradient steps from y to z."""
    inner_lr: float = 0.0
    """Step size of z; 0 takes `lower_lr`."""
    barrier: float = 0.5
    """Share of |grad q|^2, or of q, that every step removes."""
    phi: Literal["gradient", "value"] = "gradient"
    """Whether the barrier is a share of |grad q|^2 or of q."""
    upper_optimizer: str = "sgd"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_optimizer: str = "sgd"
    """A torch.optim optimizer for y."""
    lower_lr: float = 1e-2
    """Step size of y."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        require(
            self,
            inner_steps="at least 1",
            inner_lr="non-negative",
            barrier="positive",
            tolerance="non-negative",
        )

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower)
        inner = optimizer_by_name("sgd", self.inner_lr or self.lower_lr)
        state.variables["z"] = launcher.twin(state.variables["y"], "z", inner)
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        x, y, z = (state.variables[name] for name in "xyz")
        state.memory.before_step(state.step, [y, z])
        oracle = Oracle(problem, state.counts)
        batches = {level: next(state.streams[level]) for level in ("upper", "lower")}
        upper = oracle.upper(x.value, y.value, batches["upper"])
        lower = oracle.lower(x.value, y.value, batches["lower"])
        along_y = [_trained(y, g) for g in (upper.y, lower.y)]
        self._descend(launcher, oracle, state, along_y[1], batches["lower"])
        far = oracle.lower(x.value, z.value, batches["lower"])
        f = [*upper.x, *along_y[0]]
        q = [*plus(lower.x, far.x, -1.0), *along_y[1]]
        gap = lower.value - far.value
        multiplier = self._multiplier(float(dot(f, q)), float(dot(q, q)), gap)
        state.upper, state.lower = upper.value, lower.value
        state.numbers |= {
            "multiplier": multiplier,
            "q": gap,
            "lower_gradient": norm(lower.y),
        }
        direction = plus(f, q, multiplier)
        if not all(bool(g.isfinite().all()) for g in direction):
            raise NonFiniteError("the gradient of x or y is not finite")
        x.clear()
        x.gather(direction[: len(upper.x)])
        _gather(y, direction[len(upper.x) :])
        step_with_upper(launcher, state, [y])
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def _multiplier(self, inner: float, square: float, gap: float) -> float:
        phi = self.barrier * (square if self.phi == "gradient" else gap)
        return max((phi - inner) / max(square, 1e-12), 0.0)

    def _descend(
        self, launcher: Launcher, oracle: Oracle, state: State, first: Vector, batch: Any
    ) -> None:
        """z from y; `first` is the gradient of g at y."""
        x, z = state.variables["x"], state.variables["z"]
        z.assign([p.detach() for p in leaves(state.variables["y"].value)])
        gradient = first
        for t in range(self.inner_steps):
            if t:
                gradient = oracle.lower(x.value, z.value, batch).y
            if not all(bool(g.isfinite().all()) for g in gradient):
                raise NonFiniteError("the gradient of z is not finite")
            _gather(z, gradient)
            launcher.step([z])


def _trained(variable: Variable, gradient: Vector) -> Vector:
    """Zero where a memory strategy holds a leaf."""
    pairs = zip(leaves(variable.value), gradient, strict=True)
    return [g if p.requires_grad else torch.zeros_like(g) for p, g in pairs]


def _gather(variable: Variable, gradient: Vector) -> None:
    """Give a variable a gradient, nothing where a memory strategy holds a leaf."""
    variable.clear()
    variable.gather(gradient)
    for p in leaves(variable.value):
        if not p.requires_grad:
            p.grad = None
