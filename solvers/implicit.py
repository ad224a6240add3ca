"""Approximate implicit differentiation: the hypergradient through a linear system in H."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bilevel.descent import begin, descend, implicit_gradient, move_upper
from bilevel.launch import Launcher
from bilevel.linear import (
    CG,
    MINRES,
    Identity,
    LinearSolver,
    Neumann,
    Nystrom,
)
from bilevel.memory import Memory
from bilevel.oracle import Curvature, Oracle
from bilevel.problem import Problem, constrained
from bilevel.result import Status
from bilevel.solver import Solver, State, require
from bilevel.variable import optimizer_by_name

LINEAR: dict[str, Callable[[AID], LinearSolver]] = {
    "cg": lambda s: CG(steps=s.linear_steps, tolerance=s.linear_tolerance, damping=s.damping),
    "minres": lambda s: MINRES(
        steps=s.linear_steps, tolerance=s.linear_tolerance, damping=s.damping
    ),
    "neumann": lambda s: Neumann(steps=s.linear_steps, lr=s.linear_lr or s.lower_lr),
    "nystrom": lambda s: Nystrom(rank=s.linear_steps, damping=s.damping or 0.01),
    "identity": lambda s: Identity(scale=s.linear_lr or s.lower_lr),
}


@dataclass(frozen=True, kw_only=True)
class AID(Solver):
    """Approximate implicit differentiation with `inner_steps` warm-started steps on y.

        v ~= H^{-1} grad_y f(x, y),    dF ~= grad_x f(x, y) - J'v

    with H = d2g/dy2 and J = d2g/dydx at (x, y). One upper step costs `inner_steps` + 1 gradients of
    g (the last is the graph that all products share), one of f, the linear solver's products with
    H, and one with J'. On quadratics the error is at most

        |est - dF| <= (|d2f/dxdy| + |d2f/dy2| |J| / mu) |y - y*| + (|J| / mu) |H v - grad_y f|

    Reference: Pedregosa, 2016 (1602.02355); Grazzi et al., 2020 (2006.16218); Ji, Yang, Liang, 2021
    (2010.07962).
    """

    order: ClassVar[int] = 2

    inner_steps: int = 10
    """Steps on y for one step of x, from where it was."""
    linear: Literal["cg", "minres", "neumann", "nystrom", "identity"] | LinearSolver = "cg"
    """How the linear system is solved; from Python also a `bilevel.linear.LinearSolver`."""
    linear_steps: int = 20
    """Most products with H (cg, minres), terms (neumann), or columns of H (nystrom)."""
    linear_tolerance: float = 1e-6
    """Relative residual at which cg and minres stop."""
    linear_lr: float = 0.0
    """Step size of neumann, scale of identity; 0 takes `lower_lr`."""
    damping: float = 0.0
    """Added to the diagonal of H by cg, minres and nystrom (there 0 means 0.01)."""
    warm: bool = True
    """Whether the linear solver starts at the previous v, rather than at zero."""
    products: Literal["graph", "finite"] = "graph"
    """Second derivatives by autograd, or by differences of gradients where those do not exist."""
    upper_optimizer: str = "adam"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_optimizer: str = "sgd"
    """A torch.optim optimizer for y."""
    lower_lr: float = 1e-1
    """Step size of y."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        names = ("inner_steps", "linear_tolerance", "linear_lr", "damping", "tolerance")
        require(self, linear_steps="at least 1", **dict.fromkeys(names, "non-negative"))

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        return begin(problem, memory, launcher, generator, upper=upper, lower=lower)

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        state.memory.before_step(state.step, [state.variables["y"]])
        descend(problem, launcher, state, steps=self.inner_steps)
        move_upper(launcher, state, self._estimate(problem, state))
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        small = self.tolerance and state.numbers.get("change", self.tolerance) < self.tolerance
        return Status.CONVERGED if small else None

    def check(self, problem: Problem) -> list[str]:
        if constrained(problem, "lower"):
            return [
                "implicit differentiation needs a lower level without constraints, and "
                "project_lower is given; use a penalty solver."
            ]
        return []

    def _estimate(self, problem: Problem, state: State) -> list[torch.Tensor]:
        x, y = state.variables["x"], state.variables["y"]
        upper_batch, lower_batch = (next(state.streams[level]) for level in ("upper", "lower"))
        oracle = Oracle(problem, state.counts)
        upper = oracle.upper(x.value, y.value, upper_batch)
        bend = self._curvature(oracle, x.value, y.value, lower_batch)
        start = state.vectors.get("v") if self.warm else None
        return implicit_gradient(state, upper, bend, self._linear(), start=start)

    def _linear(self) -> LinearSolver:
        return LINEAR[self.linear](self) if isinstance(self.linear, str) else self.linear

    def _curvature(self, oracle: Oracle, x: Any, y: Any, batch: Any) -> Curvature:
        make = oracle.curvature if self.products == "graph" else oracle.finite_curvature
        return make(x, y, batch)
