"""A seeded sparse random projection of gradients, one parameter at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.problems.llm_reweight.tokens import generator

KEPT = 2**24
"""Entries whose places are remembered; those of larger models are drawn again each time."""


class Sketch:
    """S g in `size` dimensions: entry j of a parameter is added to place h(j) with sign s(j).

        <S g, S g'> has the mean <g, g'> and a variance of at most 2 |g|^2 |g'|^2 / size

    over the seed. Places and signs of a parameter are drawn from the seed and its number, so no
    matrix is stored and nothing but the gradient of one parameter need exist.

    Reference: Charikar, Chen, Farach-Colton, Finding Frequent Items in Data Streams, 2002; as a
    projection: Weinberger et al., Feature Hashing for Large Scale Multitask Learning, ICML 2009.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._entries = 0

    def add(self, total: Tensor, number: int, gradient: Tensor) -> None:
        """Add the projection of the gradient of parameter `number` to `total`, [size], float32."""
        places, signs = self.draw(number, gradient.numel())
        values = gradient.detach().flatten().float() * signs.to(gradient.device)
        total += torch.zeros_like(total).index_add(
            0, places.to(total.device), values.to(total.device)
        )

    def draw(self, number: int, entries: int) -> tuple[Tensor, Tensor]:
        """Places and signs of the entries of a parameter, both [entries]."""
        if number in self._held:
            return self._held[number]
        drawn = generator(f"{self.seed}/{number}")
        places = torch.randint(self.size, (entries,), generator=drawn)
        signs = 2.0 * torch.randint(2, (entries,), generator=drawn) - 1.0
        if self._entries + entries <= KEPT:
            self._held[number] = places, signs
            self._entries += entries
        return places, signs
