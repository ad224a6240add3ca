"""Many instances of one problem at once: other starts, one vectorized step for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bilevel.errors import InputError
from bilevel.problem import Problem, Stream, constrained
from bilevel.tree import Value, clone, leaves, map_leaves


class Batch(Problem):
    """n copies of a problem whose x and y are stacked along a new first dimension.

        F(x_1, ..., x_n) = sum_i f(x_i, y*(x_i)),    losses by torch.func.vmap

    The copies do not touch: a solver whose operations act entry by entry (penalty, f2sa, itd, soba,
    neumann, with SGD or Adam) does for each what it would do alone, to rounding. Solvers that take
    norms or inner products over all of y (cg, clipping, line searches, and penalty unless settle=0)
    share those among the copies. All copies see the same batches of data.

    Args:
        problem: Of trees of tensors; its losses must be functions that `torch.func.vmap` takes.
        starts: The start (x0, y0) of each copy.

    Raises:
        InputError: If there is no start, or a value is a module.

    >>> import bilevel
    >>> from bilevel.problems.quadratic import Quadratic
    >>> problem = Quadratic()
    >>> starts = [(torch.full((3,), s).double(), torch.zeros(5).double()) for s in (-1.0, 1.0)]
    >>> result = bilevel.solve(Batch(problem, starts), "f2ba", steps=5)
    >>> result.x.shape, [tuple(x.shape) for x, y in Batch.unstack(result)]
    (torch.Size([2, 3]), [(3,), (3,)])
    """

    def __init__(self, problem: Problem, starts: Sequence[tuple[Value, Value]]) -> None:
        if not starts:
            raise InputError("starts must hold at least one pair (x0, y0), got none.")
        if any(isinstance(value, nn.Module) for pair in starts for value in pair):
            raise InputError("Batch takes trees of tensors, got a module; solve those one by one.")
        self.problem = problem
        self._start = tuple(_stack([pair[i] for pair in starts]) for i in (0, 1))
        with torch.no_grad():  # data that a loss makes when first called must not be made in vmap
            for loss, batch in zip((problem.upper, problem.lower), problem.whole(), strict=True):
                loss(*starts[0], batch)
        for level in ("upper", "lower"):
            if constrained(problem, level):
                project = getattr(problem, f"project_{level}")
                vars(self)[f"project_{level}"] = torch.func.vmap(project)

    @staticmethod
    def seeds(problem: Problem, seeds: Sequence[int]) -> Batch:
        """One copy for each seed, started where the problem starts with it."""
        return Batch(problem, [problem.init(torch.Generator().manual_seed(s)) for s in seeds])

    @staticmethod
    def unstack(result: Any) -> list[tuple[Value, Value]]:
        """The pairs (x, y) of a result's copies."""
        count = len(leaves(result.x)[0])
        return [
            (map_leaves(lambda t: t[i], result.x), map_leaves(lambda t: t[i], result.y))  # noqa: B023
            for i in range(count)
        ]

    def init(self, generator: torch.Generator) -> tuple[Value, Value]:
        return clone(self._start[0]), clone(self._start[1])

    def upper(self, x: Value, y: Value, batch: Any) -> Tensor:
        return torch.func.vmap(lambda a, b: self.problem.upper(a, b, batch))(x, y).sum()

    def lower(self, x: Value, y: Value, batch: Any) -> Tensor:
        return torch.func.vmap(lambda a, b: self.problem.lower(a, b, batch))(x, y).sum()

    def batches(self, generator: torch.Generator) -> tuple[Stream, Stream]:
        return self.problem.batches(generator)

    def whole(self) -> tuple[Any, Any]:
        return self.problem.whole()

    def pieces(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.problem.pieces()

    def split(self, batch: Any) -> Sequence[Any]:
        return self.problem.split(batch)

    def check(self) -> list[str]:
        return self.problem.check()


def _stack(values: Sequence[Value]) -> Value:
    parts = [pytree.tree_flatten(value) for value in values]
    shapes = {tuple(tuple(t.shape) for t in flat) for flat, _ in parts}
    if len(shapes) > 1 or any(spec != parts[0][1] for _, spec in parts):
        raise InputError("all starts must have one structure and one shape.")
    stacked = [
        torch.stack([t.detach() for t in column])
        for column in zip(*(f for f, _ in parts), strict=True)
    ]
    return pytree.tree_unflatten(stacked, parts[0][1])
