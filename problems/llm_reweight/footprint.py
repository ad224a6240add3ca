"""What training a language model in two copies needs: bytes, operations and traffic of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

import torch

from bilevel import InputError, Launcher, Memory
from bilevel.cards import Card
from bilevel.footprint import Footprint, Work
from bilevel.lora import LoRA
from bilevel.problems.llm_reweight import checks
from bilevel.problems.llm_reweight.choices import Choices, choices
from bilevel.problems.llm_reweight.host import disk_bytes, host_bytes, swapped
from bilevel.problems.llm_reweight.moments import moments
from bilevel.problems.llm_reweight.operations import (
    pass_flops,
    saved_tokens,
    step_tokens,
    traffic,
    trunk_flops,
)
from bilevel.problems.llm_reweight.passes import Passes, passes_of
from bilevel.problems.llm_reweight.shapes import Shape, shape
from bilevel.problems.llm_reweight.survey import Survey, survey, table

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight


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
    for attempt in (partial(_shape, problem), partial(passes_of, problem, devices)):
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
    passes = passes_of(problem, devices)
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
        host=host_bytes(of, made, devices),
        disk=disk_bytes(of, made),
        flops=step_tokens(work, passes) * pass_flops(of, made, passes)
        - saved_tokens(work, passes) * trunk_flops(of, made, passes),
        tokens=round(sum(passes.padded)),
        traffic=traffic(of, made, passes, work),
        swapped=work.lower * swapped(of, made) * (made.resident < made.learners),
        assumptions=_assumptions(of, made, passes, found),
        remedies=_remedies(problem, passes),
        tables={"sources": table(found, problem, steps)} if found else {},
    )


def _shape(problem: LLMReweight) -> Shape:
    return shape(problem.model, layers=problem.layers, width=problem.width)


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
