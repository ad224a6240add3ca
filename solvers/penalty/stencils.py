"""Finite differences at equidistant points, the stencils of the penalty template."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import prod


@cache
def stencil(order: int) -> dict[int, float]:
    """Offsets j and coefficients c_j of a first derivative at 0, exact to an order, at spacing 1.

        l'(0) = sum_j c_j l(j) + O(order-th power of the spacing),    c_j = L_j'(0)

    with L_j the Lagrange polynomials of the points: +-1, ..., +-order/2 for an even order, one more
    on the positive side than on the negative, and 0, for an odd one. These are 2 ceil(order/2)
    points either way. The offset +1 comes first, then by distance from 0.

    >>> stencil(1), stencil(2)
    ({1: 1.0, 0: -1.0}, {1: 0.5, -1: -0.5})
    >>> {j: round(12 * c) for j, c in stencil(4).items()}
    {1: 8, -1: -8, 2: -1, -2: 1}
    """
    half = (order + 1) // 2
    points = [j for j in range(half - order, half + 1) if j or order % 2]
    points.sort(key=lambda j: (j != 1, abs(j), -j))
    return {j: float(_slope(j, [k for k in points if k != j])) for j in points}


def _slope(point: int, others: list[int]) -> Fraction:
    """The derivative at 0 of the polynomial that is 1 at a point and 0 at the others."""
    terms = (prod(-k for k in others if k != left) for left in others)
    return Fraction(sum(terms), prod(point - k for k in others))
