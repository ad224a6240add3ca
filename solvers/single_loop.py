"""Single-loop methods: y, v and x take one step each, at once, along three directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bilevel.descent import begin, converged, finite_norm, plus, set_lr, step_with_upper, zeros
from bilevel.errors import NonFiniteError
from bilevel.launch import Launcher
from bilevel.linear import norm
from bilevel.memory import Memory
from bilevel.oracle import Oracle, Vector
from bilevel.problem import Problem, Stream
from bilevel.result import Status
from bilevel.solver import Solver, State, free_lower, require
from bilevel.tree import dot, leaves
from bilevel.variable import optimizer_by_name

Terms = list[Vector]
"""Of a batch of g: grad_y g, H v and J'v. Of a batch of f: grad_y f and grad_x f."""


@dataclass(frozen=True, kw_only=True)
class SingleLoop(Solver):
    """One simultaneous step of y, v and x, v ~ H^{-1} grad_y f.

        d_y = grad_y g,    d_v = H v - grad_y f,    d_x = grad_x f - J'v
        y <- y - a d_y,    v <- v - c d_v,          x <- x - b h


    with H = d2g/dy2, J = d2g/dydx, all at the old (x, y, v), and the running mean
    h <- momentum h + (1 - momentum) d_x. One graph of grad_y g and one double
    backward through it give all products, so a step of `plain` costs one gradient of g, one of f,
    one product with H and one with J'. The terms of a step are estimated

    - `plain`: on the streams' next batches;
    - `saga`: on one random piece each of f and of g (see `Problem.pieces`), as
      new - stored + mean(stored); the first step visits all pieces;
    - `sarah`: on one random piece each at this and at the last iterate, as
      last + new - old, restarted by a visit to all pieces every `period` steps; two calls of every
      oracle a step;
    - `growing`: the mean over b random pieces each, b = 2 at first. Where the norm test
      var(d_x) / b <= theta^2 |d_x|^2 fails, b grows to what would pass it, up to all pieces.

    Reference: Dagreou, Ablin, Vaiter, Moreau, A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms, 2022 (2201.13409) for SOBA and SABA;
    Dagreou, Moreau, Vaiter, Ablin, A lower bound and a near-optimal algorithm for bilevel empirical
    risk minimization, 2023 (2302.08766) for SRBA; Chen, Xiao, Balasubramanian, Optimal algorithms
    for stochastic bilevel optimization under relaxed smoothness conditions, 2023 (2306.12067) for
    the momentum; Byrd, Chin, Nocedal, Wu, Sample size selection in optimization methods for machine
    learning, 2012, for the norm test. Deviations: v has the opposite sign to the papers; it is not
    projected on a ball; h starts at the first d_x; y and x may move by any optimizer; saga keeps no
    running mean, so that nothing drifts.
    """

    order: ClassVar[int] = 2

    estimator: Literal["plain", "saga", "sarah", "growing"] = "plain"
    """From what the directions are made: a batch, a piece with a memory, or ever more pieces."""
    theta: float = 0.5
    """Relative noise of the direction of x that growing allows."""
    momentum: float = 0.0
    """Weight of the past in the direction of x."""
    decay: float = 0.0
    """Step sizes at step t are their own divided by (t + 1)^decay."""
    period: int = 0
    """Steps between the restarts of sarah; 0 takes the larger number of pieces."""
    products: Literal["graph", "finite"] = "graph"
    """Second derivatives by autograd, or by differences of gradients where those do not exist."""
    upper_optimizer: str = "sgd"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_optimizer: str = "sgd"
    """A torch.optim optimizer for y."""
    lower_lr: float = 1e-1
    """Step size of y."""
    linear_lr: float = 0.0
    """Step size of v; 0 takes `lower_lr`."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        names = ("decay", "period", "linear_lr", "tolerance")
        require(
            self, momentum="in [0, 1)", theta="positive", **dict.fromkeys(names, "non-negative")
        )

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        state = begin(problem, memory, launcher, generator, upper=upper, lower=lower)
        state.vectors["v"] = zeros(leaves(state.variables["y"].value))
        if self.estimator != "plain":
            seeds = torch.randint(2**62, (2,), generator=generator).tolist()
            pieces = zip(("upper", "lower"), problem.pieces(), seeds, strict=True)
            state.streams = {name: Draws(own, seed) for name, own, seed in pieces}
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        x, y = state.variables["x"], state.variables["y"]
        state.memory.before_step(state.step, [y])
        terms = ESTIMATORS[self.estimator]
        lower, upper = terms(_Evaluation(self, problem, state))
        along_y, along_v, along_x = directions(lower, upper)
        v = state.vectors["v"]
        state.numbers |= {
            "lower_error": abs(float(dot(v, along_y))),
            "linear_residual": norm(along_v) / max(norm(upper[0]), 1e-300),
        }
        if self.momentum:
            past = state.vectors.get("h", along_x)
            along_x = [torch.lerp(d, h, self.momentum) for d, h in zip(along_x, past, strict=True)]
            state.vectors["h"] = along_x
        scale = (state.step + 1) ** -self.decay
        for variable, direction, lr in ((x, along_x, self.upper_lr), (y, along_y, self.lower_lr)):
            set_lr(variable, scale * lr)
            variable.clear()
            variable.gather(direction)
        state.numbers["lower_gradient"] = finite_norm(problem, x, y)
        if not all(bool(d.isfinite().all()) for d in along_v):
            raise NonFiniteError("the direction of v is not finite; lower linear_lr")
        step_with_upper(launcher, state, [y])
        state.vectors["v"] = plus(v, along_v, -scale * (self.linear_lr or self.lower_lr))
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def check(self, problem: Problem) -> list[str]:
        faults = free_lower(problem, "single-loop methods need")
        names = ("batches", "pieces")
        own = {n for n in names if getattr(type(problem), n) is not getattr(Problem, n)}
        if self.estimator != "plain" and own == {"batches"}:
            faults.append(
                f"{self.estimator} visits the pieces of finite sums, and the problem has batches "
                "but no pieces; give it pieces(), or use soba."
            )
        return faults


def soba(**options: Any) -> SingleLoop:
    """SOBA: stochastic batches, step sizes falling as 1/sqrt(t) (Dagreou et al., 2201.13409)."""
    return SingleLoop(**{"decay": 0.5, "upper_lr": 0.1, **options})


def masoba(**options: Any) -> SingleLoop:
    """MA-SOBA: SOBA with momentum on the direction of x (Chen et al., 2306.12067)."""
    return SingleLoop(**{"momentum": 0.9, **options})


def saba(**options: Any) -> SingleLoop:
    """SABA: SAGA tables of all terms, constant step sizes (Dagreou et al., 2201.13409).

    Memory: 2 dim_y + dim_x numbers for each piece of g, dim_y + dim_x for each of f.
    """
    return SingleLoop(**{"estimator": "saga", **options})


def srba(**options: Any) -> SingleLoop:
    """SRBA: recursive estimates with restarts, constant step sizes (Dagreou et al., 2302.08766)."""
    return SingleLoop(**{"estimator": "sarah", **options})


def directions(lower: Terms, upper: Terms) -> tuple[Vector, Vector, Vector]:
    """d_y = grad_y g, d_v = H v - grad_y f and d_x = grad_x f - J'v."""
    along_y, hv, jv = lower
    return along_y, plus(hv, upper[0], -1.0), plus(upper[1], jv, -1.0)


