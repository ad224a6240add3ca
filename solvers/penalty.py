"""First-order penalty methods: the hypergradient as a finite difference of lower-level values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bilevel.errors import InputError, NonFiniteError
from bilevel.launch import Launcher
from bilevel.memory import Memory
from bilevel.problem import Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, finite_loss
from bilevel.tree import leaves
from bilevel.variable import Variable, optimizer_by_name

STENCILS: dict[int, dict[int, float]] = {1: {1: 1.0, 0: -1.0}, 2: {1: 0.5, -1: -0.5}}
"""Finite differences of order 1 and 2 at spacing 1: offset -> coefficient."""

PENALTY_CAPS = {torch.float64: 1e6, torch.float32: 1e3, torch.bfloat16: 1e2, torch.float16: 1e2}
"""Above these, rounding of the loss differences outweighs the smaller bias (see docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class Penalty(Solver):
    """The penalty template in scaled form, with `inner_steps` warm-started steps on every copy.

    With l_nu(x) = min_y g + nu f, the hypergradient is d/dnu [grad_x l_nu] at nu = 0, taken by a
    stencil c on copies y_j that minimize g + nu_j f, nu_j = j / penalty:

        dF ~= penalty * sum_j c_j grad_x (g + nu_j f)(x, y_j)

    Every sweep over a copy gathers its own gradient and its share of the gradient of x at once, so
    x costs no pass of its own: one upper step is `inner_steps` sweeps of each copy, no more. The
    gradient of x is taken at the iterates before the last inner step (Jacobi order).

    Reference: Kwon, Kwon, Wright, Nowak, A Fully First-Order Method for Stochastic Bilevel
    Optimization, 2023 (order 1); Chen, Ma, Zhang, 2306.14853 (several inner steps); Chen, Li,
    Chayti, Zhang, 2509.02937 (order 2); Pan et al., ScaleBiO, ACL 2025 (one inner step, Adam).
    Deviations: scaled form g + nu f, the same batches for all copies, x held for `warmup` steps.
    """

    order: ClassVar[int] = 1

    stencil: Literal[1, 2] = 2
    """Order of the finite difference: bias O(nu) or O(nu^2), two copies of y either way."""
    penalty: float = 10.0
    """The penalty at the start (alpha, lambda or 1/nu in the literature)."""
    growth: float = 1.1
    """Factor on the penalty after every upper step that moves x."""
    max_penalty: float = 0.0
    """Cap of the penalty; 0 takes the dtype's: 1e6 float64, 1e3 float32, 1e2 bfloat16."""
    inner_steps: int = 10
    """Steps on every copy of y for one step of x."""
    warmup: int = 10
    """Upper steps during which x is held: at the start all copies agree and carry no signal."""
    ramp: int = 0
    """Upper steps after the warm-up over which the step size of x grows linearly to its own."""
    upper_optimizer: str = "adam"
    """A torch.optim optimizer for x, or votes for logits of weights."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_optimizer: str = "sgd"
    """A torch.optim optimizer for y and its copies."""
    lower_lr: float = 1e-1
    """Step size of y, for the scaled loss g + nu f."""
    clip: float = 0.0
    """Largest norm of the gradient of each copy of y, clipped by itself; 0 does not clip."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        faults = [
            f"solver.{name} must be {what}, got {getattr(self, name)}."
            for name, what, bad in (
                ("penalty", "positive", not self.penalty > 0),
                ("growth", "at least 1", not self.growth >= 1),
                ("inner_steps", "at least 1", self.inner_steps < 1),
                ("warmup", "non-negative", self.warmup < 0),
                ("ramp", "non-negative", self.ramp < 0),
                ("max_penalty", "non-negative", self.max_penalty < 0),
                ("clip", "non-negative", self.clip < 0),
                ("stencil", "1 or 2", self.stencil not in STENCILS),
            )
            if bad
        ]
        for name, lr in (
            (self.upper_optimizer, self.upper_lr),
            (self.lower_optimizer, self.lower_lr),
        ):
            try:
                optimizer_by_name(name, lr)
            except InputError as error:
                faults.extend(error.faults)
        if faults:
            raise InputError(faults)

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        x0, y0 = problem.init(generator)
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        x = launcher.variable("x", x0, upper, problem.project_upper)
        y = launcher.variable("y", y0, lower, problem.project_lower)
        z = launcher.twin(y, "z", lower)
        streams = problem.batches(generator)
        return State(
            variables={"x": x, "y": y, "z": z},
            streams={"upper": streams[0], "lower": streams[1]},
            memory=memory.init(y.value, generator),
            numbers={"penalty": min(self.penalty, self._cap(y))},
            counts={"upper_grad": 0, "lower_grad": 0, "sweeps": 0},
        )

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        x, y, z = (state.variables[name] for name in "xyz")
        nu = 1.0 / state.numbers["penalty"]
        state.memory.before_step(state.step, [y, z])
        offsets = zip((y, z), STENCILS[self.stencil].items(), strict=True)
        points = [(copy, offset * nu, share / nu) for copy, (offset, share) in offsets]
        moves_x = state.step >= self.warmup
        for inner in range(self.inner_steps):
            last = inner == self.inner_steps - 1
            batches = next(state.streams["upper"]), next(state.streams["lower"])
            with contextlib.nullcontext() if last and moves_x else x.frozen():
                for copy, weight, share in points:
                    self._sweep(problem, launcher, state, copy, weight, share, batches)
            for copy in (y, z):
                self._clip(problem, x, copy, batches)
            if last and moves_x:
                self._step_all(launcher, state)
            else:
                launcher.step([y, z])
        if moves_x:
            cap = self._cap(y)
            state.numbers["penalty"] = min(state.numbers["penalty"] * self.growth, cap)
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        if self.tolerance and state.numbers.get("change", math.inf) < self.tolerance:
            return Status.CONVERGED
        return None

    def _sweep(
        self,
        problem: Problem,
        launcher: Launcher,
        state: State,
        copy: Variable,
        weight: float,
        share: float,
        batches: tuple[Any, Any],
    ) -> None:
        """One forward-backward pass of g + weight f at a copy; x gathers its share of it."""
        x = state.variables["x"]
        upper = lower = 0.0
        with x.weighted(share):
            if weight:
                for part in problem.split(batches[0]):
                    loss = problem.upper(x.value, copy.value, part)
                    launcher.backward(weight * loss)
                    upper += finite_loss("upper", loss, problem, x, copy, part)
                state.counts["upper_grad"] += 1
            for part in problem.split(batches[1]):
                loss = problem.lower(x.value, copy.value, part)
                launcher.backward(loss)
                lower += finite_loss("lower", loss, problem, x, copy, part)
        state.counts["lower_grad"] += 1
        state.counts["sweeps"] += 1
        if copy.name == "y":
            state.upper, state.lower = upper, lower

    def _step_all(self, launcher: Launcher, state: State) -> None:
        """Move every copy, and x: all gradients were taken at the old iterates."""
        x = state.variables["x"]
        since = state.step - self.warmup
        _set_lr([x], self.upper_lr * min(1.0, (since + 1) / (self.ramp + 1)))
        before = [p.detach().clone() for p in leaves(x.value)]
        if not all(bool(g.isfinite().all()) for g in x.gradient()):
            raise NonFiniteError("the gradient of x is not finite")
        launcher.step([state.variables["y"], state.variables["z"], x])
        pairs = zip(leaves(x.value), before, strict=True)
        state.numbers["change"] = max(float((p.detach() - b).abs().max()) for p, b in pairs)

    def _clip(
        self, problem: Problem, x: Variable, copy: Variable, batches: tuple[Any, Any]
    ) -> None:
        """Clip the gradient of a copy, or raise if its norm is not finite."""
        gathered = [p for p in leaves(copy.value) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in gathered if p.grad is not None])
        if not bool(norm.isfinite()):
            words = [problem.explain(x.value, copy.value, batch) for batch in batches]
            found = "; ".join(
                filter(None, [f"the gradient of {copy.name} has norm {norm}", *words])
            )
            raise NonFiniteError(found)
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(gathered, self.clip, norm)

    def _cap(self, y: Variable) -> float:
        caps = [PENALTY_CAPS[p.dtype] for p in leaves(y.value) if p.dtype in PENALTY_CAPS]
        cap = min(caps, default=PENALTY_CAPS[torch.float64])
        return min(cap, self.max_penalty) if self.max_penalty else cap


