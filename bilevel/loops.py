"""Loops of tensors that a compiler takes whole: repeated steps, steps kept, conjugate gradients.

Pure functions of lists of tensors on PyTorch's while_loop and scan, prototypes without a public
name under which they can be traced (torch 2.11 to 2.13). A step must not return its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = list[Tensor]
Step: TypeAlias = Callable[[Vector, Vector], Vector]
"""(what changes, what stays) -> what changes, anew."""


def repeat(step: Step, total: Tensor, first: Vector, fixed: Vector) -> Vector:
    """What `total` steps make of `first`."""
    n = len(first)

    def more(i: Tensor, *rest: Tensor) -> Tensor:
        return i < rest[n]

    def turn(i: Tensor, *rest: Tensor) -> Vector:
        return [i + 1, *step(list(rest[:n]), list(rest[n + 1 :]))]

    return _while(more, turn, [torch.zeros_like(total), *first], [total, *fixed])[1:]


def back(
    step: Callable[[Vector, Vector, Vector], Vector],
    total: int,
    first: Vector,
    rows: Vector,
    fixed: Vector,
) -> Vector:
    """What steps over the `total` rows of some tensors, from the last on, make of `first`."""
    n, m = len(first), len(rows)

    def more(i: Tensor, *rest: Tensor) -> Tensor:
        return i >= 0

    def turn(i: Tensor, *rest: Tensor) -> Vector:
        row = [p.index_select(0, i.view(1)).squeeze(0) for p in rest[n : n + m]]
        return [i - 1, *step(list(rest[:n]), row, list(rest[n + m :]))]

    last = torch.full((), total - 1, dtype=torch.int64)
    return _while(more, turn, [last, *first], [*rows, *fixed])[1:]


def keep(
    step: Callable[[Vector, Vector], tuple[Vector, Vector]],
    total: int,
    first: Vector,
    fixed: Vector,
) -> tuple[Vector, Vector]:
    """What `total` steps make of `first`, and what each lets keep, as rows."""
    from torch._higher_order_ops.scan import scan_op

    n = len(first)

    def turn(*given: Tensor) -> Vector:
        after, kept = step(list(given[:n]), list(given[n + 1 :]))
        return [*after, *kept]

    along = [torch.zeros(total)]  # what a scan needs to know its length
    found = list(scan_op(turn, first, along, tuple(fixed)))
    return found[:n], found[n:]


def conjugate_gradients(
    product: Step, b: Vector, start: Vector, numbers: Vector, fixed: Vector
) -> tuple[Vector, Vector]:
    """v with (H + damping I) v ~ b by `bilevel.linear.CG`, and (steps, stop, |b - H v|).

    stop is 1 after a direction of no or negative curvature, 2 after numbers that are not finite.

    Args:
        product: (v, fixed) -> H v.
        b: Right-hand side.
        start: First guess; zero is taken instead where it is better.
        numbers: Most steps, tolerance and damping.
        fixed: What products read.
    """
    n = len(b)
    total, tolerance, damping = numbers

    def damped(v: Vector, rest: Vector) -> Vector:
        return _plus(product(v, rest[1:]), v, rest[0])

    def more(k: Tensor, stop: Tensor, size: Tensor, *rest: Tensor) -> Tensor:
        total, goal = rest[3 + 3 * n : 5 + 3 * n]
        return (k < total) & (stop == 0) & (size > goal)

    def turn(k: Tensor, stop: Tensor, size: Tensor, *rest: Tensor) -> Vector:
        (pp, rs, largest), vectors = rest[:3], list(rest[3 : 3 + 3 * n])
        v, r, p = vectors[:n], vectors[n : 2 * n], vectors[2 * n :]
        hp = damped(p, list(rest[5 + 3 * n :]))
        bend = _dot(p, hp)
        largest = torch.maximum(largest, bend / pp)
        curved = bend <= torch.finfo(p[0].dtype).eps * largest * pp
        step = torch.where(curved, 0.0, rs / bend)
        v, r = _plus(v, p, step), _plus(r, hp, -step)
        new = _dot(r, r)
        size = torch.where(curved, size, new.sqrt())
        stop = torch.where(curved, 1, torch.where(size.isfinite(), stop, 2))
        ratio = new / rs
        pp = new + ratio**2 * pp  # r is orthogonal to the previous p
        return [k + 1, stop, size, pp, new, largest, *v, *r, *_plus(r, p, ratio)]

    r = _plus(b, damped(start, [damping, *fixed]), -1.0)
    whole, size = _dot(b, b).sqrt(), _dot(r, r).sqrt()
    good = size <= whole
    v = [torch.where(good, p, 0.0) for p in start]
    r = [torch.where(good, p, q) for p, q in zip(r, b, strict=True)]
    size = torch.where(good, size, whole)
    counts = [torch.zeros_like(total), torch.zeros_like(total)]
    sums = [size, size**2, size**2, torch.zeros_like(size)]
    first = [*counts, *sums, *v, *r, *(p.clone() for p in r)]
    found = _while(more, turn, first, [total, tolerance * whole, damping, *fixed])
    return found[6 : 6 + n], found[:3]


def _while(more: Any, turn: Any, first: Vector, fixed: Vector) -> Vector:
    from torch._higher_order_ops.while_loop import while_loop_op

    loop: Any = while_loop_op

    def turned(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(turn(*given))

    return list(loop(more, turned, tuple(first), tuple(fixed)))


def _dot(a: Vector, b: Vector) -> Tensor:
    """In float64: a loop carries the numbers that `bilevel.linear.CG` has as Python's."""
    parts = [(p * q).sum(dtype=_wide(p)).double() for p, q in zip(a, b, strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _plus(a: Vector, b: Vector, factor: Tensor | float) -> Vector:
    return [p + factor * q for p, q in zip(a, b, strict=True)]