class Draws(Stream):
    """Pieces drawn uniformly with replacement, each with its number."""

    def __init__(self, pieces: Sequence[Any], seed: int) -> None:
        self.pieces = pieces
        self._generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> tuple[int, Any]:
        index = int(torch.randint(len(self.pieces), (), generator=self._generator))
        return index, self.pieces[index]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])


class _Evaluation:
    """The terms of batches at the state's (x, y, v); sets the state's losses."""

    def __init__(self, solver: SingleLoop, problem: Problem, state: State) -> None:
        self.solver, self.state = solver, state
        self._oracle = Oracle(problem, state.counts)

    def lower(self, batch: Any) -> Terms:
        x, y = (self.state.variables[name].value for name in "xy")
        finite = self.solver.products == "finite"
        make = self._oracle.finite_curvature if finite else self._oracle.curvature
        bend = make(x, y, batch)
        self.state.lower = bend.value
        return [bend.gradient, *bend.both(self.state.vectors["v"])]

    def upper(self, batch: Any) -> Terms:
        x, y = (self.state.variables[name].value for name in "xy")
        found = self._oracle.upper(x, y, batch)
        self.state.upper = found.value
        return [found.y, found.x]

    def levels(self) -> Iterator[tuple[str, Callable[[Any], Terms], Any]]:
        """Of each level the name, the terms as a function of a batch, and the stream."""
        for name, terms in (("lower", self.lower), ("upper", self.upper)):
            yield name, terms, self.state.streams[name]


