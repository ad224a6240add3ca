"""What glibc's malloc keeps of the memory that a step on a processor has freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bilevel.problems.llm_reweight.choices import Choices
from bilevel.problems.llm_reweight.launching import WIDE
from bilevel.problems.llm_reweight.shapes import Shape

MAPPED = 32 * 2**20
"""Bytes from which malloc maps memory that it gives back at once, DEFAULT_MMAP_THRESHOLD_MAX."""
BUFFERS = ("gathered", "unreduced gradient")
"""Parts that pass by for each unit of the model, of which holes are counted."""


def kept(of: Shape, made: Choices, passing: Mapping[str, float]) -> dict[str, float]:
    """Bytes by part, where so many bytes by part come and go in a step."""
    if not made.keeps:
        return {}
    others = sum(size for part, size in passing.items() if part not in BUFFERS)
    found = {"freed memory that malloc keeps": made.keeps * others}
    return found | ({"holes of buffers in malloc's heap": holes(of, made)} if made.buffered else {})


def holes(of: Shape, made: Choices) -> float:
    """Bytes of the buffers through which an engine passes all units of a model once.

    Torch asks for aligned memory, for which malloc takes a little more than it keeps. So the hole
    that a buffer leaves is too small for the next of its size, unless a neighbor is free too; but
    activations stay between. Each unit passes as a whole and by parameter: its numbers
    where these arrive in one buffer, and then gradients, which are wide as a whole.
    """
    inside = [a * b for a, b in of.linears]
    inside.append(of.block - sum(inside))
    ends = {part: getattr(of, part) for part in ("embedding", "head", "norms")}
    found = _heaped([*inside * of.blocks, *ends.values()], made.weight)
    if made.buffered > 1:
        found += _heaped([*[of.block] * of.blocks, *ends.values()], made.weight)
    if made.rank:
        return found + made.trained(of) * (made.gradient + WIDE)
    own = [ends[part] for part in made.ends]
    found += _heaped([*inside * made.blocks, *own], made.gradient)
    return found + _heaped([*[of.block] * made.blocks, *own], WIDE)


def _heaped(sizes: Sequence[int], width: float) -> float:
    """Bytes of those buffers of so many numbers that are cut from the heap."""
    return sum(size * width for size in sizes if size * width < MAPPED)
