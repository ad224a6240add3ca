"""What of memory strategy, launcher and problem decides the bytes of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from bilevel import LISA, Full, InputError, Launcher, Memory, quantized
from bilevel.footprint import Work
from bilevel.lora import LoRA
from bilevel.problems.llm_reweight.launching import WIDE, launched
from bilevel.problems.llm_reweight.shapes import Shape
from bilevel.tracking import memory as memory_used

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

SLACK = 2.5e9
"""Bytes for the CUDA context, NCCL's buffers and what the allocator cannot use; assumed."""
LIBRARIES = 1.5e9
"""Bytes of host memory of a process with CUDA and its libraries, before it holds a model."""
KEEPS = 0.8
"""Of glibc's malloc: 0.5 with all blocks training to 1.3 with adapters, see docs/log.md."""
BYTES = {"auto": 2, "float32": 4, "bfloat16": 2}
"""Of a number by problem.dtype; the cards that are planned for compute in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What decides the bytes of a step; bytes are per number."""

    weight: float = 2.0
    """Of a weight of the model."""
    matrix: float = 0.0
    """Of a number of the blocks' matrices, where these are quantized; 0: as all others."""
    bases: int = 2
    """Whole models on the device: one for each copy of y, or one frozen base."""
    learners: int = 2
    """Copies of y."""
    resident: int = 2
    """Copies of y whose trained part, gradient and states are on the device at a time."""
    gradients: int = 2
    """Copies of y whose gradients exist at the same time."""
    blocks: int = 0
    """Blocks that train at a time in one copy."""
    ends: tuple[str, ...] = ("embedding", "head", "norms")
    """Parts outside the blocks that train."""
    drawn: int | None = None
    """Blocks of which every twin has its own on one shared base; None: what trains now alone."""
    shared_ends: tuple[str, ...] = ()
    """Parts outside the blocks that all copies use for good."""
    trunk: int = 0
    """Blocks below all that can be drawn, where the embedding rests too: they leave no graph."""
    once: bool = False
    """Whether these are passed once for all copies, and their output is kept."""
    rank: int = 0
    """Of adapters on every matrix of the blocks; 0 has none."""
    targets: tuple[str, ...] = ()
    """Layers that have adapters, by name or its end; all matrices of the blocks without any."""
    adapter: float = 4.0
    """Of a number of an adapter."""
    held: float = 12.0
    """Of master copy and optimizer state together."""
    held_on_host: bool = False
    """Whether these are in host memory, and a copy steps by one parameter at a time."""
    states_on_host: bool = False
    """Whether these are in host memory with the gradients, and the step is there too."""
    weights_on_host: bool = False
    """Whether the shards of weights are in host memory."""
    masters: float = 0.0
    """Of masters besides, which an engine has of float32 parameters too."""
    kept: float = 0.0
    """Of further vectors that the solver keeps, for each number of y."""
    gradient: float = 2.0
    """Of a gathered gradient."""
    at_once: bool = True
    """Whether all gradients exist together, rather than those of one block at a time."""
    checkpointing: bool = True
    """Whether blocks keep their input only and are computed again in the backward pass."""
    chunk: int = 0
    """Tokens whose logits exist at a time; 0 for all of a pass."""
    weight_shards: int = 1
    gradient_shards: int = 1
    state_shards: int = 1
    """Devices among which weights, gradients, and states are shared out."""
    gathers: bool = False
    """Whether blocks are gathered before use, which takes buffers."""
    ends_apart: bool = True
    """Whether embedding and head are gathered and freed by themselves."""
    buffered: int = 0
    """Buffers that parameters pass through by unit before their use: two as they arrive and as they
    are copied out of that, one where they are copied alone."""
    gathered: float = 0.0
    """Numbers that are gathered at a time; 0 for a block in each buffer, two where their number is
    not known, and the ends that are not apart."""
    reduced: float = 0.0
    """Numbers of a gradient on its way to its shards; 0 for those of the largest part."""
    buckets: float = 0.0
    """Bytes, of all copies together, in which engines gather gradients to be reduced."""
    stays: bool = False
    """Whether the gradients of all copies have memory between steps too."""
    stepped: float = 0.0
    """Numbers on a device that step at a time; 0 for all."""
    apart: bool = False
    """Whether the step converts gradients into other memory, in which they are wide."""
    saved_whole: bool = False
    """Whether a checkpoint is gathered in the main process."""
    by_parts: bool = False
    """Whether processes read their parts of the model, so that none has it whole on the host."""
    deferred: bool = False
    """Whether gradients of several passes are summed whole, in float32, before they are shared."""
    foreach: bool = True
    """Whether the optimizer step computes on all tensors at once, with temporaries of that size."""
    width: float = 4.0
    """Of a number that the optimizer computes with."""
    around: tuple[str, float] = ("context and slack", SLACK)
    """What there is besides the model, in words and bytes."""
    keeps: float = 0.0
    """Share of what a step takes and frees again that the allocator does not give back."""

    def trained(self, of: Shape) -> int:
        """Numbers of one copy that train at a time."""
        if self.rank:
            return of.adapters(self.rank, self.targets)
        return self.blocks * of.block + sum(getattr(of, part) for part in self.ends)

    def model(self, of: Shape) -> float:
        """Bytes of the weights of one model."""
        if not self.matrix:
            return of.total * self.weight
        four = of.blocks * sum(a * b for a, b in of.linears if a % quantized.BLOCK == 0)
        return (of.total - four) * self.weight + four * self.matrix

    def forked(self, of: Shape) -> int:
        """Numbers of which every twin has its own on one shared base."""
        if self.drawn is None:
            return self.trained(of)
        rest = sum(getattr(of, part) for part in self.shared_ends)
        return of.total - rest - (of.blocks - self.drawn) * of.block

    def unit(self, of: Shape) -> int:
        """Numbers of the largest part whose gradients exist at once in any case."""
        if self.rank:
            return self.trained(of) // of.blocks
        return max(of.block if self.blocks else 0, *(getattr(of, part) for part in self.ends), 0)

    def largest(self, of: Shape) -> int:
        """Numbers of the largest parameter that trains."""
        if self.rank:
            return self.rank * max(max(size) for size in of.adapted(self.targets))
        ends = [of.embedding] if {"embedding", "head"}.intersection(self.ends) else []
        return max([*ends, *(a * b for a, b in of.linears if self.blocks)], default=0)


