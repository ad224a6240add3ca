"""The single loop of the proximal penalty method with recursive momentum on every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.descent import begin, converged, finite_norm, plus, step_with_upper
from bilevel.errors import InputError
from bilevel.launch import Launcher
from bilevel.memory import Full, Memory
from bilevel.problem import Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, require
from bilevel.solvers.penalty.sweeps import Point, explained, pull, sweep
from bilevel.tree import leaves, snapshot
from bilevel.variable import Variable, optimizer_by_name

NAMES = ("x", "y", "z")


@dataclass(frozen=True, kw_only=True)
class RecursivePenalty(Solver):
    """Forward difference and proximal centers, one step of everything along corrected momenta.

    With G(w) the gradients of x, y and z of the forward stencil at w = (x, y, z), on the batch of
    this step at both points,

        d_k = G(w_k) + (1 - eta) (d_{k-1} - G(w_{k-1}))
        y <- Proj(y - lr (d_y + (y - w_y) / prox)),    w_y <- (1 - b) w_y + b y,    likewise z

    The variance of d vanishes as the steps shrink, without large batches. One upper step is four
    gradients of g and two of f, the first one half of that.

    Reference: Kwon, Kwon, Wright, Nowak, On Penalty Methods for Nonconvex Bilevel Optimization and
    First-Order Stochastic Approximation, 2024 (2309.01753), its single loop; with prox=0, F3SA of
    2301.10945. Deviations: the scaled form g + nu f, so f and g share one momentum at y; a fixed
    penalty and fixed steps instead of decaying ones; x moves with y and z, not after them.
    """

    order: ClassVar[int] = 1
    parallel: ClassVar[bool] = True

    penalty: float = 10.0
    """The penalty (1/sigma)."""
    eta: float = 0.1
    """Weight of the newest gradient in its momentum; 1 keeps no memory, at half the cost."""
    prox: float = 1.0
    """Squared radius rho of the proximal terms of y and z; 0 has none."""
    center_rate: float = 0.5
    """Share b of the way to its copy that a proximal center moves in a step."""
    warmup: int = 10
    """Steps during which x is held: at the start the copies agree and carry no signal."""
    upper_optimizer: str = "sgd"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_optimizer: str = "sgd"
    """A torch.optim optimizer for y and z."""
    lower_lr: float = 1e-1
    """Step size of y and z, for the scaled loss g + nu f."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        require(
            self,
            penalty="positive",
            eta="in (0, 1]",
            center_rate="in (0, 1]",
            **dict.fromkeys(("prox", "warmup", "tolerance"), "non-negative"),
        )

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        if not isinstance(memory, Full):
            raise InputError("recursive momentum keeps gradients of all of y; use memory=full.")
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower, twins=["z"])
        state.counts = {"upper_grad": 0, "lower_grad": 0, "sweeps": 0}  # no second-order calls
        state.numbers["penalty"] = self.penalty
        if self.prox:
            state.vectors |= {f"center of {n}": snapshot(state.variables[n].value) for n in "yz"}
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        x, y, z = variables = [state.variables[name] for name in NAMES]
        batches = next(state.streams["upper"]), next(state.streams["lower"])
        state.memory.before_step(state.step, [y, z])
        before = self._gradients_before(problem, launcher, state, batches)
        state.upper, state.lower, gap = self._gather(problem, launcher, state, batches)
        state.numbers["penalty_gap"] = gap
        for variable in variables:
            self._correct(state, variable, before)
        for copy in (y, z):
            if self.prox:
                pull(copy, state.vectors[f"center of {copy.name}"], self.prox)
            finite_norm(problem, x, copy, *explained(launcher, batches))
        if state.step >= self.warmup:
            step_with_upper(launcher, state, [y, z])
        else:
            x.clear()
            launcher.step([y, z])
        for copy in (y, z) if self.prox else ():
            for center, p in zip(
                state.vectors[f"center of {copy.name}"], leaves(copy.value), strict=True
            ):
                center.lerp_(p.detach(), self.center_rate)
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def _gather(
        self, problem: Problem, launcher: Launcher, state: State, batches: tuple[Any, Any]
    ) -> tuple[float, float, float]:
        """Both losses at y and the penalty gap; x, y and z gather their gradients."""
        y, z = state.variables["y"], state.variables["z"]
        upper = Point(copy=y, weight=1.0 / self.penalty, share=self.penalty)
        plain = Point(copy=z, weight=0.0, share=-self.penalty)
        seen, below = (sweep(problem, launcher, state, p, batches) for p in (upper, plain))
        launcher.settle([state.variables["x"], y, z])
        return seen.upper, seen.lower, self.penalty * (seen.lower - below.lower)

    def _gradients_before(
        self, problem: Problem, launcher: Launcher, state: State, batches: tuple[Any, Any]
    ) -> dict[str, list[Tensor]]:
        """The gradients on this batch at the iterates before the last step; empty at the start."""
        if self.eta == 1.0 or state.step == 0:
            if self.eta < 1.0:
                state.vectors |= {f"last {n}": snapshot(state.variables[n].value) for n in NAMES}
            return {}
        found, now = {}, {name: snapshot(state.variables[name].value) for name in NAMES}
        for name in NAMES:
            state.variables[name].assign(state.vectors[f"last {name}"])
        self._gather(problem, launcher, state, batches)
        for name in NAMES:
            variable = state.variables[name]
            found[name] = variable.gradient()
            variable.clear()
            variable.assign(now[name])
            state.vectors[f"last {name}"] = now[name]
        return found

    def _correct(self, state: State, variable: Variable, before: dict[str, list[Tensor]]) -> None:
        """Turn what a variable gathered into its momentum d."""
        if self.eta == 1.0:
            return
        key = f"momentum of {variable.name}"
        now = variable.gradient()
        if before:
            memory = plus(state.vectors[key], before[variable.name], -1.0)
            now = plus(now, memory, 1.0 - self.eta)
        state.vectors[key] = [g.clone() for g in now]
        variable.clear()
        variable.gather(now)
