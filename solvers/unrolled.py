"""Iterative differentiation: the hypergradient through the steps that solve the lower level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from bilevel import staged
from bilevel.compiled import Compiled, Unrolled
from bilevel.descent import begin, converged, move_upper, plus, zeros
from bilevel.errors import InputError
from bilevel.launch import Launcher
from bilevel.linear import norm
from bilevel.memory import Memory
from bilevel.oracle import Vector, twice_differentiable
from bilevel.problem import Problem, constrained
from bilevel.result import Status
from bilevel.solver import Solver, State, finite_loss, require
from bilevel.trace import Traced
from bilevel.tree import leaves, with_leaves
from bilevel.variable import optimizer_by_name

Tape: TypeAlias = tuple[Vector, Vector]
"""A step's inputs, as leaves of their own, and its outputs, which depend on them and on x."""


@dataclass(frozen=True, kw_only=True)
class ITD(Solver):
    """Iterative differentiation through `inner_steps` steps s_t = Phi_t(s_{t-1}, x) on y.

    s is y with its momenta, and the result is the exact gradient of F_T(x) = f(x, y_T(x)):

        dF_T = grad_x f(x, y_T) + (dy_T/dx)' grad_y f(x, y_T)

    For gradient descent of step size eta on a quadratic dy_T/dx = -H^{-1} (I - (I - eta H)^T) J.
    With T = `inner_steps` and K = `truncate` or T, an upper step costs T gradients of g, K products
    with H and K with J', and one gradient of f; checkpointed K more gradients of g; forward mode
    K products of each kind for every entry of x. `numbers["linear_residual"]` is
    |(dy_T/dy_{T-K})' grad_y f| / |grad_y f|, the share of grad_y f that the unrolling left out: for
    gradient descent it is |H v - grad_y f| / |grad_y f| of the v that it stands for.

    Reference: Franceschi, Donini, Frasconi, Pontil, Forward and Reverse Gradient-Based
    Hyperparameter Optimization, 2017 (1703.01785); Shaban, Cheng, Hatch, Boots, Truncated
    Back-propagation for Bilevel Optimization, 2019 (1810.10667). Deviations: y_0 is where the last
    upper step ended unless `warm` is off; y_0 and momenta of zero are constants to the derivative.
    """

    order: ClassVar[int] = 2

    inner_steps: int = 20
    """Steps on y for one step of x."""
    truncate: int = 0
    """Differentiate the last so many inner steps only; 0 takes all."""
    mode: Literal["reverse", "checkpointed", "forward"] = "reverse"
    """Keep every step's graph, keep about 2 sqrt(K) states and graphs, or push dim_x tangents."""
    engine: Literal["autograd", "traced", "compiled"] = "autograd"
    """Whether autograd differentiates every step, a trace made once (`bilevel.trace`), or loops
    compiled once (`bilevel.compiled`)."""
    warm: bool = True
    """Whether y starts where the last upper step ended, rather than at its first start."""
    upper_optimizer: str = "adam"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_optimizer: Literal["sgd", "adam"] = "sgd"
    """The differentiable steps on y; their momenta start at zero in every upper step."""
    lower_lr: float = 1e-1
    """Step size of y."""
    momentum: float = 0.0
    """Of sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two momenta of adam."""
    eps: float = 1e-8
    """Added inside the square root of adam, whose derivative would otherwise be infinite at 0."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        require(
            self,
            inner_steps="at least 1",
            truncate="non-negative",
            momentum="in [0, 1)",
            eps="positive",
            tolerance="non-negative",
        )
        eager = self.engine == "autograd"
        if not eager and (self.mode != "reverse" or self.lower_optimizer != "sgd"):
            raise InputError(f"engine={self.engine} needs mode=reverse and lower_optimizer=sgd.")

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name("sgd", self.lower_lr)  # holds y, whose steps are functional
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower)
        if not self.warm:
            state.vectors["start"] = _detached(leaves(state.variables["y"].value))
        if self.engine == "traced":
            self._staged(problem, state, Traced)
        elif self.engine == "compiled":
            self._staged(problem, state, Compiled)
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        y = state.variables["y"]
        state.memory.before_step(state.step, [y])
        start = _detached(leaves(y.value)) if self.warm else state.vectors["start"]
        with twice_differentiable(state.variables["x"].value, y.value):
            gradient, end = self._estimate(_Steps(self, problem, state), start)
        move_upper(launcher, state, gradient)
        y.assign(end)
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def check(self, problem: Problem) -> list[str]:
        return staged.faults(problem, self.engine)

    def _estimate(self, steps: _Steps, start: Vector) -> tuple[Vector, Vector]:
        """dF_T and y_T."""
        first = max(0, self.inner_steps - self.truncate) if self.truncate else 0
        momenta = 2 if self.lower_optimizer == "adam" else 1 if self.momentum else 0
        s = [*start, *(t for _ in range(momenta) for t in zeros(start))]
        if self.engine == "traced":
            return _traced(steps, self._staged(steps.problem, steps.state, Traced), s, first)
        if self.engine == "compiled":
            return _compiled(steps, self._staged(steps.problem, steps.state, Compiled), s, first)
        for t in range(first):
            s = steps.phi(s, t, graph=False)
        sweep = {"reverse": _reverse, "checkpointed": _checkpointed, "forward": _forward}
        return sweep[self.mode](steps, s, first)

    def _staged(
        self, problem: Problem, state: State, kind: type[staged.Kind]
    ) -> staged.Staged[staged.Kind]:
        return staged.staged(problem, state, lambda s, g: _sgd(self, s, g, 0), kind)


class _Steps:
    """The inner steps of one upper step, each on its own batch, kept to be visited again."""

    def __init__(self, options: ITD, problem: Problem, state: State) -> None:
        self.options, self.problem, self.state = options, problem, state
        self.total = options.inner_steps
        self.batches = [next(state.streams["lower"]) for _ in range(self.total)]
        self.x = leaves(state.variables["x"].value)
        self.size = len(leaves(state.variables["y"].value))

    def phi(self, s: Vector, t: int, *, graph: bool) -> Vector:
        """s_{t+1} = Phi_t(s_t, x); with `graph` as a function of s_t, which then needs one."""
        state = self.state
        with torch.enable_grad():
            point = s[: self.size] if graph else [p.requires_grad_() for p in _detached(s)]
            point = point[: self.size]
            loss = self._loss("lower", point, self.batches[t])
            g = torch.autograd.grad(
                loss, point, create_graph=graph, allow_unused=True, materialize_grads=True
            )
        state.counts["lower_grad"] += 1
        if t == self.total - 1:
            state.lower = float(loss.detach())
            state.numbers["lower_gradient"] = norm([p.detach() for p in g])
        move = _adam if self.options.lower_optimizer == "adam" else _sgd
        with torch.set_grad_enabled(graph):
            moved = move(self.options, s, list(g), t)
            return [*self._projected(moved[: self.size]), *moved[self.size :]]

    def tape(self, s: Vector, t: int) -> Tape:
        """The step from s, recorded."""
        inputs = [p.requires_grad_() for p in _detached(s)]
        return inputs, self.phi(inputs, t, graph=True)

    def upper(self, s: Vector) -> tuple[Vector, Vector, Vector]:
        """y_T, and grad_x f and grad_y f there."""
        end = [p.requires_grad_() for p in _detached(s[: self.size])]
        with torch.enable_grad():
            loss = self._loss("upper", end, next(self.state.streams["upper"]))
            g = torch.autograd.grad(
                loss, [*self.x, *end], allow_unused=True, materialize_grads=True
            )
        self.state.counts["upper_grad"] += 1
        self.state.upper = float(loss.detach())
        return _detached(end), list(g[: len(self.x)]), list(g[len(self.x) :])

    def finish(self, loss: Tensor, before: Vector, after: Vector) -> None:
        """Note the last of the steps, all of them traced, and its gradient."""
        options, state, n = self.options, self.state, self.size
        x, y = state.variables["x"], state.variables["y"]
        state.lower = finite_loss("lower", loss, self.problem, x, y, self.batches[-1])
        if options.momentum:
            g = [a - options.momentum * b for a, b in zip(after[n:], before[n:], strict=True)]
        else:
            g = [(b - a) / options.lower_lr for a, b in zip(after, before, strict=True)]
        state.numbers["lower_gradient"] = norm(g)
        state.counts["lower_grad"] += self.total

    def pull(self, tapes: Iterable[Tape], adjoint: Vector, along_x: Vector) -> tuple[Vector, ...]:
        """The adjoint of s before the recorded steps, and their share added to that of x.

        Each step's products are taken by themselves, so that sums do not depend on what was kept.
        """
        for inputs, outputs in tapes:
            found = torch.autograd.grad(
                outputs, [*inputs, *self.x], adjoint, allow_unused=True, materialize_grads=True
            )
            adjoint = list(found[: len(inputs)])
            along_x = [a + b for a, b in zip(along_x, found[len(inputs) :], strict=True)]
            self.count_products(1)
        return adjoint, along_x

    def count_products(self, number: int) -> None:
        """Each vector through a step's derivative costs a product with H and one with J or J'."""
        self.state.counts["hvp"] += number
        self.state.counts["cross"] += number

    def _loss(self, level: Literal["upper", "lower"], point: Vector, batch: Any) -> Tensor:
        x, y = self.state.variables["x"], self.state.variables["y"]
        loss: Callable[..., Tensor] = getattr(self.problem, level)
        parts = [
            with_leaves(lambda v, part: loss(x.value, v, part), y.value, point, part).reshape(())
            for part in self.problem.split(batch)
        ]
        total = torch.stack(parts).sum()
        finite_loss(level, total, self.problem, x, y, batch)
        return total

    def _projected(self, point: Vector) -> Vector:
        project = self.problem.project_lower
        if not constrained(self.problem, "lower"):
            return point
        y = self.state.variables["y"].value
        return with_leaves(lambda v: leaves(project(v)), y, point)  # pyright: ignore


def _reverse(steps: _Steps, s: Vector, first: int) -> tuple[Vector, Vector]:
    tapes: list[Tape] = []
    for t in range(first, steps.total):
        tapes.append(steps.tape(s, t))
        s = tapes[-1][1]
    end, along_x, r = steps.upper(s)
    adjoint, along_x = steps.pull(reversed(tapes), [*r, *zeros(s[steps.size :])], along_x)
    _note_left_out(steps, adjoint, r)
    return along_x, end


def _traced(
    steps: _Steps, lower: staged.Staged[Traced], s: Vector, first: int
) -> tuple[Vector, Vector]:
    """As `_reverse`, with one trace for all steps."""
    tapes = []
    for t, batch in enumerate(steps.batches):
        before, phi = s, lower.at(s, batch)
        if t < first:
            s = phi.values(s)
        else:
            s, saved = phi.record(s)
            tapes.append((phi, saved))
        if t == steps.total - 1:
            steps.finish(phi.scalar(before), before, s)
    end, along_x, r = steps.upper(s)
    adjoint = [*r, *zeros(s[steps.size :])]
    for phi, saved in reversed(tapes):
        adjoint, share = phi.pull(saved, adjoint)
        along_x = plus(along_x, share)
    steps.count_products(len(tapes))
    _note_left_out(steps, adjoint, r)
    return along_x, end


def _compiled(
    steps: _Steps, lower: staged.Staged[Compiled], s: Vector, first: int
) -> tuple[Vector, Vector]:
    """As `_traced`, with steps in turn on one batch in one call."""
    tapes: list[tuple[Compiled, Unrolled]] = []
    kept = [(id(batch), t >= first) for t, batch in enumerate(steps.batches)]
    for (_, keep), part in groupby(range(steps.total), key=kept.__getitem__):
        turns = list(part)
        phi = lower.at(s, steps.batches[turns[0]])
        unrolled = phi.unroll(s, steps=len(turns))
        s = unrolled.end
        tapes += [(phi, unrolled)] if keep else []
        if turns[-1] == steps.total - 1:
            steps.finish(unrolled.scalar, unrolled.before, s)
    end, along_x, r = steps.upper(s)
    adjoint = [*r, *zeros(s[steps.size :])]
    for phi, unrolled in reversed(tapes):
        adjoint, along_x = phi.pull(unrolled, adjoint, along_x)
    steps.count_products(steps.total - first)
    _note_left_out(steps, adjoint, r)
    return along_x, end


def _checkpointed(steps: _Steps, s: Vector, first: int) -> tuple[Vector, Vector]:
    width = math.isqrt(steps.total - first - 1) + 1
    kept: list[Vector] = []
    for t in range(first, steps.total):
        if (t - first) % width == 0:
            kept.append(_detached(s))
        s = steps.tape(s, t)[1]  # as in reverse mode, also in rounding
    end, along_x, r = steps.upper(s)
    adjoint = [*r, *zeros(s[steps.size :])]
    for i, s in reversed(list(enumerate(kept))):
        tapes: list[Tape] = []
        for t in range(first + i * width, min(first + (i + 1) * width, steps.total)):
            tapes.append(steps.tape(s, t))
            s = tapes[-1][1]
        adjoint, along_x = steps.pull(reversed(tapes), adjoint, along_x)
    _note_left_out(steps, adjoint, r)
    return along_x, end


def _forward(steps: _Steps, s: Vector, first: int) -> tuple[Vector, Vector]:
    """Tangents Z <- dPhi/ds Z + dPhi/dx, one for each entry of x, then grad_x f + Z' grad_y f."""
    units = _units(steps.x)
    tangents = [zeros(s) for _ in units]
    for t in range(first, steps.total):
        inputs, s = steps.tape(s, t)
        # A vector pulled back is linear in the vector: its derivative pushes tangents forward.
        seeds = [torch.zeros_like(p, requires_grad=True) for p in s]
        pulled = torch.autograd.grad(
            s, [*inputs, *steps.x], seeds, create_graph=True, allow_unused=True
        )
        used = [i for i, p in enumerate(pulled) if p is not None and p.requires_grad]
        for i, unit in enumerate(units):
            along = [*tangents[i], *unit]
            pushed = torch.autograd.grad(
                [pulled[j] for j in used],  # pyright: ignore
                seeds,
                [along[j] for j in used],
                retain_graph=True,
                materialize_grads=True,
            )
            tangents[i] = list(pushed)
        steps.count_products(len(units))
    end, along_x, r = steps.upper(s)
    slopes = [sum((z * g).sum() for z, g in zip(tangent, r, strict=False)) for tangent in tangents]
    sizes = [p.numel() for p in along_x]
    parts = torch.stack([torch.as_tensor(slope) for slope in slopes]).split(sizes)
    return [g + part.view(g.shape).to(g) for g, part in zip(along_x, parts, strict=True)], end


