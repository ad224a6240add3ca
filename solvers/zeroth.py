"""Zeroth order: a forward-only penalty method by two-point estimates with replayed seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from bilevel.descent import begin, converged, move_upper, step_with_upper, zeros
from bilevel.errors import NonFiniteError
from bilevel.launch import Launcher
from bilevel.memory import Memory, trainable
from bilevel.oracle import Vector
from bilevel.problem import Problem, constrained
from bilevel.result import Status
from bilevel.solver import Solver, State, finite_loss, require
from bilevel.tree import leaves
from bilevel.variable import Variable, optimizer_by_name

Direction: TypeAlias = Callable[[], Iterator[Tensor]]
"""Makes the same tensors anew at every call, one leaf at a time."""


@dataclass(frozen=True, kw_only=True)
class ZO(Solver):
    """The forward-difference penalty with y and z moved by losses alone, never by a backward pass.

    z goes down g(x, .) and y goes down g(x, .) + nu f(x, .), nu = 1/penalty, both along the same
    random u on the same batch, so that only nu f drives them apart:

        s = (L(y + e u) - L(y - e u)) / 2e,    y <- y - lower_lr s u
        dF ~= grad_x f(x, y) + penalty (grad_x g(x, y) - grad_x g(x, z))

    The gradient of x holds y and z constant: for weights of data it is a forward pass and a few
    scalars. It can also be estimated along random directions of x. u is drawn again from its seed
    whenever it is needed; only the point itself is copied. An inner step costs, for every
    direction, 4 evaluations of g and 2 of f; the step of x costs 2 gradients of g and one of f for
    x alone, or 4 evaluations of g and 2 of f for every direction. Losses that differ by less than
    rounding have no slope: far out, y stays where it is instead of turning infinite.

    Reference: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, 2023
    (2305.17333), for the steps on y and z; Kwon, Kwon, Wright, Nowak, 2023 (2301.10945), for the
    penalty. Deviations: the point is copied rather than restored by adding back, so that evaluation
    leaves it as it was bit for bit; their combination is ours.
    """

    order: ClassVar[int] = 1

    upper_gradient: Literal["autograd", "two_point"] = "autograd"
    """How the gradient of x is taken; in both cases nothing is differentiated by y."""
    penalty: float = 10.0
    """1/nu, lambda or alpha in the literature; multiplies the noise of x's gradient."""
    inner_steps: int = 10
    """Steps on y and z for one step of x."""
    directions: int = 1
    """Directions that every estimate is averaged over."""
    spacing: float = 1e-3
    """e, in units of the standard normal entries of u."""
    warmup: int = 10
    """Upper steps during which x is held: at the start y and z agree and carry no signal."""
    upper_optimizer: str = "adam"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_lr: float = 1e-2
    """Step size of y and z; stable below about 2 / (L (dim_y + 2)) for one direction."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        require(
            self,
            **dict.fromkeys(("penalty", "spacing", "lower_lr"), "positive"),
            **dict.fromkeys(("inner_steps", "warmup", "tolerance"), "non-negative"),
            directions="at least 1",
        )
        optimizer_by_name(self.upper_optimizer, self.upper_lr)

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name("sgd", self.lower_lr)  # holds y and z, moved leaf by leaf
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower, twins=("z",))
        state.counts |= {"upper_eval": 0, "lower_eval": 0}
        seed = int(torch.randint(2**62, (), generator=generator, dtype=torch.int64))
        state.vectors["generator"] = [torch.Generator().manual_seed(seed).get_state()]
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        y, z = state.variables["y"], state.variables["z"]
        state.memory.before_step(state.step, [y, z])
        for _ in range(self.inner_steps):
            self._move_lower(problem, state)
        if state.step >= self.warmup:
            if self.upper_gradient == "autograd":
                self._gather_upper(problem, launcher, state)
                step_with_upper(launcher, state, [])
            else:
                move_upper(launcher, state, self._estimate_upper(problem, state))
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def _move_lower(self, problem: Problem, state: State) -> None:
        y, z = state.variables["y"], state.variables["z"]
        batches = next(state.streams["upper"]), next(state.streams["lower"])
        moves: list[tuple[Variable, Direction, float]] = []
        for seed in self._seeds(state):
            for copy, weight in ((y, 1 / self.penalty), (z, 0.0)):
                points, u = trainable(copy), replay(trainable(copy), seed)

                def value(copy: Variable = copy, weight: float = weight) -> float:
                    lower = _value("lower", problem, state, copy, batches[1])
                    upper = _value("upper", problem, state, copy, batches[0]) if weight else 0.0
                    if weight:
                        state.upper, state.lower = upper, lower
                    return lower + weight * upper

                moves.append((copy, u, two_point(value, points, u, self.spacing)))
        for copy, u, slope in moves:
            with torch.no_grad():
                for p, direction in zip(trainable(copy), u(), strict=True):
                    p.add_(direction, alpha=-self.lower_lr * slope / self.directions)
        for copy in (y, z):
            if copy.project is not None and constrained(problem, "lower"):
                with torch.no_grad():
                    copy.assign(leaves(copy.project(copy.value)))

    def _gather_upper(self, problem: Problem, launcher: Launcher, state: State) -> None:
        """x gathers grad_x f(x, y) + penalty (grad_x g(x, y) - grad_x g(x, z))."""
        x, y, z = (state.variables[name] for name in "xyz")
        batches = {level: next(state.streams[level]) for level in ("upper", "lower")}
        x.clear()
        seen: list[float] = []
        terms = (("upper", y, 1.0), ("lower", y, self.penalty), ("lower", z, -self.penalty))
        for level, copy, factor in terms:
            total = 0.0
            with copy.frozen(), x.weighted(factor):
                for part in problem.split(batches[level]):
                    loss = getattr(problem, level)(x.value, copy.value, part)
                    if loss.requires_grad:
                        launcher.backward(loss)
                    total += finite_loss(level, loss, problem, x, copy, part)
            state.counts[f"{level}_grad"] += 1
            seen.append(total)
        self._note(state, *seen)

    def _estimate_upper(self, problem: Problem, state: State) -> Vector:
        x, y, z = (state.variables[name] for name in "xyz")
        batches = {level: next(state.streams[level]) for level in ("upper", "lower")}
        points = leaves(x.value)
        found, seen = zeros(points), []

        def value() -> float:
            f = _value("upper", problem, state, y, batches["upper"])
            g = [_value("lower", problem, state, copy, batches["lower"]) for copy in (y, z)]
            seen.append((f, *g))
            return f + self.penalty * (g[0] - g[1])

        for seed in self._seeds(state):
            u = replay(points, seed)
            slope = two_point(value, points, u, self.spacing)
            for p, direction in zip(found, u(), strict=True):
                p.add_(direction, alpha=slope / self.directions)
        self._note(state, *(sum(column) / len(seen) for column in zip(*seen, strict=True)))
        return found

    def _note(self, state: State, f: float, g: float, h: float) -> None:
        state.upper, state.lower = f, g
        state.numbers |= {"penalty": self.penalty, "penalty_gap": self.penalty * (g - h)}

    def _seeds(self, state: State) -> list[int]:
        """Seeds of the next directions."""
        generator = torch.Generator()
        generator.set_state(state.vectors["generator"][0])
        draws = torch.randint(2**62, (self.directions,), generator=generator, dtype=torch.int64)
        state.vectors["generator"] = [generator.get_state()]
        return draws.tolist()


def two_point(
    value: Callable[[], float], points: Sequence[Tensor], direction: Direction, spacing: float
) -> float:
    """s = (L(w + e u) - L(w - e u)) / 2e, the slope of L along u; exact on quadratics.

    Args:
        value: L at the present content of `points`, which are left as they were bit for bit.
        points: w, moved in place.
        direction: u, made anew for either end.
        spacing: e.

    Raises:
        NonFiniteError: If the slope is not finite.

    >>> w = torch.ones(2)
    >>> s = two_point(lambda: float(w @ w), [w], lambda: iter([torch.tensor([1.0, 0.0])]), 0.5)
    >>> s, w
    (2.0, tensor([1., 1.]))
    """
    here = [p.detach().clone() for p in points]
    ends: list[float] = []
    with torch.no_grad():
        try:
            for sign in (1.0, -1.0):
                for p, start, u in zip(points, here, direction(), strict=True):
                    p.copy_(torch.add(start, u, alpha=sign * spacing))
                ends.append(value())
        finally:
            for p, start in zip(points, here, strict=True):
                p.copy_(start)
    slope = (ends[0] - ends[1]) / (2 * spacing)
    if not math.isfinite(slope):
        raise NonFiniteError(f"the slope of a loss along a random direction is {slope}")
    return slope


def replay(like: Sequence[Tensor], seed: int) -> Direction:
    """Standard normal tensors of given shapes, one leaf at a time, the same at every call.

    >>> u = replay([torch.zeros(2)], 7)
    >>> bool((next(u()) == next(u())).all())
    True
    """

    def draw() -> Iterator[Tensor]:
        generators: dict[torch.device, torch.Generator] = {}
        for p in like:
            if p.device not in generators:
                generators[p.device] = torch.Generator(device=p.device).manual_seed(seed)
            yield torch.randn(
                p.shape, generator=generators[p.device], dtype=p.dtype, device=p.device
            )

    return draw


def _value(
    level: Literal["upper", "lower"], problem: Problem, state: State, copy: Variable, batch: Any
) -> float:
    """A loss at a copy of y, without a graph."""
    x, loss = state.variables["x"], getattr(problem, level)
    total = 0.0
    with torch.no_grad():
        for part in problem.split(batch):
            total += finite_loss(level, loss(x.value, copy.value, part), problem, x, copy, part)
    state.counts[f"{level}_eval"] += 1
    return total
