"""Bytes of a run in host memory, and of its checkpoints."""

from __future__ import annotations

from math import ceil, log2

from bilevel.problems.llm_reweight.choices import LIBRARIES, Choices
from bilevel.problems.llm_reweight.moments import weights_of
from bilevel.problems.llm_reweight.shapes import Shape

KEPT = 3
"""Checkpoints on disk at a time: the last two and the one being written."""


def host_bytes(of: Shape, made: Choices, devices: int) -> dict[str, float]:
    """Bytes of host memory by part, over all processes; none where that is the device."""
    if made.around[0] != "context and slack":
        return {}
    largest = max(of.embedding, of.head, *(a * b for a, b in of.linears))
    read = devices * largest / made.weight_shards
    found = (
        {"parts of one parameter while the model is read": read * made.weight}
        if made.by_parts
        else {"model, whole in every process while it is loaded": devices * of.total * made.weight}
    )
    if made.resident < made.learners:
        found["what is away from the device, pinned"] = made.learners * _pinned(of, made)
    if made.saved_whole:  # and in pieces of the writer once more
        found["a checkpoint while it is written"] = 2 * _checkpoint(of, made)
    elif made.weight_shards == 1:
        found["a checkpoint while it is written"] = _checkpoint(of, made)
    if made.states_on_host:
        own = made.held + made.masters + (made.gradient + made.width) * made.apart
        found["states and gradients of both copies"] = made.learners * made.trained(of) * own
    if made.weights_on_host:
        found["weights"] = devices * sum(weights_of(of, made).values())
    return found | {"libraries": devices * LIBRARIES}


def disk_bytes(of: Shape, made: Choices) -> dict[str, float]:
    """Bytes of files by part."""
    return {f"checkpoints, {KEPT} at a time": KEPT * _checkpoint(of, made)}


def swapped(of: Shape, made: Choices) -> float:
    """Bytes of one copy that come from host memory for a sweep and its step, and leave again.

    What is its alone, its states, and its gradient if that waits for another copy's; where the
    parameters step one by one, what trains comes and leaves again for that.
    """
    moved = made.held + made.gradient * (made.gradients > 1)
    if made.held_on_host:
        moved = made.held + made.gradient + made.weight
    return made.forked(of) * made.weight + made.trained(of) * moved


def _checkpoint(of: Shape, made: Choices) -> float:
    """Bytes of one checkpoint."""
    trained = made.trained(of)
    if made.rank:  # the base is not saved
        one = made.learners * trained * (made.adapter + made.held + made.kept)
    else:
        one = made.bases * of.total * made.weight + made.learners * of.total * made.kept
        one += made.learners * trained * made.held
        one += (made.bases == 1) * (made.learners - 1) * made.forked(of) * made.weight
    return one


def _pinned(of: Shape, made: Choices) -> float:
    """Bytes of numbers, gradient and states of one copy in pinned memory.

    There torch rounds every tensor up to a power of two.
    """
    inside = [a * b for a, b in of.linears]
    ends = [of.embedding, of.head]
    blocks = of.blocks if made.drawn is None else made.drawn
    trained = [of.embedding] * ("embedding" in made.ends) + [of.head] * ("head" in made.ends)
    held = int(made.held / made.width)
    found = sum(_power(n * made.weight) for n in [*inside * blocks, *ends])
    for n in [*inside * made.blocks, *trained]:
        found += _power(n * made.gradient) + held * _power(n * made.width)
    return found


def _power(size: float) -> float:
    return 2.0 ** ceil(log2(size)) if size else 0.0
