"""A step of the real code before a run: its memory counted on fake tensors, its time measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bilevel import Always, InputError, Memory, Problem, Single, Solver, Stream
from bilevel.lora import LoRA
from bilevel.problems.llm_reweight import weighting
from bilevel.problems.llm_reweight.placement import Placement, place
from bilevel.problems.llm_reweight.shapes import config
from bilevel.problems.llm_reweight.survey import drawn_of, survey, typical
from bilevel.problems.llm_reweight.tokens import Batch
from bilevel.storage import fake, real
from bilevel.tracking import memory as memory_used

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

SOURCES = 3
"""Sources where none are given."""
TIMED = 2
"""Steps whose mean time counts."""


def measured(problem: LLMReweight, solver: Solver, memory: Memory) -> tuple[float, float]:
    """Bytes alive after a step and at the peak of the next, in one process; nothing is allocated.

    The problem's losses, the solver, the strategy and the optimizers are those of a run; weights,
    batches and what is computed of them have shapes only. Temporaries of kernels are not seen.

    Raises:
        InputError: If the strategy does not work on fake tensors.
    """
    if isinstance(memory, LoRA):
        raise InputError(
            "memory=lora cannot be counted on fake tensors, which peft cannot move; leave out "
            "--measure."
        )
    generator = torch.Generator().manual_seed(0)
    stage = _Stage(problem=weighting.without(problem), model=_model(problem))
    with fake() as storage:
        state = solver.init(stage, memory, Single(), generator)
        state = solver.step(stage, Single(), state)
        between = storage.live
        storage.reset()
        solver.step(stage, Single(), state)
        return float(between), float(storage.peak)


def timed(problem: LLMReweight, solver: Solver, memory: Memory) -> tuple[float, float]:
    """Seconds of an upper step in this process, the mean of two after a first, and its peak memory.

    Everything is real but the numbers: weights are random, and rows have the lengths that the
    sources have, or are full. On the CPU the peak is the largest that the process ever held.
    """
    device = "cuda" if problem.device == "cuda" else "cpu"
    stage = _Stage(problem=problem, model=_model(problem, device))
    state = solver.init(stage, memory, Single(), torch.Generator().manual_seed(0))
    state = solver.step(stage, Single(), state)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(TIMED):
        state = solver.step(stage, Single(), state)
    _synchronize(device)
    used = memory_used()
    seconds = (time.perf_counter() - start) / TIMED
    return seconds, float(used.get("device_peak", used.get("peak", 0)))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _model(problem: LLMReweight, device: str = "meta") -> nn.Module:
    """The model with random weights, as it is placed for a run."""
    from transformers import AutoModelForCausalLM

    shape = config(problem.model, layers=problem.layers, width=problem.width)
    dtype = torch.float32 if problem.dtype == "float32" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()
    options = {"attention": problem.attention, "checkpointing": problem.checkpointing}
    return place(model, Placement(device=device, dtype=dtype, **options))


def _fill(model: nn.Module) -> None:
    """Put new tensors in the place of those on the meta device; what is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in made:
                made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
            setattr(module, name, made[id(p)])
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype))


@dataclass(frozen=True, kw_only=True)
class _Stage(Problem):
    """The problem with a model of its shape and full rows in the place of its data."""

    problem: Any = None
    model: Any = None
    """On the meta device to be filled: fake parameters cannot be moved."""

    def init(self, generator: torch.Generator) -> tuple[Tensor, nn.Module]:
        if self.model.device.type == "meta":
            _fill(self.model)
        return torch.zeros(self._sources, dtype=torch.float64), self.model

    def upper(self, x: Tensor, y: nn.Module, batch: Batch) -> Tensor:
        return self.problem.upper(x, y, batch)

    def lower(self, x: Tensor, y: nn.Module, batch: Batch) -> Tensor:
        return self.problem.lower(x, y, batch)

    def split(self, batch: Batch) -> Any:
        return self.problem.split(batch)

    def batches(self, generator: torch.Generator) -> tuple[Stream, Stream]:
        own = self.problem
        each = own.batch // self._sources
        found = survey(own)
        if found is None:
            lower, upper = (
                [own.max_length] * each * self._sources,
                [own.max_length] * own.target_batch,
            )
        else:
            lower = [n for c in found.sources for n in typical(c.lengths, each)]
            drawn = drawn_of(found, own)
            upper = [n for c in found.targets for n in typical(c.lengths, drawn[c.name])]
        return Always(self._rows(upper, 1)), Always(self._rows(lower, self._sources))

    @property
    def _sources(self) -> int:
        return len(self.problem.sources) or SOURCES

    def _rows(self, lengths: Sequence[int], sources: int) -> Batch:
        count = len(lengths)
        with real():
            generator = torch.Generator().manual_seed(count)  # no two parts of a batch are alike
            ids = torch.randint(64, (count, max(lengths)), generator=generator)
            trained = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
            trained[:, 0] = False
            return Batch(
                ids=ids,
                trained=trained,
                source=torch.arange(count) // (count // sources),
                share=torch.full((count,), sources / count, dtype=torch.float64),
                labels=("",) * count,
            )
