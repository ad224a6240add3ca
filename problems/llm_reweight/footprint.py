"""What training a language model in two copies needs: bytes, operations and traffic of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from math import ceil, log2
from typing import TYPE_CHECKING

import torch

from bilevel import InputError, Launcher, Memory
from bilevel.cards import Card
from bilevel.footprint import Footprint, Work
from bilevel.lora import LoRA
from bilevel.problems.llm_reweight import checks, heap
from bilevel.problems.llm_reweight.choices import LIBRARIES, Choices, choices
from bilevel.problems.llm_reweight.launching import WIDE
from bilevel.problems.llm_reweight.losses import LOGITS
from bilevel.problems.llm_reweight.shapes import Shape, shape
from bilevel.problems.llm_reweight.survey import Survey, padded, survey, table

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

KEPT = 3
"""Checkpoints on disk at a time: the last two and the one being written."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The forward and backward passes of one upper step on one device."""

    rows: int
    """Rows of the largest pass."""
    length: int
    """Tokens of a row that are predicted from."""
    lower: int
    """Passes of one sweep over the lower batch."""
    upper: int
    """Passes of one sweep over the upper batch."""
    padded: tuple[float, float] = (0.0, 0.0)
    """Tokens of one sweep over the lower and over the upper batch, over all devices."""

    @property
    def tokens(self) -> int:
        """Tokens of the largest pass."""
        return self.rows * self.length


def on(problem: LLMReweight, card: Card) -> LLMReweight:
    """The problem with what "auto" stands for on a card."""
    where = card.kind if problem.device == "auto" else problem.device
    half = where == "cuda" and card.half
    chosen = problem.dtype if problem.dtype != "auto" else "bfloat16" if half else "float32"
    return dataclasses.replace(problem, device=where, dtype=chosen)


def number(problem: LLMReweight, memory: Memory) -> torch.dtype:
    """Of what trains: the model's own on a card, all of which compute in bfloat16, or adapters'."""
    wide = problem.dtype == "float32" or isinstance(memory, LoRA)
    return torch.float32 if wide else torch.bfloat16


def shared(
    problem: LLMReweight, devices: int, given: Set[str]
) -> tuple[LLMReweight, tuple[str, ...]]:
    """The problem with batches rounded up to what devices share evenly, where these are defaults.

    Returns:
        It, and a sentence for each batch that was changed.
    """
    rounded = {
        name: devices * ceil(getattr(problem, name) / devices)
        for name in ("batch", "target_batch")
        if name not in given and getattr(problem, name) % devices
    }
    notes = tuple(
        f"problem.{name}={rows} rather than {getattr(problem, name)}, for {devices} devices."
        for name, rows in rounded.items()
    )
    return dataclasses.replace(problem, **rounded), notes


def footprint(
    problem: LLMReweight,
    work: Work,
    memory: Memory,
    launcher: Launcher,
    devices: int,
    steps: int,
) -> Footprint:
    """What the last of so many upper steps needs, by arithmetic; no weight and no data is read.

    Raises:
        InputError: With every option that cannot be planned.
    """
    faults = checks.out_of_range(problem)
    if faults:
        raise InputError(faults)
    of, made = None, None
    for attempt in (partial(_shape, problem), partial(_rows, problem, devices)):
        try:
            found = attempt()
            of = found if isinstance(found, Shape) else of
        except InputError as error:
            faults += error.faults
    try:
        made = choices(problem, work, memory, launcher, devices, of, steps)
    except InputError as error:
        faults += error.faults
    if of and problem.max_length > of.positions:
        faults.append(
            f"problem.model={of.name} takes at most {of.positions} tokens; lower "
            f"problem.max_length={problem.max_length} to that."
        )
    if faults or of is None or made is None:
        raise InputError(faults)
    passes = _rows(problem, devices)
    found = survey(problem)
    return Footprint(
        parameters={
            "blocks": of.blocks * of.block,
            "embedding": of.embedding,
            "head": of.head,
            "norms": of.norms,
        },
        trained=made.trained(of),
        moments=moments(of, made, passes),
        host=_host(of, made, devices),
        disk=_disk(of, made),
        flops=_step_tokens(work, passes) * pass_flops(of, made, passes)
        - _saved_tokens(work, passes) * trunk_flops(of, made, passes),
        tokens=round(sum(passes.padded)),
        traffic=_traffic(of, made, passes, work),
        swapped=work.lower * _swapped(of, made) * (made.resident < made.learners),
        assumptions=_assumptions(of, made, passes, found),
        remedies=_remedies(problem, passes),
        tables={"sources": table(found, problem, steps)} if found else {},
    )


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
        | _buffers(of, made, _head_trains(of, made) * of.embedding * WIDE),
        "at the lowest block": late | {"activations": rest / reached + block} | buffers,
        "at the highest block": early | {"activations": rest + block} | buffers,
        "in the optimizer's step": _step(of, made, one=one, unit=unit),
    }
    return {name: fixed | parts | heap.kept(of, made, parts) for name, parts in found.items()}


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
    chunk = _chunk(of, made)
    logits = WIDE * of.vocabulary * min(tokens, chunk)
    own = _head_trains(of, made) * of.embedding * made.weight
    several = tokens > chunk
    return max(3 * logits + own * several, 1.5 * logits + own * (3 if several else 1))


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
    weights += head * _head_trains(of, made)
    last = 2 * of.blocks * of.linears[-1][0] * of.linears[-1][1]
    again = (
        made.checkpointing * depth * (matrices + seen - last)
        + (passes.tokens > _chunk(of, made)) * head
    )
    low_rank = (6 + 2 * made.checkpointing) * made.trained(of) * bool(made.rank)
    return forward + inputs + weights + again + low_rank


