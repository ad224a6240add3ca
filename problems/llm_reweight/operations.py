"""Operations of one upper step, and what a device receives from the others in it."""

from __future__ import annotations

from bilevel.footprint import Work
from bilevel.problems.llm_reweight.choices import Choices
from bilevel.problems.llm_reweight.launching import WIDE
from bilevel.problems.llm_reweight.moments import chunk, head_trains
from bilevel.problems.llm_reweight.passes import Passes
from bilevel.problems.llm_reweight.shapes import Shape


def pass_flops(of: Shape, made: Choices, passes: Passes) -> float:
    """Operations of one pass, forward and backward, for each token.

    A multiplication and its addition count as two. Attention is counted whole, as torch's counter
    does; kernels that skip what a token may not see do about half of it. Gradients of the input
    run from the head down to the lowest part that trains; where the embedding does not, LISA's
    depth is the mean over its draws. A checkpointed block that they reach is computed again up to
    its last matrix, whose output nobody needs.
    """
    queries = of.heads * of.head_size
    matrices, head = 2 * of.matrices * of.blocks, 2 * of.embedding
    seen = 4 * queries * passes.length * of.blocks
    depth = 1.0
    if "embedding" not in made.ends and not made.rank and made.blocks:
        reached = of.blocks - made.trunk
        depth = (reached + 1 - (reached + 1) / (made.blocks + 1)) / of.blocks
    forward = matrices + seen + head
    inputs = depth * (matrices + 2.5 * seen) + head
    weights = 2 * of.matrices * made.blocks if not made.rank else 0
    weights += head * head_trains(of, made)
    last = 2 * of.blocks * of.linears[-1][0] * of.linears[-1][1]
    again = (
        made.checkpointing * depth * (matrices + seen - last)
        + (passes.tokens > chunk(of, made)) * head
    )
    low_rank = (6 + 2 * made.checkpointing) * made.trained(of) * bool(made.rank)
    return forward + inputs + weights + again + low_rank


def trunk_flops(of: Shape, made: Choices, passes: Passes) -> float:
    """Operations of one pass through the trunk for each token, where that is passed once."""
    seen = 4 * of.heads * of.head_size * passes.length
    return made.once * made.trunk * (2 * of.matrices + seen)


def traffic(of: Shape, made: Choices, passes: Passes, work: Work) -> dict[str, float]:
    """Bytes that a device receives: weights twice in a pass, gradients once in a sweep."""
    sweeps = max(work.lower, work.upper)
    gradients = made.trained(of) * WIDE
    if made.gathers:
        share = 1 - 1 / made.weight_shards
        count = work.lower * passes.lower + work.upper * passes.upper
        return {
            "gathered weights": 2 * count * of.total * made.weight * share,
            "reduced gradients": sweeps * gradients * share,
        }
    if made.gradient_shards > 1:  # ZeRO-2 gathers what has stepped
        share = 1 - 1 / made.gradient_shards
        stepped = made.learners * made.trained(of) * (made.adapter if made.rank else made.weight)
        return {
            "gathered weights": stepped * share,
            "reduced gradients": sweeps * gradients * share,
        }
    return {"reduced gradients": 2 * sweeps * gradients} if made.deferred else {}


def step_tokens(work: Work, passes: Passes) -> float:
    """Tokens that pass through a copy in one upper step, over all devices."""
    return work.lower * passes.padded[0] + work.upper * passes.padded[1]


def saved_tokens(work: Work, passes: Passes) -> float:
    """Tokens of one upper step that a copy passes after another; each batch is new to one copy."""
    lower, upper = (max(0, sweeps - work.batches) for sweeps in (work.lower, work.upper))
    return lower * passes.padded[0] + upper * passes.padded[1]
