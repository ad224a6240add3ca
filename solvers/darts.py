"""DARTS: the hypergradient through one virtual step, by a finite difference of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.descent import begin, converged, descend, move_upper, plus
from bilevel.launch import Launcher
from bilevel.linear import norm
from bilevel.memory import Memory
from bilevel.oracle import Oracle, Vector
from bilevel.problem import Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, free_lower, require
from bilevel.tree import leaves, snapshot
from bilevel.variable import optimizer_by_name


@dataclass(frozen=True, kw_only=True)
class DARTS(Solver):
    """Second-order DARTS: one virtual step of size xi on y, no second derivatives.

        y' = y - xi grad_y g(x, y),    v = grad_y f(x, y'),    e = spacing / |v|
        dF ~= grad_x f(x, y') - xi (grad_x g(x, y + e v) - grad_x g(x, y - e v)) / 2e

    It is iterative differentiation of one step up to O(spacing^2), and need not point downhill for
    F. An upper step costs 3 gradients of g and 1 of f, and `inner_steps` gradients of g to move y,
    after x has moved.

    Reference: Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search, 2019 (1806.09055).
    Deviations: any optimizers; the weight decay and momentum of y's optimizer are not part of y'.
    """

    order: ClassVar[int] = 1

    inner_steps: int = 1
    """Steps on y for one step of x."""
    virtual_lr: float = 0.0
    """Step size xi of the virtual step; 0 takes `lower_lr`."""
    spacing: float = 1e-2
    """|e v|, how far from y the gradients of the difference are taken."""
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
        names = ("inner_steps", "virtual_lr", "tolerance")
        require(self, spacing="positive", **dict.fromkeys(names, "non-negative"))

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        return begin(problem, memory, launcher, generator, upper=upper, lower=lower)

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        state.memory.before_step(state.step, [state.variables["y"]])
        move_upper(launcher, state, self._estimate(problem, state))
        descend(problem, launcher, state, steps=self.inner_steps)
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def check(self, problem: Problem) -> list[str]:
        return free_lower(problem, "DARTS needs", "itd or a penalty solver")

    def _estimate(self, problem: Problem, state: State) -> Vector:
        x, y = state.variables["x"], state.variables["y"]
        oracle = Oracle(problem, state.counts)
        upper_batch, lower_batch = (next(state.streams[level]) for level in ("upper", "lower"))
        here = snapshot(y.value)
        moves = [p.requires_grad for p in leaves(y.value)]  # a memory strategy holds the others
        xi = self.virtual_lr or self.lower_lr
        bend = oracle.finite_curvature(x.value, y.value, lower_batch, spacing=self.spacing)
        try:
            y.assign(plus(here, _masked(bend.gradient, moves), -xi))
            upper = oracle.upper(x.value, y.value, upper_batch)
        finally:
            y.assign(here)
        state.upper, state.lower = upper.value, bend.value
        state.numbers["lower_gradient"] = norm(bend.gradient)
        return plus(upper.x, bend.cross(_masked(upper.y, moves)), -xi)


def _masked(v: Vector, moves: list[bool]) -> Vector:
    return [g if move else torch.zeros_like(g) for g, move in zip(v, moves, strict=True)]
