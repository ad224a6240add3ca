"""Approximate implicit differentiation: the hypergradient through a linear system in H."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bilevel import looped, staged
from bilevel.compiled import Compiled
from bilevel.descent import (
    begin,
    converged,
    descend,
    implicit_gradient,
    move_upper,
    warm_start,
)
from bilevel.errors import InputError
from bilevel.launch import Launcher
from bilevel.linear import (
    CG,
    MINRES,
    Fisher,
    Identity,
    LinearSolver,
    Neumann,
    Nystrom,
)
from bilevel.memory import Memory
from bilevel.oracle import Curvature, Gradients, Oracle, Vector
from bilevel.problem import Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, free_lower, ignored, require
from bilevel.trace import Traced
from bilevel.variable import optimizer_by_name

Name = Literal["cg", "minres", "neumann", "nystrom", "fisher", "identity"]
LINEAR: dict[str, Callable[[AID], LinearSolver]] = {
    "cg": lambda s: CG(steps=s.linear_steps, tolerance=s.linear_tolerance, damping=s.damping),
    "minres": lambda s: MINRES(
        steps=s.linear_steps, tolerance=s.linear_tolerance, damping=s.damping
    ),
    "neumann": lambda s: Neumann(
        steps=s.linear_steps, lr=s.linear_lr or s.lower_lr, momentum=s.linear_momentum
    ),
    "nystrom": lambda s: Nystrom(rank=s.linear_steps, damping=s.damping or 0.01),
    "identity": lambda s: Identity(scale=s.linear_lr or s.lower_lr),
}


NEEDS = {
    "linear_tolerance": ("cg", "minres"),
    "linear_lr": ("neumann", "identity"),
    "linear_momentum": ("neumann",),
    "damping": ("cg", "minres", "nystrom", "fisher"),
}
"""Options that only some linear solvers read."""


@dataclass(frozen=True, kw_only=True)
class AID(Solver):
    """Approximate implicit differentiation with `inner_steps` warm-started steps on y.

        v ~= H^{-1} grad_y f(x, y),    dF ~= grad_x f(x, y) - J'v

    with H = d2g/dy2 and J = d2g/dydx at (x, y). One upper step costs `inner_steps` + 1 gradients of
    g (the last is the graph that all products share), one of f, the linear solver's products with
    H, and one with J'. On quadratics the error is at most

        |est - dF| <= (|d2f/dxdy| + |d2f/dy2| |J| / mu) |y - y*| + (|J| / mu) |H v - grad_y f|

    With fresh batches every product builds a graph of its own: one more gradient of g. With fisher
    the gradients of `linear_steps` pieces replace the products, at each step the next ones in turn.

    Reference: Pedregosa, 2016 (1602.02355); Grazzi et al., 2020 (2006.16218); Ji, Yang, Liang, 2021
    (2010.07962).
    """

    order: ClassVar[int] = 2

    inner_steps: int = 10
    """Steps on y for one step of x, from where it was."""
    linear: Name | LinearSolver = "cg"
    """How the linear system is solved; from Python also a `bilevel.linear.LinearSolver`."""
    linear_steps: int = 20
    """Most products with H (cg, minres), terms (neumann), columns of H (nystrom), or pieces of g
    whose gradients stand in for it (fisher)."""
    linear_tolerance: float = 1e-6
    """Relative residual at which cg and minres stop."""
    linear_lr: float = 0.0
    """Step size of neumann, scale of identity; 0 takes `lower_lr`."""
    linear_momentum: float = 0.0
    """Momentum of neumann, for inner steps with momentum."""
    damping: float = 0.0
    """Added to the diagonal of H by cg, minres, nystrom and fisher (for these 0 means 0.01)."""
    warm: bool = True
    """Whether the linear solver starts at the previous v, rather than at zero."""
    batches: Literal["shared", "fresh"] = "shared"
    """Whether all products with H share one batch of g, or each draws its own (neumann only)."""
    products: Literal["graph", "finite"] = "graph"
    """Second derivatives by autograd, or by differences of gradients where those do not exist."""
    engine: Literal["autograd", "traced", "compiled"] = "autograd"
    """Whether autograd differentiates g at every step, a trace made once (`bilevel.trace`), or
    loops compiled once (`bilevel.compiled`; cg only)."""
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
        ranges = {"linear_steps": "at least 1", "linear_momentum": "in [0, 1)"}
        require(self, **ranges, **dict.fromkeys(names, "non-negative"))
        if self.batches == "fresh" and self.linear != "neumann":
            raise InputError(
                "batches=fresh needs linear=neumann, whose terms need not agree on H, got "
                f"linear={self.linear}."
            )
        faults = ignored(self, "linear", NEEDS)
        if self.engine != "autograd" and (self.products == "finite" or self.batches == "fresh"):
            faults.append(f"engine={self.engine} needs products=graph and batches=shared.")
        if self.engine == "compiled" and (self.linear != "cg" or self.lower_optimizer != "sgd"):
            faults.append("engine=compiled needs linear=cg and lower_optimizer=sgd.")
        if faults:
            raise InputError(faults)

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower)
        if self.engine == "traced":
            self._staged(problem, state, Traced)
        elif self.engine == "compiled":
            self._staged(problem, state, Compiled)
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        state.memory.before_step(state.step, [state.variables["y"]])
        if self.engine == "traced":
            lower = self._staged(problem, state, Traced)
            staged.descend(lower, problem, launcher, state, steps=self.inner_steps)
        elif self.engine == "compiled":
            lower = self._staged(problem, state, Compiled)
            looped.descend(lower, state, steps=self.inner_steps)
        else:
            descend(problem, launcher, state, steps=self.inner_steps)
        move_upper(launcher, state, self._estimate(problem, state))
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def check(self, problem: Problem) -> list[str]:
        return free_lower(problem, "implicit differentiation needs")

    def _estimate(self, problem: Problem, state: State) -> list[torch.Tensor]:
        x, y = state.variables["x"], state.variables["y"]
        upper_batch, lower_batch = (next(state.streams[level]) for level in ("upper", "lower"))
        oracle = Oracle(problem, state.counts)
        upper = oracle.upper(x.value, y.value, upper_batch)
        start = warm_start(state) if self.warm else None
        if self.engine == "compiled":
            return self._compiled(oracle, state, upper, lower_batch, start)
        if self.engine == "traced":
            lower = self._staged(problem, state, Traced)
            bend = staged.StagedCurvature(lower, oracle, x.value, y.value, lower_batch)
        else:
            bend = self._curvature(oracle, x.value, y.value, lower_batch)

        def fresh(v: Vector) -> Vector:
            batch = next(state.streams["lower"])
            return self._curvature(oracle, x.value, y.value, batch).hvp(v)

        hvp = fresh if self.batches == "fresh" else None
        linear = self._linear(oracle, state)
        return implicit_gradient(state, upper, bend, linear, start=start, hvp=hvp)

    def _compiled(
        self, oracle: Oracle, state: State, upper: Gradients, batch: Any, start: Vector | None
    ) -> Vector:
        lower: staged.Staged[Compiled] = state.derived["staged"]
        linear = CG(steps=self.linear_steps, tolerance=self.linear_tolerance, damping=self.damping)
        return looped.implicit_gradient(lower, oracle, state, upper, batch, linear, start)

    def _staged(
        self, problem: Problem, state: State, kind: type[staged.Kind]
    ) -> staged.Staged[staged.Kind]:
        return staged.staged(problem, state, lambda s, g: g, kind)

    def _linear(self, oracle: Oracle, state: State) -> LinearSolver:
        if self.linear == "fisher":
            return Fisher(rows=self._rows(oracle, state), damping=self.damping or 0.01)
        return LINEAR[self.linear](self) if isinstance(self.linear, str) else self.linear

    def _rows(self, oracle: Oracle, state: State) -> list[Vector]:
        """grad_y g on the next pieces, in turn."""
        x, y = (state.variables[name].value for name in "xy")
        _, pieces = oracle.problem.pieces()
        count = min(self.linear_steps, len(pieces))
        chosen = [(state.step * count + i) % len(pieces) for i in range(count)]
        return [oracle.lower(x, y, pieces[i]).y for i in chosen]

    def _curvature(self, oracle: Oracle, x: Any, y: Any, batch: Any) -> Curvature:
        make = oracle.curvature if self.products == "graph" else oracle.finite_curvature
        return make(x, y, batch)


def stocbio(**options: Any) -> AID:
    """stocBiO: ten inner steps, ten products of a cold Neumann series, each on its own batch.

    Reference: Ji, Yang, Liang, Bilevel Optimization: Convergence Analysis and Enhanced Design, 2021
    (2010.07962). Deviations: the series is summed as v <- v - lr (H v - grad_y f), equal in law
    where batches are independent; batches do not grow; any optimizer moves x and y.
    """
    defaults = {"linear": "neumann", "linear_steps": 11, "warm": False, "batches": "fresh"}
    return AID(**{**defaults, **options})


def amigo(**options: Any) -> AID:
    """AmIGO: ten warm steps on y, then ten warm steps on v.

    Reference: Arbel and Mairal, Amortized Implicit Differentiation for Stochastic Bilevel
    Optimization, 2021 (2111.14580). Deviations: the steps on v share one batch unless
    batches=fresh; any optimizer moves x and y.
    """
    return AID(**{"linear": "neumann", "linear_steps": 10, **options})


def t1t2(**options: Any) -> AID:
    """T1-T2: one step on y, then one on x as if H were the identity over the step size of y.

        dF ~= grad_x f - lower_lr J' grad_y f

    The direction can point uphill.

    Reference: Luketina, Berglund, Greff, Raiko, Scalable Gradient-Based Tuning of Continuous
    Regularization Hyperparameters, 2015 (1511.06727). Deviation: Adam moves x.
    """
    return AID(**{"linear": "identity", "inner_steps": 1, **options})
