"""The lower level's loops over a trace, each compiled into one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from bilevel.errors import InputError
from bilevel.loops import back, conjugate_gradients, keep, repeat
from bilevel.trace import Function, Saved, Stage, Stages, Vector, flattened, split

OPTIONS = {"cpp_wrapper": True}
"""Of Inductor: the loop itself in C++, too."""
SINCE = "2.13"
"""Of torch: in 2.11 Inductor fails at most of these loops, with an assertion of its own."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The scalar and F at s, and v with H v ~ b, H = dF/ds."""

    scalar: Tensor
    values: Vector
    solution: Vector
    """v."""
    pulled: Vector
    """(dF/dx)'v."""
    steps: int
    """Products with H, besides that of the start."""
    stop: int
    """1 after a direction of no or negative curvature, 2 after numbers that are not finite."""
    residual: float
    """|b - H v|."""


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Steps s <- F(x, s), and what their pullbacks need."""

    steps: int
    end: Vector
    before: Vector
    """s before the last step."""
    scalar: Tensor
    """At `before`."""
    saved: Vector
    """By step."""
    known: Saved


class Compiled:
    """Loops over the values of F(x, s) and its pullbacks, compiled by Inductor at their first call.

    The kernels are those of `bilevel.trace.Traced`, in simpler ones that a compiler fuses, so that
    between two products of matrices there is one loop in C++ and between two steps no Python.
    Tall matrices are held by column from step to step. Each loop is compiled once for its shapes.

        at       what depends on x, the batch and constants alone
        descend  steps s <- s - lr F
        solve    v with (dF/ds) v ~ b, and (dF/dx)'v
        unroll   steps s <- F
        pull     v through these steps, from the last to the first

    Args:
        function: F, and a scalar beside it, as for `Traced`.
        x: Like those to come, on the CPU.
        s: Likewise.
        batch: Likewise.

    Raises:
        InputError: If the function cannot be traced, or not on the CPU; by each loop, if it cannot
            be compiled.
    """

    engine: ClassVar[str] = "compiled"

    def __init__(self, function: Function, x: Vector, s: Vector, batch: Any) -> None:
        from torch._inductor.decomposition import select_decomp_table

        flat, self._batch = flattened(batch)
        if any(p.device.type != "cpu" for p in (*x, *s, *flat)):
            raise InputError("engine=compiled runs on the CPU; use engine=traced.")
        self._stages = Stages(function, x, s, flat, self._batch, select_decomp_table())
        self._size, self._shapes = len(s), _shapes(s)
        self._saved: list[torch.Size] | None = None
        self._known: Saved = {}
        self._calls: dict[Any, Callable[..., Any]] = {}

    def fits(self, batch: Any) -> bool:
        """Whether a batch differs from the traced one in the numbers of its tensors at most."""
        return flattened(batch)[1] == self._batch

    def at(self, x: Vector, batch: Any) -> None:
        """Take x and the batch that all following calls are at."""
        stages = self._stages
        nodes = [*stages.x, *stages.read]
        given = [*x, *flattened(batch)[0], *stages.read.values()]
        given = _dense(given)

        def first(given: Vector) -> Vector:
            found = stages.first(_env(nodes, given))
            return _upright(_held(found), _shapes(found))

        found = self._call("at", first, given) if stages.known else []
        self._known = _env([*nodes, *stages.known], _apart([*given, *found]))

    def descend(self, s: Vector, *, steps: int, lr: float) -> Vector:
        """s after so many steps s <- s - lr F(x, s)."""
        stages = self._stages
        nodes = self._nodes(stages.values)

        def step(held: Vector, fixed: Vector) -> Vector:
            own, lr, env = self._upright(held), fixed[0], _env(nodes, fixed[1:])
            found = stages.values(env | _env(stages.s, own))
            return _held([p - lr.to(p.dtype) * g for p, g in zip(own, found, strict=True)])

        def descent(numbers: Vector, s: Vector, known: Vector) -> Vector:
            end = repeat(step, numbers[0], _held(s), [numbers[1], *known])
            return _copies(self._upright(end))

        return self._call("descend", descent, _numbers(steps, lr), _dense(s), self._values(nodes))

    def solve(
        self, s: Vector, b: Vector, start: Vector, *, steps: int, tolerance: float, damping: float
    ) -> Solved:
        """v with (dF/ds + damping I) v ~ b by conjugate gradients, for symmetric dF/ds."""
        stages, n = self._stages, self._size
        nodes = self._nodes(stages.record, stages.number, stages.both)
        needed = [node for node in stages.pull_s.needs if node not in stages.v]

        def product(held: Vector, fixed: Vector) -> Vector:
            env = _env(needed, fixed) | _env(stages.v, self._upright(held))
            return _held(stages.pull_s(env))

        def solve(numbers: Vector, s: Vector, b: Vector, start: Vector, known: Vector) -> Vector:
            env = _env(nodes, known) | _env(stages.s, s)
            found, saved = split(stages.record(env), -len(stages.saved))
            env |= _env(stages.saved, [p.clone() for p in saved])  # of which some may be views
            fixed = [env[node] for node in needed]
            v, about = conjugate_gradients(product, _held(b), _held(start), numbers, fixed)
            v = self._upright(v)
            pulled = stages.both(env | _env(stages.v, v))[n:]
            return _copies([*about, *stages.number(env), *found, *v, *pulled])

        numbers = _numbers(steps, tolerance, damping)
        found = self._call(
            "solve", solve, numbers, *map(_dense, (s, b, start)), self._values(nodes)
        )
        (k, stop, size, scalar), rest = found[:4], found[4:]
        return Solved(
            scalar=scalar,
            values=rest[:n],
            solution=rest[n : 2 * n],
            pulled=rest[2 * n :],
            steps=int(k),
            stop=int(stop),
            residual=float(size),
        )

    def unroll(self, s: Vector, *, steps: int) -> Unrolled:
        """s after so many steps s <- F(x, s), with what `pull` needs."""
        stages, n = self._stages, self._size
        nodes = self._nodes(stages.record, stages.number)
        if self._saved is None:
            with torch.no_grad():
                found = stages.record(self._known | _env(stages.s, s))
            self._saved = _shapes(found[n:])

        def step(held: Vector, fixed: Vector) -> tuple[Vector, Vector]:
            env = _env(nodes, fixed) | _env(stages.s, self._upright(held[:n]))
            found = stages.record(env)
            return [*_held(found[:n]), *_copies(held[:n])], _held(found[n:])

        def unroll(s: Vector, known: Vector) -> Vector:
            found, saved = keep(step, steps, [*_held(s), *_held(s)], known)
            end, before = self._upright(found[:n]), self._upright(found[n:])
            scalar = stages.number(_env(nodes, known) | _env(stages.s, before))
            return [*_copies([*scalar, *end, *before]), *saved]

        found = self._call(("unroll", steps), unroll, _dense(s), self._values(nodes))
        before, saved = split(found[1 + n :], n)
        end = found[1 : 1 + n]
        return Unrolled(
            steps=steps,
            end=end,
            before=before,
            scalar=found[0],
            saved=saved,
            known=dict(self._known),
        )

    def pull(self, unrolled: Unrolled, v: Vector, along_x: Vector) -> tuple[Vector, Vector]:
        """v pulled through the unrolled steps, and `along_x` with the shares of x added."""
        stages = self._stages
        nodes, saved_shapes = self._nodes(stages.both), self._saved or []
        n, x_shapes = self._size, _shapes(along_x)

        def step(held: Vector, saved: Vector, fixed: Vector) -> Vector:
            env = _env(nodes, fixed) | _env(stages.saved, _upright(saved, saved_shapes))
            found = stages.both(env | _env(stages.v, self._upright(held[:n])))
            shares = zip(_upright(held[n:], x_shapes), found[n:], strict=True)
            return _held([*found[:n], *(p + q for p, q in shares)])

        def pull(v: Vector, along_x: Vector, saved: Vector, known: Vector) -> Vector:
            first = [*_held(v), *_held(along_x)]
            found = back(step, unrolled.steps, first, saved, known)
            return _copies([*self._upright(found[:n]), *_upright(found[n:], x_shapes)])

        known = [unrolled.known[node] for node in nodes]
        groups = _dense(v), _dense(along_x), unrolled.saved, known
        return split(self._call(("pull", unrolled.steps), pull, *groups), n)

    def _upright(self, held: Vector) -> Vector:
        return _upright(held, self._shapes)

    def _nodes(self, *parts: Stage) -> list[fx.Node]:
        """What is known before s that these stages need."""
        needs = dict.fromkeys(node for stage in parts for node in stage.needs)
        return [node for node in needs if node in self._known]

    def _values(self, nodes: Sequence[fx.Node]) -> Vector:
        return [self._known[node] for node in nodes]

    def _call(self, name: Any, function: Callable[..., Vector], *groups: Vector) -> Vector:
        """The outputs of a function of lists of tensors, compiled under a name."""
        sizes = [len(group) for group in groups]
        given = [p for group in groups for p in group]

        def flat(*given: Tensor) -> Vector:
            rest = iter(given)
            return function(*([next(rest) for _ in range(size)] for size in sizes))

        with torch.no_grad():
            if name not in self._calls:
                self._calls[name] = _compiled(flat, given)
            return list(self._calls[name](*given))


def _compiled(function: Callable[..., Vector], given: Vector) -> Callable[..., Any]:
    from torch.fx.experimental.proxy_tensor import make_fx

    if torch.__version__ < SINCE:
        raise InputError(
            f"engine=compiled needs torch {SINCE} or newer, this is {torch.__version__}; "
            "use engine=traced."
        )
    try:
        graph = make_fx(function, tracing_mode="fake")(*given)
        call: Any = torch._inductor.compile(graph, list(given), options=OPTIONS)
        return call
    except Exception as error:  # of tracing, of code generation or of a compiler for C++
        words = str(error).strip().splitlines() or [""]
        raise InputError(
            f"engine=compiled cannot compile the lower level ({type(error).__name__}: {words[0]}); "
            "it needs a compiler for C++, such as g++, in the path or named by CXX; "
            "use engine=traced."
        ) from error


def _env(nodes: Sequence[fx.Node], tensors: Sequence[Tensor]) -> Saved:
    return dict(zip(nodes, tensors, strict=True))


def _numbers(steps: int, *others: float) -> Vector:
    return [torch.tensor(steps), *(torch.tensor(p, dtype=torch.float64) for p in others)]


def _shapes(tensors: Vector) -> list[torch.Size]:
    return [p.shape for p in tensors]


def _tall(shape: torch.Size) -> bool:
    return len(shape) == 2 and shape[0] > shape[1]


def _held(tensors: Vector) -> Vector:
    """Copies in one dimension, where strides cannot change; of tall matrices by column."""
    return [p.view(-1) for p in _copies([p.t() if _tall(p.shape) else p for p in tensors])]


def _upright(held: Vector, shapes: list[torch.Size]) -> Vector:
    pairs = zip(held, shapes, strict=True)
    return [p.view(s[::-1]).t() if _tall(s) else p.view(s) for p, s in pairs]


def _dense(tensors: Vector) -> Vector:
    """With the strides that a loop was compiled for."""
    return [p.detach().contiguous() for p in tensors]


def _apart(tensors: Vector) -> Vector:
    """With copies of those that share memory with another, which a loop must not read."""
    seen: set[int] = set()
    found: Vector = []
    for p in tensors:
        place = p.untyped_storage().data_ptr()
        found.append(p.clone() if place in seen else p)
        seen.add(place)
    return found


def _copies(tensors: Sequence[Tensor]) -> Vector:
    return [p.clone(memory_format=torch.contiguous_format) for p in tensors]