def trunk_flops(of: Shape, made: Choices, passes: Passes) -> float:
    """Operations of one pass through the trunk for each token, where that is passed once."""
    seen = 4 * of.heads * of.head_size * passes.length
    return made.once * made.trunk * (2 * of.matrices + seen)


def _shape(problem: LLMReweight) -> Shape:
    return shape(problem.model, layers=problem.layers, width=problem.width)


def _rows(problem: LLMReweight, devices: int) -> Passes:
    """How the batches of a step are passed on one device.

    Raises:
        InputError: If they cannot be shared out.
    """
    counts = {"batch": problem.batch, "target_batch": problem.target_batch}
    faults = [
        f"problem.{name} must be a multiple of devices={devices}, got {rows}."
        for name, rows in counts.items()
        if rows % devices
    ]
    if faults:
        raise InputError(faults)
    lower, upper = (rows // devices for rows in counts.values())
    most = problem.micro_batch or max(lower, upper)
    found = survey(problem)
    length = (min(found.longest, problem.max_length) if found else problem.max_length) - 1
    full = (problem.batch * length, problem.target_batch * length)
    return Passes(
        rows=min(most, max(lower, upper)),
        length=length,
        lower=ceil(lower / most),
        upper=ceil(upper / most),
        padded=padded(found, problem, devices) if found else full,
    )


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


def _head_trains(of: Shape, made: Choices) -> bool:
    return not made.rank and ("embedding" if of.tied else "head") in made.ends


def _chunk(of: Shape, made: Choices) -> int:
    return made.chunk or max(1, LOGITS // of.vocabulary)


def _step_tokens(work: Work, passes: Passes) -> float:
    """Tokens that pass through a copy in one upper step, over all devices."""
    return work.lower * passes.padded[0] + work.upper * passes.padded[1]


def _saved_tokens(work: Work, passes: Passes) -> float:
    """Tokens of one upper step that a copy passes after another; each batch is new to one copy."""
    lower, upper = (max(0, sweeps - work.batches) for sweeps in (work.lower, work.upper))
    return lower * passes.padded[0] + upper * passes.padded[1]


def _host(of: Shape, made: Choices, devices: int) -> dict[str, float]:
    if made.around[0] != "context and slack":
        return {}  # it is the device
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


def _swapped(of: Shape, made: Choices) -> float:
    """Bytes of one copy that come from host memory for a sweep and its step, and leave again.

    What is its alone, its states, and its gradient if that waits for another copy's; where the
    parameters step one by one, what trains comes and leaves again for that.
    """
    moved = made.held + made.gradient * (made.gradients > 1)
    if made.held_on_host:
        moved = made.held + made.gradient + made.weight
    return made.forked(of) * made.weight + made.trained(of) * moved


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


def _disk(of: Shape, made: Choices) -> dict[str, float]:
    return {f"checkpoints, {KEPT} at a time": KEPT * _checkpoint(of, made)}


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


def _traffic(of: Shape, made: Choices, passes: Passes, work: Work) -> dict[str, float]:
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


def _assumptions(of: Shape, made: Choices, passes: Passes, found: Survey | None) -> tuple[str, ...]:
    rows = f"{passes.length + 1} tokens, {passes.rows} rows in a pass."
    lengths = f"Memory for the longest row found: {rows}" if found else f"Every row is full: {rows}"
    around = (
        f"{made.around[1] / 1e9:.1f} GB for CUDA, NCCL and what the allocator cannot use: assumed."
    )
    if made.around[0] != "context and slack":
        around = f"{made.around[1] / 1e9:.2f} GB for interpreter and libraries, as the plan has."
        around += f" Of what a step frees malloc keeps {made.keeps:.0%}: measured."
    return (
        f"Sizes of {of.name}: {of.source}.",
        lengths,
        around,
        "Attention by a kernel that keeps no scores; no kernel fuses norm, gate or loss.",
        *(found.notes if found else ()),
    )


def _remedies(problem: LLMReweight, passes: Passes) -> tuple[tuple[str, ...], ...]:
    """Options in the order of what they cost: nothing, time, then a change of what trains."""
    found: list[tuple[str, ...]] = [("memory.stepping=parts",)]
    rows = passes.rows
    while rows > 1:
        rows //= 2
        found.append((f"problem.micro_batch={rows}",))
    found += [("problem.checkpointing=true",), ("problem.dtype=bfloat16",)]
    found += [("memory=lisa", f"memory.gamma={gamma}") for gamma in (2, 1)]
    found.append(("memory=lisa", "memory.gamma=1", "memory.pool=8"))
    found += [(*found[-1], f"memory.offload={way}") for way in ("idle", "states")]
    return (*found, ("memory=lora",), ("memory=lora", "memory.quantization=nf4"))
