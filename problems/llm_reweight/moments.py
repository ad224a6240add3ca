"""Bytes on one device at the moments of a step that may be its peak."""

from __future__ import annotations

import dataclasses

from bilevel.problems.llm_reweight import heap
from bilevel.problems.llm_reweight.choices import Choices
from bilevel.problems.llm_reweight.launching import WIDE
from bilevel.problems.llm_reweight.losses import LOGITS
from bilevel.problems.llm_reweight.passes import Passes
from bilevel.problems.llm_reweight.shapes import Shape


def moments(of: Shape, made: Choices, passes: Passes) -> dict[str, dict]:
    """Bytes on one device by part at the moments that may be the peak of a step.

    The copies are swept by turns, and step each after its sweep or all after the last. So the peak
    is at the head or at the lowest block of the last pass of a sweep, or in the optimizer's step.
    At that head there is a gradient already, of earlier passes: y's first is of its upper loss. Of
    gradients that are summed whole before they are shared, those of the present sweep only.
    """
    n, trained = of.total, made.trained(of)
    kept = (trained if made.rank else n) * made.kept
    states = made.resident * trained * (made.held + made.masters) / made.state_shards
    states *= not (made.held_on_host or made.states_on_host)
    weights = weights_of(of, made)
    fixed = {
        "weights": weights["base"] * (not made.weights_on_host),
        "adapters": weights["adapters"] * (not made.weights_on_host),
        "master copies and optimizer": states + made.learners * kept / made.state_shards,
        made.around[0]: made.around[1],
    }
    if made.matrix:
        fixed["one matrix, not quantized"] = max(a * b for a, b in of.linears) * made.weight
    if made.once:
        several = passes.tokens * (passes.lower + passes.upper)
        fixed["output of the trunk"] = several * of.width * made.weight
    if made.buckets:
        fixed["buffers of gradients"] = made.buckets
    several = passes.lower > 1 or passes.upper > 0
    one = trained * made.gradient / made.gradient_shards * (not made.states_on_host)
    own = trained * WIDE if made.deferred and several else one
    unit = made.unit(of) * made.gradient / made.gradient_shards
    before = ((made.learners if made.stays else min(made.resident, made.gradients)) - 1) * one
    early = {"gradients": (before + own * (several or made.stays)) * made.at_once}
    late = {"gradients": before + own if made.at_once else unit}
    inside = 2 * made.weight * of.inner  # gradients of what is inside a block, on their way
    block = activations(of, made, trained=True) * made.checkpointing + inside
    reached = of.blocks - made.trunk
    block, rest = block * passes.tokens, reached * stored(of, made) * passes.tokens
    buffers = _buffers(of, made, (made.reduced or made.unit(of)) * (made.gradient + WIDE))
    found = {
        "at the head": early
        | {"activations": rest, "loss and head": head_bytes(of, made, passes.tokens)}
        | _buffers(of, made, head_trains(of, made) * of.embedding * WIDE),
        "at the lowest block": late | {"activations": rest / reached + block} | buffers,
        "at the highest block": early | {"activations": rest + block} | buffers,
        "in the optimizer's step": _step(of, made, one=one, unit=unit),
    }
    return {name: fixed | parts | heap.kept(of, made, parts) for name, parts in found.items()}


def weights_of(of: Shape, made: Choices) -> dict[str, float]:
    """Bytes of one device's share of all models, or their base, and of adapters on it."""
    base = made.bases * made.model(of)
    if made.bases == 1 < made.resident and not made.rank:
        base += (made.resident - 1) * made.forked(of) * made.weight
    adapters = made.learners * made.trained(of) * made.adapter * bool(made.rank)
    return {
        "base": base / made.weight_shards,
        "adapters": adapters / made.weight_shards,
    }


def stored(of: Shape, made: Choices) -> float:
    """Bytes that one token leaves in one block that may train, the mean over these."""
    if made.checkpointing:
        return made.weight * of.width
    if made.rank:
        return activations(of, made, trained=True)
    share = made.blocks / (of.blocks - made.trunk)
    active, frozen = (activations(of, made, trained=t) for t in (True, False))
    return share * active + (1 - share) * frozen


