"""First and second derivatives of a problem's losses, counted as they are taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.errors import InputError
from bilevel.problem import Problem
from bilevel.tree import Value, leaves
from bilevel.variable import is_module

Vector = list[Tensor]
"""One tensor for each leaf of x or of y, in the order of `bilevel.tree.leaves`."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """A loss at one point: its value and its gradients with respect to x and to y."""

    value: float
    x: Vector
    y: Vector


class Oracle:
    """The derivatives of one problem; every call adds to `counts`.

    `counts` has `upper_grad` and `lower_grad` (gradients, whichever arguments they are taken for),
    `hvp` (products H v with H = d2g/dy2) and `cross` (products J'v or J u with J = d2g/dydx), and
    for the same of the upper loss `upper_hvp` and `upper_cross`.

    Args:
        problem: Whose losses are differentiated.
        counts: Where calls are counted; a solver passes its state's.

    >>> from bilevel.problems.quadratic import Quadratic
    >>> problem = Quadratic()
    >>> x, y = problem.init(torch.Generator())
    >>> oracle = Oracle(problem, {})
    >>> gradients = oracle.upper(x, y, None)
    >>> [tuple(g.shape) for g in (*gradients.x, *gradients.y)], oracle.counts
    ([(3,), (5,)], {'upper_grad': 1})
    """

    def __init__(self, problem: Problem, counts: dict[str, int]) -> None:
        self.problem = problem
        self.counts = counts

    def upper(self, x: Value, y: Value, batch: Any) -> Gradients:
        """f, grad_x f and grad_y f."""
        self.count("upper_grad")
        return _gradients(self.problem, self.problem.upper, x, y, batch)

    def lower(self, x: Value, y: Value, batch: Any) -> Gradients:
        """g, grad_x g and grad_y g."""
        self.count("lower_grad")
        return _gradients(self.problem, self.problem.lower, x, y, batch)

    def curvature(self, x: Value, y: Value, batch: Any) -> Curvature:
        """H and J' at a point through one graph of grad_y g, reused by every product.

        Building the graph counts as one `lower_grad`. A product costs 1.6 to 2 gradients.
        """
        self.count("lower_grad")
        return _GraphCurvature(self, x, y, batch, self.problem.lower, ("hvp", "cross"))

    def upper_curvature(self, x: Value, y: Value, batch: Any) -> Curvature:
        """The same of f: d2f/dy2 and d2f/dydx. Building the graph counts as one `upper_grad`."""
        self.count("upper_grad")
        names = ("upper_hvp", "upper_cross")
        return _GraphCurvature(self, x, y, batch, self.problem.upper, names)

    def finite_curvature(
        self, x: Value, y: Value, batch: Any, *, spacing: float = 0.0
    ) -> Curvature:
        """H and J' at a point by central differences of gradients along y.

            H v ~ (grad_y g(x, y + e v) - grad_y g(x, y - e v)) / 2e,   J'v likewise with grad_x g

        Needs no second derivatives; one product costs two gradients, counted as such.

        Args:
            x: Upper variable.
            y: Lower variable; moved and restored bit for bit during a product.
            batch: Of the lower loss.
            spacing: |e v|; 0 takes eps^(1/3) (1 + |y|) for the dtype's eps.
        """
        return _FiniteCurvature(self, x, y, batch, spacing)

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1


class Curvature(ABC):
    """H = d2g/dy2 and J = d2g/dydx at one point and batch, as products with vectors."""

    value: float
    """g there."""
    gradient: Vector
    """grad_y g there."""

    @abstractmethod
    def hvp(self, v: Vector) -> Vector:
        """H v, shaped as y."""

    @abstractmethod
    def cross(self, v: Vector) -> Vector:
        """J'v = grad_x <grad_y g, v>, shaped as x."""

    @abstractmethod
    def push(self, u: Vector) -> Vector:
        """J u, shaped as y, for u shaped as x; counted as one `cross`."""

    @abstractmethod
    def both(self, v: Vector) -> tuple[Vector, Vector]:
        """H v and J'v for the price of one; counted as one of each."""


class _GraphCurvature(Curvature):
    def __init__(
        self, oracle: Oracle, x: Value, y: Value, batch: Any, loss: Any, names: tuple[str, str]
    ) -> None:
        self._oracle, self._names = oracle, names
        self._x, self._y = leaves(x), leaves(y)
        problem = oracle.problem
        # products compute checkpointed blocks again, by the same kernels
        self._kernels = partial(twice_differentiable, x, y)
        with torch.enable_grad(), _tracked([*self._x, *self._y]), self._kernels():
            losses = [loss(x, y, part) for part in problem.split(batch)]
            whole = torch.stack([part.reshape(()) for part in losses]).sum()
            found = torch.autograd.grad(whole, self._y, create_graph=True, allow_unused=True)
        self._graph = [(g, i) for i, g in enumerate(found) if g is not None and g.requires_grad]
        self.value = float(whole.detach())
        self.gradient = _filled(found, self._y)

    def hvp(self, v: Vector) -> Vector:
        self._oracle.count(self._names[0])
        return self._product(v, self._y)

    def cross(self, v: Vector) -> Vector:
        self._oracle.count(self._names[1])
        return self._product(v, self._x)

    def push(self, u: Vector) -> Vector:
        # J'v is linear in v, so that its derivative along u does not depend on where v is.
        self._oracle.count(self._names[1])
        outputs = [g for g, _ in self._graph]
        seeds = [torch.zeros_like(g, requires_grad=True) for g in outputs]
        result = [torch.zeros_like(p, requires_grad=False) for p in self._y]
        with torch.enable_grad(), _tracked(self._x), self._kernels():
            pulled = outputs and torch.autograd.grad(
                outputs, self._x, grad_outputs=seeds, create_graph=True, allow_unused=True
            )
        pairs = [(p, t) for p, t in zip(pulled, u, strict=False) if p is not None]
        if pairs:
            images, tangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(images, seeds, grad_outputs=tangents, allow_unused=True)
            for (_, i), image in zip(self._graph, found, strict=True):
                result[i] = result[i] if image is None else image.detach()
        return result

    def both(self, v: Vector) -> tuple[Vector, Vector]:
        self._oracle.count(self._names[0])
        self._oracle.count(self._names[1])
        found = self._product(v, [*self._y, *self._x])
        return found[: len(self._y)], found[len(self._y) :]

    def _product(self, v: Vector, inputs: Sequence[Tensor]) -> Vector:
        if not self._graph:
            return [torch.zeros_like(p) for p in inputs]
        outputs = [g for g, _ in self._graph]
        seeds = [v[i] for _, i in self._graph]
        with _tracked(inputs), self._kernels():
            found = torch.autograd.grad(
                outputs, inputs, grad_outputs=seeds, retain_graph=True, allow_unused=True
            )
        return _filled(found, inputs)


class _FiniteCurvature(Curvature):
    def __init__(self, oracle: Oracle, x: Value, y: Value, batch: Any, spacing: float) -> None:
        self._oracle, self._point = oracle, (x, y, batch)
        self._y = leaves(y)
        here = oracle.lower(x, y, batch)
        self.value, self.gradient = here.value, here.y
        self._spacing = spacing or _spacing(self._y)
        self._spacing_x = spacing or _spacing(leaves(x))

    def hvp(self, v: Vector) -> Vector:
        return self._difference(v)[0]

    def cross(self, v: Vector) -> Vector:
        return self._difference(v)[1]

    def push(self, u: Vector) -> Vector:
        (plus, minus), e = self._ends(leaves(self._point[0]), u, self._spacing_x)
        return [(a - b) / (2 * e) for a, b in zip(plus.y, minus.y, strict=True)]

    def both(self, v: Vector) -> tuple[Vector, Vector]:
        return self._difference(v)

    def _difference(self, v: Vector) -> tuple[Vector, Vector]:
        (plus, minus), e = self._ends(self._y, v, self._spacing)
        pairs = (zip(plus.y, minus.y, strict=True), zip(plus.x, minus.x, strict=True))
        along_y, along_x = ([(a - b) / (2 * e) for a, b in pair] for pair in pairs)
        return along_y, along_x

    def _ends(
        self, moved: Sequence[Tensor], along: Vector, spacing: float
    ) -> tuple[list[Gradients], float]:
        """The gradients at `moved` +- e `along`, |e along| = spacing, and e."""
        size = _size(along)
        here = [p.detach().clone() for p in moved]
        e = spacing / size if size > 0 else 1.0
        found: list[Gradients] = []
        try:
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    for p, start, direction in zip(moved, here, along, strict=True):
                        p.copy_(start + sign * e * direction)
                found.append(self._oracle.lower(*self._point))
        finally:
            with torch.no_grad():
                for p, start in zip(moved, here, strict=True):
                    p.copy_(start)
        return found, e


def _size(v: Sequence[Tensor]) -> float:
    return float(torch.stack([p.detach().double().norm() for p in v]).norm())


def _spacing(point: Sequence[Tensor]) -> float:
    eps = max(torch.finfo(p.dtype).eps for p in point)
    return eps ** (1 / 3) * (1 + _size(point))


def twice_differentiable(x: Value, y: Value) -> AbstractContextManager[Any]:
    """Within the block attention uses a kernel that has second derivatives (torch 2.13).

    Only where x or y is a module: entering it costs as much as a small gradient.

    Raises:
        InputError: If a model of transformers takes a kernel that is not torch's own.
    """
    for value in (x, y):
        named = str(getattr(getattr(value, "config", None), "_attn_implementation", ""))
        if "flash" in named:  # its backward pass is a constant to autograd, without an error
            raise InputError(
                f"the attention of {type(value).__name__}, {named}, has no second derivatives; use "
                "a solver of first order, or problem.attention=sdpa."
            )
    return sdpa_kernel(SDPBackend.MATH) if is_module(x) or is_module(y) else nullcontext()


def _gradients(problem: Problem, loss: Any, x: Value, y: Value, batch: Any) -> Gradients:
    xs, ys = leaves(x), leaves(y)
    inputs = [*xs, *ys]
    value, total = 0.0, None
    with torch.enable_grad(), _tracked(inputs):
        for part in problem.split(batch):
            scalar = loss(x, y, part)
            value += float(scalar.detach())
            if not scalar.requires_grad:
                continue
            found = torch.autograd.grad(scalar, inputs, allow_unused=True, materialize_grads=True)
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    total = [torch.zeros_like(p) for p in inputs] if total is None else list(total)
    return Gradients(value=value, x=total[: len(xs)], y=total[len(xs) :])


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> Vector:
    return [
        torch.zeros_like(p) if g is None else g.detach() for g, p in zip(found, like, strict=True)
    ]


@contextmanager
def _tracked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the tensors require gradients, as autograd needs of its inputs."""
    was = [t.requires_grad for t in tensors]
    for t in tensors:
        t.requires_grad_()
    try:
        yield
    finally:
        for t, flag in zip(tensors, was, strict=True):
            if not flag:
                t.requires_grad_(False)
