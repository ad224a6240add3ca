"""V-PBGD: x and y descend together on the penalized objective, below them z on the lower loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bilevel.descent import begin, converged, finite_norm, set_lr, step_with_upper
from bilevel.launch import Launcher
from bilevel.memory import Memory
from bilevel.problem import Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, require
from bilevel.solvers.penalty.sweeps import Point, explained, sweep
from bilevel.variable import optimizer_by_name


@dataclass(frozen=True, kw_only=True)
class VPBGD(Solver):
    """Value-function penalty: z by `inner_steps` steps on g, then one joint step of x and y.

        (x, y) <- Proj((x, y) - lr s grad [f(x, y) + penalty (g(x, y) - g(x, z))]),
        s = min(1, 1 / penalty)

    where z counts as a constant and the penalty rises linearly to its cap. The factor s keeps the
    step sizes valid for every penalty. x takes its share from the last sweep over z, before z's
    last step, so one upper step is `inner_steps` + 1 gradients of g and one of f. It needs no
    unique lower solution, but x moves only s lr along its gradient, and y follows f and g at once:
    alternating methods such as `f2ba` are faster where the lower level is strongly convex.

    Reference: Shen, Chen, On Penalty-based Bilevel Gradient Descent Method, 2023 (2302.05185).
    Deviations: the factor s (in the authors' runs too); z goes on from where it was, rather than
    from y; the gradient at z is taken before its last step.
    """

    order: ClassVar[int] = 1
    parallel: ClassVar[bool] = True

    penalty: float = 10.0
    """The penalty (gamma) that the schedule rises to."""
    rise: int = 50
    """Upper steps over which the penalty rises from 0; 0 starts at the cap."""
    inner_steps: int = 5
    """Steps on z for one joint step of x and y."""
    upper_optimizer: str = "sgd"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-1
    """Step size of x, for the objective scaled by s."""
    lower_optimizer: str = "sgd"
    """A torch.optim optimizer for y and z."""
    lower_lr: float = 1e-1
    """Step size of y and z, for the objective scaled by s."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        require(
            self,
            penalty="positive",
            inner_steps="at least 1",
            **dict.fromkeys(("rise", "tolerance"), "non-negative"),
        )

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower, twins=["z"])
        state.counts = {"upper_grad": 0, "lower_grad": 0, "sweeps": 0}  # no second-order calls
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        x, y, z = (state.variables[name] for name in "xyz")
        state.memory.before_step(state.step, [y, z])
        penalty = self.penalty * min(1.0, (state.step + 1) / max(1, self.rise))
        scale = min(1.0, 1.0 / penalty)
        plain = Point(copy=z, weight=0.0, share=-penalty)
        for _ in range(self.inner_steps - 1):
            with x.frozen():
                self._sweep(problem, launcher, state, plain, self._batches(state))
            launcher.step([z])
        batches = self._batches(state)
        below = self._sweep(problem, launcher, state, plain, batches)
        joint = Point(copy=y, weight=scale, share=1.0 / scale, scale=scale * penalty)
        state.upper, state.lower = self._sweep(problem, launcher, state, joint, batches)
        launcher.settle([x])
        set_lr(x, self.upper_lr * scale)
        step_with_upper(launcher, state, [y, z])
        gap = penalty * (state.lower - below[1])
        state.numbers |= {"penalty": penalty, "penalty_gap": gap}
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        rising = state.step <= self.rise
        return None if rising else converged(state, self.tolerance)

    def _batches(self, state: State) -> tuple[Any, Any]:
        return next(state.streams["upper"]), next(state.streams["lower"])

    def _sweep(
        self,
        problem: Problem,
        launcher: Launcher,
        state: State,
        point: Point,
        batches: tuple[Any, Any],
    ) -> tuple[float, float]:
        seen = sweep(problem, launcher, state, point, batches)
        launcher.settle([point.copy])
        finite_norm(problem, state.variables["x"], point.copy, *explained(launcher, batches))
        return seen.upper, seen.lower
