"""The penalty template: copies of y descend by turns with x, order by order of the stencil."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bilevel.descent import begin, converged, set_lr, step_with_upper
from bilevel.launch import Launcher
from bilevel.memory import Memory
from bilevel.problem import Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, require
from bilevel.solvers.penalty.extrapolation import extrapolate, restart
from bilevel.solvers.penalty.schedule import End, end, lag
from bilevel.solvers.penalty.stencils import stencil
from bilevel.solvers.penalty.sweeps import (
    Point,
    Seen,
    bends_down,
    clip,
    draw_in,
    explained,
    pull,
    sweep,
)
from bilevel.tree import dtypes, leaves, snapshot
from bilevel.variable import Variable, optimizer_by_name

PENALTY_CAPS = {torch.float64: 1e6, torch.float32: 1e3, torch.bfloat16: 1e2, torch.float16: 1e2}
"""Above these, rounding of the loss differences outweighs the smaller bias (see docs/log.md)."""

RISE = 10.0
"""A probe's loss rises by so many falls of y's: a doubt. Adam near a minimum makes them equal."""


@dataclass(frozen=True, kw_only=True)
class Penalty(Solver):
    """The penalty template in scaled form, with `inner_steps` warm-started steps on every copy.

    With l_nu(x) = min_y g + nu f, the hypergradient is d/dnu [grad_x l_nu] at nu = 0, taken by a
    stencil c on copies y_j that minimize g + nu_j f, nu_j = j / penalty:

        dF ~= penalty * sum_j c_j grad_x (g + nu_j f)(x, y_j)

    Every sweep over a copy gathers its own gradient and its share of the gradient of x at once, so
    x costs no pass of its own: one upper step is `inner_steps` sweeps of each copy, no more. The
    gradient of x is taken at the iterates before the last inner step (Jacobi order). A copy steps
    right after its sweep, unless something needs the gradients or numbers of several copies.

    The answer `y` is the copy at j = 1, |y - y*| <= nu |grad_y f| / mu; the others are z (j = 0 for
    order 1, j = -1 for order 2), z2, z3, ... Copies at j < 0 need g - |j| nu f to have a minimum.
    Where its mean curvature between y and such a copy is negative, or its loss rises while that of
    y falls, x is held; after `patience` such steps in a row the stencil becomes the forward one.

    The penalty grows by `growth` in steps where the copies keep up: where the linear system that
    they solve together, H v = -grad_y f with v = penalty * sum_j c_j y_j, is solved to a relative
    residual of `settle`. Elsewhere that residual limits the estimate, not the bias, and a larger
    penalty would make the errors of the copies count for more. When it grows the copies are drawn
    in, y_j <- c + (nu'/nu) (y_j - c) about their center c, where they belong to first order;
    without it they lag behind a growing penalty.

    With `prox` the copies minimize g + nu_j f + |y_j - w_j|^2 / 2 prox, and every upper step moves
    the centers, w <- (1 - center_rate) w + center_rate y: for lower levels that are not strongly
    convex. At a rest point w = y, so the centers add no bias.

    Reference: Kwon, Kwon, Wright, Nowak, A Fully First-Order Method for Stochastic Bilevel
    Optimization, 2023 (order 1); Chen, Ma, Zhang, 2306.14853 (several inner steps, momentum);
    Chen, Li, Chayti, Zhang, 2509.02937 (order p, normalized); Kwon, Kwon, Wright, Nowak, 2309.01753
    (prox centers); Pan et al., ScaleBiO, ACL 2025 (one inner step, Adam). Deviations: scaled form
    g + nu f, the same batches for all copies, x held for `warmup` steps, when the
    penalty grows, drawing in, the fallback.
    """

    order: ClassVar[int] = 1
    parallel: ClassVar[bool] = True

    stencil: int = 2
    """Order p of the finite difference: bias O(nu^p) with 2 ceil(p/2) copies of y."""
    penalty: float = 10.0
    """The penalty at the start (alpha, lambda or 1/nu in the literature)."""
    growth: float = 1.1
    """Factor on the penalty after an upper step that moves x and settles the copies."""
    settle: float = 0.1
    """Relative residual of the copies' linear system up to which the penalty grows; 0: always."""
    max_penalty: float = 0.0
    """Cap of the penalty; 0 takes the dtype's: 1e6 float64, 1e3 float32, 1e2 bfloat16."""
    inner_steps: int = 10
    """Steps on every copy of y for one step of x."""
    warmup: int = 10
    """Upper steps during which x is held: at the start all copies agree and carry no signal."""
    ramp: int = 0
    """Upper steps after the warm-up over which the step size of x grows linearly to its own."""
    patience: int = 3
    """Doubtful steps in a row after which the stencil falls back to order 1; 0 never looks."""
    prox: float = 0.0
    """Squared radius rho of the proximal terms of the copies; 0 has none."""
    center_rate: float = 0.5
    """Share of the way to its copy that a proximal center moves in an upper step."""
    momentum: float = 0.0
    """Nesterov's extrapolation of x before every upper step."""
    restart: float = 10.0
    """Length B of the path of x that restarts the momentum."""
    upper_optimizer: str = "adam"
    """A torch.optim optimizer for x, or votes for logits of weights."""
    upper_lr: float = 1e-2
    """Step size of x."""
    upper_step: Literal["plain", "normalized"] = "plain"
    """Whether the step size of x is divided by the norm of its gradient (for sgd)."""
    lower_optimizer: str = "sgd"
    """A torch.optim optimizer for y and its copies."""
    lower_lr: float = 1e-1
    """Step size of y, for the scaled loss g + nu f."""
    clip: float = 0.0
    """Largest norm of the gradient of each copy of y, clipped by itself; 0 does not clip."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        names = ("warmup", "ramp", "max_penalty", "clip", "tolerance", "prox", "patience", "settle")
        require(
            self,
            penalty="positive",
            restart="positive",
            center_rate="in (0, 1]",
            momentum="in [0, 1)",
            **dict.fromkeys(("growth", "inner_steps", "stencil"), "at least 1"),
            **dict.fromkeys(names, "non-negative"),
        )

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        twins = ["z", *(f"z{i}" for i in range(2, len(stencil(self.stencil))))]
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower, twins=twins)
        y = state.variables["y"]
        state.counts = {"upper_grad": 0, "lower_grad": 0, "sweeps": 0}  # no second-order calls
        state.numbers = {"penalty": min(self.penalty, self._cap(y)), "stencil": self.stencil}
        if self.prox:
            state.vectors |= {f"center of {name}": snapshot(y.value) for name in ("y", *twins)}
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        x, points = state.variables["x"], self._points(state)
        copies = [point.copy for point in points]
        state.memory.before_step(state.step, copies)
        moves = state.step >= self.warmup
        if moves and self.momentum:
            extrapolate(state, self.momentum)
        if not self.direct():
            self._step_by_turns(problem, launcher, state, moves=moves)
            self._finish(state, copies, grows=False)
            return state
        measured = moves and self.growth > 1 and self.settle > 0
        first: list[Seen] = []
        ends: list[End] = []
        for inner in range(self.inner_steps):
            last = inner == self.inner_steps - 1
            asked = measured and inner >= self.inner_steps - 2
            batches = next(state.streams["upper"]), next(state.streams["lower"])
            with contextlib.nullcontext() if last and moves else x.frozen():
                seen = [sweep(problem, launcher, state, p, batches, measured=asked) for p in points]
            launcher.settle([x, *copies])
            first = first or seen
            if last and not self._trusted(state, points, first, seen):
                moves = False
                x.clear()
            if self.prox:
                for copy in copies:
                    pull(copy, state.vectors[f"center of {copy.name}"], self.prox)
            if asked:
                ends.append(end(problem, points, seen[0], batches))
            clip(problem, x, copies, self.clip, *explained(launcher, batches))
            if last and moves:
                self._move(launcher, state, copies)
            else:
                launcher.step(copies)
        self._finish(state, copies, grows=moves and self._settled(state, ends))
        return state

    def _step_by_turns(
        self, problem: Problem, launcher: Launcher, state: State, *, moves: bool
    ) -> None:
        """Every inner step of a copy right after its sweep, so that one gradient is held at a time.

        The numbers are those of steps after all sweeps, as no sweep depends on another copy. Where
        a gradient is not finite, copies before it have moved.
        """
        x, points = state.variables["x"], self._points(state)
        seen: list[Seen] = []
        for inner in range(self.inner_steps):
            gathers = moves and inner == self.inner_steps - 1
            batches = next(state.streams["upper"]), next(state.streams["lower"])
            seen.clear()
            with contextlib.nullcontext() if gathers else x.frozen():
                for point in points:
                    seen.append(sweep(problem, launcher, state, point, batches))
                    launcher.settle([point.copy])
                    clip(problem, x, [point.copy], self.clip, *explained(launcher, batches))
                    launcher.step([point.copy])
        self._trusted(state, points, seen, seen)
        if moves:
            launcher.settle([x])
            self._move(launcher, state, [])

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def direct(self) -> list[str]:
        found = []
        if self.growth > 1:
            found.append(f"solver.growth={self.growth} (1 is reached)")
        if self.prox:
            found.append(f"solver.prox={self.prox} (0 is reached)")
        if self.stencil > 1 and self.patience:
            found.append(f"solver.stencil={self.stencil} (1, or solver.patience=0, is reached)")
        return found

    def _points(self, state: State) -> list[Point]:
        """The copies with their offsets and coefficients, y first."""
        nu = 1.0 / state.numbers["penalty"]
        copies = [v for name, v in state.variables.items() if name != "x"]
        return [
            Point(copy=copy, weight=offset * nu, share=share / nu)
            for copy, (offset, share) in zip(
                copies, stencil(int(state.numbers["stencil"])).items(), strict=False
            )
        ]

    def _trusted(
        self, state: State, points: list[Point], first: list[Seen], last: list[Seen]
    ) -> bool:
        """Whether no g - nu f looks as if it had no minimum; notes losses and doubts."""
        state.upper, state.lower = last[0].upper, last[0].lower
        gap = state.numbers["penalty"] * (last[0].lower - last[1].lower)
        state.numbers["penalty_gap"] = gap
        if not self.patience or state.numbers["stencil"] == 1:
            return True
        fall = first[0].at(points[0]) - last[0].at(points[0])
        doubt = any(
            bends_down(points[0], probe, (last[0], end), self.prox)
            or (fall >= 0 and end.at(probe) - start.at(probe) > RISE * fall + start.noise(probe))
            for probe, start, end in zip(points, first, last, strict=True)
            if probe.weight < 0
        )
        state.numbers["doubts"] = state.numbers.get("doubts", 0.0) + 1 if doubt else 0.0
        return not doubt

    def _settled(self, state: State, ends: list[End]) -> bool:
        """Whether the copies keep up with x, as far as that was measured; notes by how much not."""
        if not ends:
            return True
        state.numbers["lag"] = lag(ends)
        return state.numbers["lag"] <= self.settle

    def _move(self, launcher: Launcher, state: State, copies: list[Variable]) -> None:
        """Move x, and copies that have not moved yet: their gradients are of the old iterates."""
        x = state.variables["x"]
        lr = self.upper_lr * min(1.0, (state.step - self.warmup + 1) / (self.ramp + 1))
        if self.upper_step == "normalized":
            lr /= max(float(torch.nn.utils.get_total_norm(x.gradient())), 1e-300)
        set_lr(x, lr)
        step_with_upper(launcher, state, copies)
        if self.momentum:
            restart(state, self.restart)

    def _finish(self, state: State, copies: list[Variable], *, grows: bool) -> None:
        """What follows an upper step: centers, penalty, and the fallback of the stencil."""
        for copy in copies if self.prox else []:
            centers = state.vectors[f"center of {copy.name}"]
            for center, p in zip(centers, leaves(copy.value), strict=True):
                center.lerp_(p.detach(), self.center_rate)
        if grows and self.growth > 1:
            before = state.numbers["penalty"]
            state.numbers["penalty"] = min(before * self.growth, self._cap(copies[0]))
            draw_in(self._points(state), before / state.numbers["penalty"])
        if self.patience and state.numbers.get("doubts", 0.0) >= self.patience:
            z = copies[1]
            z.assign(snapshot(copies[0].value))
            z.optimizer.state.clear()
            state.numbers |= {"stencil": 1, "doubts": 0.0}
        state.step += 1

    def _cap(self, y: Variable) -> float:
        caps = [PENALTY_CAPS[kind] for kind in dtypes(y.value) if kind in PENALTY_CAPS]
        cap = min(caps, default=PENALTY_CAPS[torch.float64])
        return min(cap, self.max_penalty) if self.max_penalty else cap