def _sgd(options: ITD, s: Vector, g: Vector, t: int) -> Vector:
    y, m = s[: len(g)], s[len(g) :]
    m = [options.momentum * a + b for a, b in zip(m, g, strict=True)] if m else []
    return [*(p - options.lower_lr * b for p, b in zip(y, m or g, strict=True)), *m]


def _adam(options: ITD, s: Vector, g: Vector, t: int) -> Vector:
    n, (decay, decay2) = len(g), options.betas
    m = [decay * a + (1 - decay) * b for a, b in zip(s[n : 2 * n], g, strict=True)]
    q = [decay2 * a + (1 - decay2) * b * b for a, b in zip(s[2 * n :], g, strict=True)]
    fair, fair2 = 1 - decay ** (t + 1), 1 - decay2 ** (t + 1)
    y = [
        p - options.lower_lr * (a / fair) / (b / fair2 + options.eps).sqrt()
        for p, a, b in zip(s[:n], m, q, strict=True)
    ]
    return [*y, *m, *q]


def _note_left_out(steps: _Steps, adjoint: Vector, r: Vector) -> None:
    left = norm(adjoint[: steps.size]) / max(norm(r), 1e-300)
    steps.state.numbers["linear_residual"] = left


def _units(like: Vector) -> list[Vector]:
    """The unit vectors of a shape."""
    found = []
    for i, p in enumerate(like):
        for j in range(p.numel()):
            unit = zeros(like)
            unit[i].view(-1)[j] = 1.0
            found.append(unit)
    return found


def _detached(tensors: Vector) -> Vector:
    return [p.detach().clone() for p in tensors]