def choices(
    problem: LLMReweight,
    work: Work,
    memory: Memory,
    launcher: Launcher,
    devices: int,
    of: Shape | None = None,
    steps: int = 1,
) -> Choices:
    """The choices that options make, after so many upper steps.

    Raises:
        InputError: For every strategy or launcher whose needs are not known here.
    """
    faults = []
    if problem.attention == "eager":
        faults.append(
            "problem.attention=eager keeps all scores, which is not planned; leave it out."
        )
    weight = BYTES[problem.dtype]
    base: dict[str, Any] = {
        "weight": weight,
        "bases": work.copies,
        "learners": work.copies,
        "resident": work.copies,
        "gradients": work.gradients,
        "held": work.held,
        "kept": work.kept,
        "width": work.width,
        "gradient": weight,
        "checkpointing": problem.checkpointing,
        "chunk": problem.loss_chunk,
    }
    if problem.device == "cpu":
        base |= {"foreach": False, "around": ("interpreter and libraries", _libraries())}
        base |= {"keeps": KEEPS}
    blocks = of.blocks if of else 1
    kind = type(memory)  # not isinstance: what extends a strategy may need more
    if kind is Full:
        base |= {"blocks": blocks}
    elif kind is LISA and isinstance(memory, LISA):
        faults += [
            f"memory.{name} must be at most the number of blocks, {blocks}, got {number}."
            for name, number in (("gamma", memory.gamma), ("pool", memory.pool))
            if of and number > blocks
        ]
        ends = tuple(n for n in ("embedding", "head", "norms") if getattr(memory, n))
        drawn = min(memory.pool or blocks, memory.gamma * ceil(steps / memory.period))
        base |= {"blocks": memory.gamma, "ends": ends}
        tied = of is not None and of.tied  # then no blocks are shared
        shares = memory.share and not tied
        base |= {"bases": 1, "drawn": drawn} if shares else {}
        if shares:
            base |= {"shared_ends": tuple({"embedding", "head"}.difference(ends))}
        if memory.pool_from == "top" and "embedding" not in ends:
            base |= {"trunk": blocks - memory.pool, "once": memory.trunk and work.copies > 1}
        if memory.offload != "none":
            base |= {"bases": 1, "drawn": drawn if shares else blocks, "resident": 1}
            base |= {"held_on_host": memory.offload == "states"}
    elif kind is LoRA and isinstance(memory, LoRA):
        try:
            _ = of and of.adapted(memory.targets)
        except InputError as error:
            faults += error.faults
        base |= {"blocks": 0, "ends": (), "rank": memory.rank, "bases": 1, "gradient": WIDE}
        base |= {"targets": memory.targets}
        if memory.quantization != "none":
            base |= {"matrix": quantized.BYTES}
    else:
        faults.append(f"memory={type(memory).__name__.lower()} cannot be planned yet.")
    offloads = isinstance(memory, LISA) and memory.offload != "none"
    single = type(launcher).__name__ == "Single"
    if isinstance(memory, LoRA) and memory.quantization != "none" and not single:
        faults.append("memory.quantization needs launcher=single; leave one of them out.")
    if offloads and not single:
        faults.append("memory.offload needs launcher=single; leave one of them out.")
    made = Choices(**base)
    try:
        made = launched(made, launcher, memory, devices, None if faults else of)
    except InputError as error:
        faults += error.faults
    if faults:
        raise InputError(faults)
    if of and getattr(memory, "stepping", "whole") == "parts":
        made = replace(made, stepped=made.largest(of) / made.state_shards)
    return made


def _libraries() -> float:
    """What this process holds, with what a run imports too."""
    import peft  # noqa: F401 - both for their memory
    import transformers.modeling_utils  # noqa: F401

    return float(memory_used().get("resident", LIBRARIES))
