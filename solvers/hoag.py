"""HOAG: descent on x with lower and linear solves whose errors shrink by a summable schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bilevel.descent import (
    begin,
    converged,
    finite_norm,
    implicit_gradient,
    move_upper,
    set_lr,
    warm_start,
)
from bilevel.launch import Launcher
from bilevel.linear import CG, norm
from bilevel.memory import Memory
from bilevel.oracle import Oracle, Vector
from bilevel.problem import Always, Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, free_lower, require
from bilevel.tree import leaves, snapshot
from bilevel.variable import optimizer_by_name

SCHEDULES: dict[str, Callable[[int], float]] = {
    "exponential": lambda k: 0.9**k,
    "quadratic": lambda k: k**-2.0,
    "cubic": lambda k: k**-3.0,
}
"""e_k / `accuracy` at step k = 1, 2, ...; each has a finite sum."""


@dataclass(frozen=True, kw_only=True)
class HOAG(Solver):
    """Projected descent with approximate hypergradients of summable error and an adaptive step.

        |grad_y g(x, y)| <= e_k,    |H v - grad_y f| <= e_k,    p = grad_x f - J'v
        x <- P(x - p / L)

    with y and v warm, on all data. L is multiplied by 0.95 where the last step kept the promise of
    its length, f_k <= f_{k-1} - L |x_k - x_{k-1}|^2 / 2, divided by 0.95 where it broke it by more
    than the accuracies explain, |v| (e_k + e_{k-1}), and doubled, with all later e_k halved, where
    f rose by more than that, or by a fifth. It never falls below twice an L at which f rose: there
    the curvature of F exceeds that.

    One upper step costs one gradient of f, the inner steps that were needed plus two gradients of g
    (the last test, and the graph of all products), the products that CG needed, and one with J'.

    Reference: Pedregosa, Hyperparameter Optimization with Approximate Gradient, 2016 (1602.02355),
    Algorithm 1; the rule for L follows the author's code from memory. Deviations: its slack in
    sufficient decrease is left out, since it lets L shrink on inexactness alone; a rise below a
    fifth that inexactness does not explain doubles L too, a broken promise raises it, and there is
    a least L, without which steps just too long go on for ever; halved accuracies stay halved; y
    moves by an optimizer of fixed step size, not by L-BFGS.
    """

    order: ClassVar[int] = 2

    schedule: Literal["exponential", "quadratic", "cubic"] = "exponential"
    """How the accuracies e_k fall: 0.9^k, 1/k^2 or 1/k^3."""
    accuracy: float = 0.1
    """Factor on the schedule."""
    floor: float = 0.0
    """Least e_k; 0 takes the dtype's eps^(3/4)."""
    smoothness: float = 0.0
    """L at the start; 0 takes |p| / sqrt(dim x), so that entries first move by about one."""
    inner_steps: int = 1000
    """Most steps on y for one step of x."""
    linear_steps: int = 1000
    """Most products with H for one step of x."""
    lower_optimizer: str = "sgd"
    """A torch.optim optimizer for y."""
    lower_lr: float = 1e-1
    """Step size of y."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("inner_steps", "linear_steps"), "at least 1")
        names = dict.fromkeys(("floor", "smoothness", "tolerance"), "non-negative")
        require(self, accuracy="positive", **least, **names)

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name("sgd", 1.0)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower)
        batches = zip(("upper", "lower"), problem.whole(), strict=True)
        state.streams = {level: Always(batch) for level, batch in batches}
        state.numbers |= {"tightening": 1.0, "least_smoothness": 0.0}
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        state.memory.before_step(state.step, [state.variables["y"]])
        x, before, last = state.variables["x"], state.upper, state.numbers.get("goal", 0.0)
        accuracy = self._accuracy(state)
        state.numbers["goal"] = accuracy
        self._solve_lower(problem, launcher, state, accuracy)
        gradient = self._estimate(problem, state, accuracy)
        if state.step:
            self._adapt(state, before, norm(state.vectors["v"]) * (accuracy + last))
        else:
            size = norm(gradient) / math.sqrt(sum(g.numel() for g in gradient))
            state.numbers["smoothness"] = self.smoothness or size or 1.0
        set_lr(x, 1.0 / state.numbers["smoothness"])
        was = snapshot(x.value)
        move_upper(launcher, state, gradient)
        now = (p.detach() for p in leaves(x.value))
        state.numbers["moved"] = norm([p - q for p, q in zip(now, was, strict=True)])
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def check(self, problem: Problem) -> list[str]:
        faults = free_lower(problem, "implicit differentiation needs")
        names = ("batches", "whole")
        own = {n for n in names if getattr(type(problem), n) is not getattr(Problem, n)}
        if own == {"batches"}:
            faults.append(
                "hoag needs all data at once, and the problem has batches but not the whole; "
                "give it whole(), or use amigo."
            )
        return faults

    def _accuracy(self, state: State) -> float:
        """e_k of this step."""
        eps = max(torch.finfo(p.dtype).eps for p in leaves(state.variables["y"].value))
        own = self.accuracy * SCHEDULES[self.schedule](state.step + 1)
        return max(own * state.numbers["tightening"], self.floor or eps**0.75)

    def _solve_lower(
        self, problem: Problem, launcher: Launcher, state: State, accuracy: float
    ) -> None:
        """Steps of y until |grad_y g| <= accuracy; sets `numbers["inner_steps"]`, their number."""
        x, y = state.variables["x"], state.variables["y"]
        batch, oracle, steps = next(state.streams["lower"]), Oracle(problem, state.counts), 0
        while True:
            y.clear()
            y.gather(oracle.lower(x.value, y.value, batch).y)
            if finite_norm(problem, x, y, batch) <= accuracy or steps == self.inner_steps:
                break
            launcher.step([y])
            steps += 1
        y.clear()
        state.numbers["inner_steps"] = float(steps)

    def _estimate(self, problem: Problem, state: State, accuracy: float) -> Vector:
        x, y = (state.variables[name].value for name in "xy")
        oracle = Oracle(problem, state.counts)
        upper = oracle.upper(x, y, next(state.streams["upper"]))
        bend = oracle.curvature(x, y, next(state.streams["lower"]))
        share = accuracy / max(norm(upper.y), accuracy)  # CG's tolerance is relative
        linear = CG(steps=self.linear_steps, tolerance=share)
        return implicit_gradient(state, upper, bend, linear, start=warm_start(state))

    def _adapt(self, state: State, before: float, slack: float) -> None:
        """The rule for L, given f at the last step and what inexactness may add to a difference."""
        numbers, rise = state.numbers, state.upper - before
        promise = -0.5 * numbers["smoothness"] * numbers["moved"] ** 2
        if rise <= promise:
            numbers["smoothness"] *= 0.95
        elif rise > min(0.2 * abs(before), slack):
            numbers["smoothness"] *= 2.0
            numbers["tightening"] *= 0.5
            numbers["least_smoothness"] = numbers["smoothness"]
        elif rise > promise + slack:
            numbers["smoothness"] /= 0.95
        numbers["smoothness"] = max(numbers["smoothness"], numbers["least_smoothness"])