def f2sa(**options: Any) -> Penalty:
    """F2SA: forward difference, one inner step, growing penalty (Kwon et al., 2301.10945)."""
    return Penalty(**{"stencil": 1, "inner_steps": 1, "growth": 1.005, "warmup": 0} | options)


def f2ba(**options: Any) -> Penalty:
    """F2BA: forward difference, ten warm inner steps, fixed penalty (Chen et al., 2306.14853)."""
    return Penalty(**{"stencil": 1, "growth": 1.0, "warmup": 0, "penalty": 100.0} | options)


def scalebio(**options: Any) -> Penalty:
    """ScaleBiO: forward difference, one AdamW step on both copies (Pan et al., ACL 2025).

    Deviations: g + nu f instead of its multiple by the penalty (equal for Adam up to eps), one
    LISA draw for both copies, the x step held during a warm-up.
    """
    defaults: dict[str, Any] = {
        "stencil": 1,
        "inner_steps": 1,
        "growth": 1.0,
        "warmup": 20,
        "lower_optimizer": "adamw",
        "lower_lr": 1e-3,
        "upper_lr": 1e-2,
    }
    return Penalty(**defaults | options)


def scalebio_votes(**options: Any) -> Penalty:
    """ScaleBiO with pairwise votes for the logits of the weights: decisive, yet still on noise.

    Deviations: those of `scalebio`, and `bilevel.PairwiseVotes` in place of Adam for x.
    """
    return scalebio(**{"upper_optimizer": "votes", "upper_lr": 0.03} | options)


def _set_lr(variables: Sequence[Variable], lr: float) -> None:
    for variable in variables:
        for group in variable.optimizer.param_groups:
            group["lr"] = lr