def activations(of: Shape, made: Choices, *, trained: bool) -> float:
    """Bytes that autograd keeps of one token in one block that is not checkpointed.

    Norms keep their float32 input; attention its queries, keys, values, output and a float32
    log-sum for each head; the product of gate and value both factors and the input of the gate. A
    matrix that trains keeps its input, a scale of a norm the normed vector.
    """
    e, h, inner = made.weight, of.width, of.inner
    queries, keys = of.heads * of.head_size, of.groups * of.head_size
    if of.kind == "gpt_neox":  # parallel norms of one input; values are a view of all three
        kept = e * h + 6 * e * h + WIDE * of.heads
        kept += e * inner * (7 if of.activation == "gelu_fast" else 1)
        more = 2 * e * h + e * inner
    else:
        kept = 2 * WIDE * h + 2 * e * (queries + keys) + WIDE * of.heads + 3 * e * inner
        more = 4 * e * h + e * inner
    if made.rank:  # every adapter keeps its input and what is between its two matrices
        inputs = [a for a, _ in of.adapted(made.targets)]
        more = made.adapter * sum(a + made.rank for a in inputs) / of.blocks
    return kept + more * (trained or bool(made.rank))


def head_bytes(of: Shape, made: Choices, tokens: int) -> float:
    """Bytes at the head: log-probabilities and two gradients of them in float32, then its own.

    Only so many tokens have logits at a time as are in a chunk (see `losses.token_losses`). From
    the second chunk on, the gradient so far, that of the chunk and their sum exist together.
    """
    at_once = chunk(of, made)
    logits = WIDE * of.vocabulary * min(tokens, at_once)
    own = head_trains(of, made) * of.embedding * made.weight
    several = tokens > at_once
    return max(3 * logits + own * several, 1.5 * logits + own * (3 if several else 1))


def chunk(of: Shape, made: Choices) -> int:
    """Tokens that have logits at a time."""
    return made.chunk or max(1, LOGITS // of.vocabulary)


def head_trains(of: Shape, made: Choices) -> bool:
    """Whether the matrix of the head, or the embedding tied to it, trains."""
    return not made.rank and ("embedding" if of.tied else "head") in made.ends


def _step(of: Shape, made: Choices, *, one: float, unit: float) -> dict[str, float]:
    """The optimizer's step of one copy: its gradient as wide as its states, and a temporary."""
    trained = made.trained(of)
    if made.held_on_host:
        return _step_alone(of, made)
    if made.states_on_host:
        return {"gradients": 0.0, "temporaries": 0.0}
    own = trained / made.gradient_shards
    own = min(own, made.stepped or own)
    wider = made.width * own if made.apart else max(0.0, made.width - made.gradient) * own
    copies = made.learners if made.stays else min(made.resident, made.gradients)
    largest = 2 * made.largest(of) / made.state_shards
    temporaries = (own if made.foreach or made.apart else largest) * made.width
    return {
        "gradients": copies * one + wider if made.at_once else unit,
        "temporaries": temporaries if made.held else 0.0,
    }


def _step_alone(of: Shape, made: Choices) -> dict[str, float]:
    """The step of the largest parameter, with all else of its copy in host memory.

    Of the first step: later ones have drawn more blocks, of which both copies are away by then.
    """
    largest = made.largest(of)
    base = of.total - dataclasses.replace(made, drawn=made.blocks).forked(of)
    return {
        "weights": (base + largest) * made.weight,
        "master copies and optimizer": largest * made.held,
        "gradients": largest * max(made.width, made.gradient),
        "temporaries": (1 if made.foreach else 2) * largest * made.width * bool(made.held),
    }


def _buffers(of: Shape, made: Choices, unreduced: float) -> dict[str, float]:
    """What gathering takes: a block in use, the next on its way, and a gradient to be reduced.

    A gradient is there as it was gathered and as a float32 copy for the reduction. Where the ends
    are not apart, both of them are gathered throughout. Replicas too are copied for their use.
    """
    if not (made.gathers or made.buffered):
        return {}
    ends = 0 if made.ends_apart else of.embedding + of.head
    gathered = made.gathered or (made.buffered or 2) * of.block + ends
    return {"gathered": gathered * made.weight, "unreduced gradient": unreduced}
