"""From learned weights to what trainers take: shares, counts, fractions, factors.

w_i is the weight of the mean loss of source i, n_i its records, t_i the trained tokens of a record
on average, q_i the share of examples that are drawn from it, r_i the share of trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Unit = Literal["examples", "tokens"]
"""What a trainer averages its loss over: the examples of a batch, or its tokens."""

REPEATED = 4.0
"""Epochs above which more repetition teaches little: Muennighoff et al. 2023, arXiv 2305.16264."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What a trainer must draw so that its loss is sum_i w_i (mean loss of source i)."""

    weights: tuple[float, ...]
    """w_i, all positive; their sum does not matter."""
    records: tuple[int, ...]
    """n_i."""
    tokens: tuple[float, ...]
    """t_i."""
    unit: Unit

    @cached_property
    def examples(self) -> tuple[float, ...]:
        """q_i, proportional to w_i where the trainer averages over examples, else to w_i / t_i."""
        if self.unit == "examples":
            return _normalized(self.weights)
        return _normalized([w / t for w, t in zip(self.weights, self.tokens, strict=True)])

    @cached_property
    def trained_tokens(self) -> tuple[float, ...]:
        """r_i, proportional to q_i t_i; the weights themselves where the trainer averages so."""
        return _normalized([q * t for q, t in zip(self.examples, self.tokens, strict=True)])

    @cached_property
    def largest(self) -> int:
        """The largest total without repetition, min_i n_i / q_i."""
        exact = min(n / q for n, q in zip(self.records, self.examples, strict=True))
        return math.floor(exact * (1 + 1e-12))

    def epochs(self, total: int) -> tuple[float, ...]:
        """f_i = q_i N / n_i: a kept fraction below 1, a factor of repetition above."""
        return tuple(q * total / n for q, n in zip(self.examples, self.records, strict=True))

    def counts(self, total: int) -> tuple[int, ...]:
        """Records of each source in a set of N: q_i N rounded by largest remainders.

        Every count is within 1 of q_i N, and they add up to N.
        """
        exact = [q * total for q in self.examples]
        found = [math.floor(value) for value in exact]
        order = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
        for i in order[: total - sum(found)]:
            found[i] += 1
        return tuple(found)

    def multipliers(self) -> tuple[float, ...]:
        """Factors q_i / s_i of the loss for a trainer that draws by size, s_i = n_i / sum_j n_j."""
        sizes = _normalized(self.records)
        return tuple(q / s for q, s in zip(self.examples, sizes, strict=True))


def exact_fraction(count: int, size: int) -> float:
    """The number next to count / size for which int(number * size) is the count.

    >>> int(0.57 * 100), int(exact_fraction(57, 100) * 100)
    (56, 57)
    """
    fraction = count / size
    while int(fraction * size) < count:
        fraction = math.nextafter(fraction, math.inf)
    return fraction


def _normalized(values: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(values)
    return tuple(value / total for value in values)