def _plain(at: _Evaluation) -> list[Terms]:
    return [terms(next(stream)) for _, terms, stream in at.levels()]


def _saga(at: _Evaluation) -> list[Terms]:
    """new + (mean(stored) - stored), in this order exactly new where there is one piece."""
    estimates = []
    for name, terms, stream in at.levels():
        key = f"{name}_table"
        if key not in at.state.vectors:
            rows = [_flat(terms(piece)) for piece in stream.pieces]
            at.state.vectors[key] = [torch.stack(column) for column in zip(*rows, strict=True)]
        index, piece = next(stream)
        new = terms(piece)
        pairs = list(zip(_flat(new), at.state.vectors[key], strict=True))
        found = [n + (table.mean(0) - table[index]) for n, table in pairs]
        for n, table in pairs:
            table[index] = n
        estimates.append(_shaped(found, new))
    return estimates


def _sarah(at: _Evaluation) -> list[Terms]:
    """new + (last - old), in this order exactly new where there is one piece."""
    state, vectors = at.state, at.state.vectors
    here = _point(state)
    levels = list(at.levels())
    period = at.solver.period or max(len(stream.pieces) for _, _, stream in levels)
    estimates = []
    for name, terms, stream in levels:
        if state.step % period == 0:
            found = _mean([terms(piece) for piece in stream.pieces])
        else:
            _, piece = next(stream)
            with _moved(state, vectors["last_point"]):
                old = _flat(terms(piece))
            new = terms(piece)
            triples = zip(_flat(new), vectors[f"{name}_last"], old, strict=True)
            found = _shaped([n + (last - o) for n, last, o in triples], new)
        vectors[f"{name}_last"] = _flat(found)
        estimates.append(found)
    vectors["last_point"] = here
    return estimates


def _growing(at: _Evaluation) -> list[Terms]:
    """The mean of `batch` pieces of each level, all of them once that reaches their number."""
    state, levels = at.state, list(at.levels())
    most = max(len(stream.pieces) for _, _, stream in levels)
    size = int(state.numbers.setdefault("batch", float(min(2, most))))
    samples = [
        [terms(piece) for piece in stream.pieces]
        if size >= len(stream.pieces)
        else [terms(next(stream)[1]) for _ in range(size)]
        for _, terms, stream in levels
    ]
    estimates = [_mean(own) for own in samples]
    if size < most:
        pairs = zip(samples[0], samples[1], strict=False)
        drawn = [directions(lower, upper)[2] for lower, upper in pairs]
        center = directions(*estimates)[2]
        spread = sum(norm(plus(d, center, -1.0)) ** 2 for d in drawn) / max(1, len(drawn) - 1)
        wanted = spread / max((at.solver.theta * norm(center)) ** 2, 1e-300)
        state.numbers["batch"] = float(min(most, max(size, math.ceil(min(wanted, most)))))
    return estimates


def _mean(terms: Sequence[Terms]) -> Terms:
    columns = [torch.stack(column).mean(0) for column in zip(*map(_flat, terms), strict=True)]
    return _shaped(columns, terms[0])


ESTIMATORS: dict[str, Callable[[_Evaluation], list[Terms]]] = {
    "plain": _plain,
    "saga": _saga,
    "sarah": _sarah,
    "growing": _growing,
}


def _flat(terms: Terms) -> Vector:
    return [t for vector in terms for t in vector]


def _shaped(flat: Vector, like: Terms) -> Terms:
    rest = iter(flat)
    return [[next(rest) for _ in vector] for vector in like]


def _point(state: State) -> Vector:
    """Copies of x, y and v."""
    values = (leaves(state.variables[name].value) for name in "xy")
    return [p.detach().clone() for p in [*(p for own in values for p in own), *state.vectors["v"]]]


@contextmanager
def _moved(state: State, point: Vector) -> Iterator[None]:
    """Within the block x, y and v are at `point`."""
    here = _point(state)
    try:
        _assign(state, point)
        yield
    finally:
        _assign(state, here)


def _assign(state: State, point: Vector) -> None:
    rest = iter(point)
    for name in "xy":
        variable = state.variables[name]
        variable.assign([next(rest) for _ in leaves(variable.value)])
    state.vectors["v"] = list(rest)
