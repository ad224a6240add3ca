"""MAID: inexact descent that certifies its hypergradient and the decrease of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bilevel.descent import begin, plus, set_lr, step_with_upper
from bilevel.errors import InputError, NonFiniteError
from bilevel.launch import Launcher
from bilevel.linear import CG, LinearStatus, norm
from bilevel.memory import Memory
from bilevel.oracle import Curvature, Oracle, Vector
from bilevel.problem import Problem, constrained
from bilevel.result import Status
from bilevel.solver import Solver, State, free_lower, require
from bilevel.spectrum import extremes
from bilevel.tree import leaves, snapshot
from bilevel.variable import optimizer_by_name

CONSTANTS = ("strong_convexity", "smoothness", "cross_norm", "upper_smoothness", "upper_cross_norm")
CONSTANTS += ("hessian_lipschitz", "cross_lipschitz")


@dataclass(frozen=True, kw_only=True)
class MAID(Solver):
    """The method of adaptive inexact descent: backtracking on certified bounds of F itself.

    y is solved until |grad_y g| <= e mu, so that |y - y*| <= e, and v until |H v - r| <= d with
    r = grad_y f. Then p = grad_x f - J'v is off by at most

        w = c e + |J| d / mu + L_J L_f e^2 / mu + |d2f/dxdy| e,
        c = L_f |J| / mu + L_H |r| |J| / mu^2 + L_J |r| / mu

    p is used if w <= (1 - descent) |p|; if not, e and d shrink. A step a is taken if

        U(y+, e+) - B(y, e) + decrease |x+ - x|^2 / a <= 0,   U, B = f +- (|r| e + L_f e^2 / 2)

    which implies F(x+) <= F(x) - decrease |x+ - x|^2 / a. If no trial passes, e and d shrink; after
    a step e, d and a grow. In all bounds e and d stand for what |grad_y g| / mu and |H v - r| were
    measured to be. Both losses are taken on all data (`Problem.whole`). The run ends as converged
    when |p| + w <= `tolerance`, or when the precision of the numbers certifies no further step.

    Certificates hold as far as the constants do. What is not given is estimated at every point:
    mu, L and the norms by Lanczos steps, exact where `estimate_steps` reach the dimension, L_H and
    L_J by secants, which are lower bounds and 0 for quadratics.

    Reference: Salehi, Mukherjee, Roberts, Ehrhardt, An Adaptively Inexact First-Order Method for
    Bilevel Optimization with Application to Hyperparameter Learning, 2025 (2308.10098).
    Deviations: measured e and d in the bounds; the term of d2f/dxdy, for f that depends on x; with
    project_upper |x - x+| / a takes the place of |p|; the number of trials starts anew every step.
    """

    order: ClassVar[int] = 2

    accuracy: float = 0.1
    """Bound e on |y - y*| to begin with."""
    linear_accuracy: float = 0.1
    """Bound d on |H v - grad_y f| to begin with."""
    upper_lr: float = 0.01
    """Step size a of x to begin with."""
    shrink: float = 0.5
    """Factor on the step size from trial to trial."""
    grow: float = 1.25
    """Factor on the step size after a step."""
    tighten: float = 0.5
    """Factor on e and d when a bound is too loose."""
    loosen: float = 1.1
    """Factor on e and d after a step."""
    descent: float = 0.1
    """Share of |p| by which p must exceed its error; <p, dF> >= descent |p|^2 follows."""
    decrease: float = 0.01
    """Certified decrease in units of a |p|^2; below `descent`."""
    trials: int = 10
    """Step sizes tried before e and d shrink; one more after each time."""
    lower_method: Literal["gradient", "nesterov"] = "nesterov"
    """Steps on y of size 1/L, with or without the momentum for mu."""
    lower_steps: int = 10_000
    """Most steps on y in one solve."""
    linear_steps: int = 1000
    """Most products with H in one solve."""
    estimate_steps: int = 20
    """Most products in estimating one constant."""
    strong_convexity: float = 0.0
    """mu, the least eigenvalue of H for every x and y; 0 estimates it."""
    smoothness: float = 0.0
    """L, the largest eigenvalue of H; 0 estimates it. Only sets the steps on y."""
    cross_norm: float = 0.0
    """|J|; 0 estimates it."""
    upper_smoothness: float = 0.0
    """L_f, the Lipschitz constant of grad_y f in y; 0 estimates it."""
    upper_cross_norm: float = 0.0
    """|d2f/dxdy|; 0 estimates it."""
    hessian_lipschitz: float = 0.0
    """L_H, the Lipschitz constant of H in y; 0 estimates it."""
    cross_lipschitz: float = 0.0
    """L_J, the Lipschitz constant of J in y; 0 estimates it."""
    tolerance: float = 0.0
    """Stop when |dF| is certified to be at most this."""

    def __post_init__(self) -> None:
        names = ("accuracy", "linear_accuracy", "upper_lr")
        steps = ("trials", "lower_steps", "linear_steps", "estimate_steps", "grow", "loosen")
        require(
            self,
            **dict.fromkeys(names, "positive"),
            **dict.fromkeys(steps, "at least 1"),
            **dict.fromkeys(("shrink", "tighten", "descent", "decrease"), "in (0, 1)"),
            **dict.fromkeys((*CONSTANTS, "tolerance"), "non-negative"),
        )
        if self.decrease >= self.descent:
            raise InputError(
                f"solver.decrease must be below solver.descent={self.descent}, got {self.decrease}."
            )

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name("sgd", self.upper_lr)
        lower = optimizer_by_name("sgd", self.upper_lr)  # holds y, which is solved and assigned
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower)
        schedule = [self.accuracy, self.linear_accuracy, self.upper_lr]
        state.vectors["schedule"] = [torch.tensor(schedule, dtype=torch.float64)]
        given = [float(getattr(self, name)) for name in CONSTANTS]
        state.vectors["constants"] = [torch.tensor(given, dtype=torch.float64)]
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        x, y = state.variables["x"], state.variables["y"]
        state.memory.before_step(state.step, [y])
        start, begun = snapshot(x.value), snapshot(y.value)
        try:
            found = _Search(self, problem, state).run()
        except NonFiniteError:
            y.assign(begun)
            raise
        finally:
            x.assign(start)
        if found is None:
            state.numbers["change"] = 0.0
        else:
            p, lr = found
            x.clear()
            x.gather(p)
            set_lr(x, lr)
            step_with_upper(launcher, state, [])
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return Status.CONVERGED if state.numbers.get("change") == 0.0 else None

    def check(self, problem: Problem) -> list[str]:
        return free_lower(problem, "MAID needs")


@dataclass(frozen=True, kw_only=True)
class _Point:
    """y near y*(x): f, g, grad_x f, r = grad_y f, a bound on |y - y*|, and if it is as asked."""

    y: Vector
    value: float
    lower: float
    along_x: Vector
    r: Vector
    error: float
    met: bool

    def slack(self, smoothness: float) -> float:
        """|f(x, y) - F(x)| is at most this."""
        return norm(self.r) * self.error + smoothness * self.error**2 / 2


class _Search:
    """One upper step: accuracies and step sizes until both certificates hold."""

    def __init__(self, options: MAID, problem: Problem, state: State) -> None:
        self.options, self.state = options, state
        self.oracle = Oracle(problem, state.counts)
        self.project = problem.project_upper if constrained(problem, "upper") else None
        self.upper_batch, self.lower_batch = problem.whole()
        self.x, self.y = state.variables["x"], state.variables["y"]
        self.start = snapshot(self.x.value)
        table = state.vectors["constants"][0].tolist()
        self.known: dict[str, float] = dict(zip(CONSTANTS, table, strict=True))

    def run(self) -> tuple[Vector, float] | None:
        """The hypergradient and the step size to use, y being at the new y*; None to stop here."""
        o, e, d, a = self.options, *self.state.vectors["schedule"][0].tolist()
        trials, floor, fresh = o.trials, self._floor(), True
        if self.state.step == 0:
            self._spectrum()
        while e >= floor:
            here = self._solve(e)
            p, bound, met = self._hypergradient(here, d, fresh)
            size = self._ahead(p, a)[1] / a
            self._note(here, size, bound)
            fresh = False
            if size + bound <= o.tolerance:
                break
            if bound <= (1 - o.descent) * size:
                lr = self._backtrack(here, p, e, a, trials)
                if lr is not None:
                    self._remember(e * o.loosen, d * o.loosen, lr * o.grow, here.y)
                    return p, lr
                trials += 1
            elif not (here.met or met):
                break
            e, d = e * o.tighten, d * o.tighten
        self._remember(e, d, a, None)
        return None

    def _backtrack(self, here: _Point, p: Vector, e: float, a: float, trials: int) -> float | None:
        """The first step size with a certified decrease; y is then at its end, else as it was."""
        o, before = self.options, dict(self.known)
        bend = self.known["upper_smoothness"]
        for trial in range(trials):
            lr = a * o.shrink**trial
            end, moved = self._ahead(p, lr)
            self.x.assign(end)
            self._spectrum()
            there = self._solve(e)
            rise = there.value + there.slack(bend) - (here.value - here.slack(bend))
            if moved > 0 and rise + o.decrease * moved**2 / lr <= 0:
                self.state.numbers |= {"lr": lr, "trials": float(trial + 1)}
                self.state.upper, self.state.lower = there.value, there.lower
                return lr
            self.known = dict(before)
            self.x.assign(self.start)
            self.y.assign(here.y)
        return None

    def _solve(self, e: float) -> _Point:
        """Steps on y until |grad_y g| <= e mu, as far as rounding and `lower_steps` let it."""
        o, start = self.options, snapshot(self.y.value)
        mu, bend = self.known["strong_convexity"], self.known["smoothness"]
        now, ahead, lower, size = start, start, None, math.inf
        first = best = math.inf
        waited = 0
        for _ in range(o.lower_steps + 1):
            self.y.assign(ahead)
            lower = self.oracle.lower(self.x.value, self.y.value, self.lower_batch)
            size = norm(lower.y)
            first = size if first == math.inf else first
            if not size <= 10 * first:  # L is too small for where the steps have come
                bend, now, ahead = 2 * bend, start, start
                if not (math.isfinite(bend) and math.isfinite(first)):
                    raise NonFiniteError(f"the gradient of y has norm {size}")
                continue
            best, waited = (size, 0) if size <= best / 2 else (best, waited + 1)
            if size <= e * mu or waited > 100 + 2 * bend / mu:  # no further for rounding
                break
            root = math.sqrt(max(bend / mu, 1.0))
            momentum = (root - 1) / (root + 1) if o.lower_method == "nesterov" else 0.0
            new = plus(ahead, lower.y, -1 / bend)
            now, ahead = new, plus(new, plus(new, now, -1.0), momentum)
        self.known["smoothness"] = bend
        return self._point(lower.value if lower else math.nan, size / mu, size <= e * mu)

    def _point(self, lower: float, error: float, met: bool) -> _Point:
        upper = self.oracle.upper(self.x.value, self.y.value, self.upper_batch)
        if not (math.isfinite(upper.value) and math.isfinite(lower)):
            raise NonFiniteError(f"the upper loss is {upper.value}, the lower loss {lower}")
        return _Point(
            y=snapshot(self.y.value),
            value=upper.value,
            lower=lower,
            along_x=upper.x,
            r=upper.y,
            error=error,
            met=met,
        )

    def _hypergradient(self, at: _Point, d: float, fresh: bool) -> tuple[Vector, float, bool]:
        """p, its bound w, and whether the linear system was solved to d."""
        bend = self.oracle.curvature(self.x.value, self.y.value, self.lower_batch)
        size = norm(at.r)
        d = max(d, 10 * max(torch.finfo(g.dtype).eps for g in at.r) * size)
        solver = CG(steps=self.options.linear_steps, tolerance=d / size if size else 0.0)
        result = solver.solve(bend.hvp, at.r, self.state.vectors.get("v") if size else None)
        v = self.state.vectors["v"] = result.solution
        p = plus(at.along_x, bend.cross(v), -1.0)
        if fresh:
            self._norms(bend, v)  # moves y for a while, which ends the graph of bend
        k = self.known
        mu, cross, f = k["strong_convexity"], k["cross_norm"], k["upper_smoothness"]
        per_error = f * cross / mu + k["hessian_lipschitz"] * size * cross / mu**2
        per_error += k["cross_lipschitz"] * size / mu + k["upper_cross_norm"]
        bound = per_error * at.error + cross * result.residual / mu
        bound += k["cross_lipschitz"] * f * at.error**2 / mu
        self.state.numbers |= {
            "linear_residual": result.residual / max(size, 1e-300),
            "curvature": float(result.status is LinearStatus.CURVATURE),
        }
        met = result.residual <= d
        return p, bound, met

    def _ahead(self, p: Vector, lr: float) -> tuple[Vector, float]:
        """x+ after a step along p and the projection on X, as the optimizer has it; |x+ - x|."""
        end = plus(self.start, p, -lr)
        if self.project is not None:
            self.x.assign(end)
            with torch.no_grad():
                end = snapshot(self.project(self.x.value))
            self.x.assign(self.start)
        return end, norm(plus(end, self.start, -1.0))

    def _spectrum(self) -> None:
        """mu and L at this x, where they are not given."""
        o, names = self.options, ("strong_convexity", "smoothness")
        if not (o.strong_convexity and o.smoothness):
            bend = self.oracle.curvature(self.x.value, self.y.value, self.lower_batch)
            found = extremes(bend.hvp, leaves(self.y.value), steps=o.estimate_steps)
            for name, value in zip(names, found, strict=True):
                self.known[name] = getattr(o, name) or value
        if not self.known["strong_convexity"] > 0:
            raise NonFiniteError(
                "the bounds are infinite, since the lower loss is not strongly convex: the least "
                f"eigenvalue of its Hessian is {self.known['strong_convexity']:.3g}; use a penalty "
                "solver, or give solver.strong_convexity"
            )

    def _norms(self, bend: Curvature, v: Vector) -> None:
        """Raise the other constants to what is seen at this point, where they are not given."""
        o, x, y = self.options, self.x, self.y
        seen: dict[str, float] = {}
        if not o.cross_norm:
            seen["cross_norm"] = _spectral_norm(bend, leaves(x.value), o.estimate_steps)
        if not (o.upper_smoothness and o.upper_cross_norm):
            upper = self.oracle.upper_curvature(x.value, y.value, self.upper_batch)
            ends = extremes(upper.hvp, leaves(y.value), steps=o.estimate_steps)
            seen["upper_smoothness"] = max(map(abs, ends))
            seen["upper_cross_norm"] = _spectral_norm(upper, leaves(x.value), o.estimate_steps)
        before, here = self.state.vectors.get("before"), snapshot(y.value)
        apart = norm(plus(here, before, -1.0)) if before else 0.0
        if apart > 1e-6 * (1 + norm(here)) and norm(v) and before:  # else rounding is all one sees
            images = [bend.both(v)]
            y.assign(before)
            images.append(self.oracle.curvature(x.value, y.value, self.lower_batch).both(v))
            y.assign(here)
            gaps = [norm(plus(a, b, -1.0)) for a, b in zip(*images, strict=True)]
            names = ("hessian_lipschitz", "cross_lipschitz")
            seen |= {name: gap / apart / norm(v) for name, gap in zip(names, gaps, strict=True)}
        for name, value in seen.items():
            given = getattr(o, name)
            self.known[name] = given or max(self.known[name], value)

    def _floor(self) -> float:
        """The accuracy below which the numbers hold no more."""
        y = leaves(self.y.value)
        eps = max(torch.finfo(p.dtype).eps for p in y)
        return 10 * eps * (1 + norm([p.detach() for p in y]))

    def _note(self, at: _Point, size: float, bound: float) -> None:
        state = self.state
        state.lower, state.upper = at.lower, at.value
        state.numbers |= {
            "bound": bound,
            "accuracy": at.error,
            "gradient": size,
            "lower_gradient": at.error * self.known["strong_convexity"],
            "value_bound": at.slack(self.known["upper_smoothness"]),
        }

    def _remember(self, e: float, d: float, a: float, before: Vector | None) -> None:
        vectors = self.state.vectors
        vectors["schedule"] = [torch.tensor([e, d, a], dtype=torch.float64)]
        table = [self.known[name] for name in CONSTANTS]
        vectors["constants"] = [torch.tensor(table, dtype=torch.float64)]
        if before is not None:
            vectors["before"] = before


def _spectral_norm(bend: Curvature, like: Vector, steps: int) -> float:
    """The norm of J, from the largest eigenvalue of J'J."""
    largest = extremes(lambda u: bend.cross(bend.push(u)), like, steps=steps)[1]
    return math.sqrt(max(largest, 0.0))
