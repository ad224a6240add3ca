"""A step of the real code on fake tensors: the memory it would take, counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bilevel import Always, InputError, Memory, Problem, Single, Solver, Stream
from bilevel.lora import LoRA
from bilevel.problems.llm_reweight import weighting
from bilevel.problems.llm_reweight.placement import Placement, place
from bilevel.problems.llm_reweight.shapes import config
from bilevel.problems.llm_reweight.tokens import Batch
from bilevel.storage import fake, real

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

SOURCES = 3
"""Sources where none are given."""


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


def _model(problem: LLMReweight) -> nn.Module:
    """The model on the meta device, as it is placed for a run."""
    from transformers import AutoModelForCausalLM

    shape = config(problem.model, layers=problem.layers, width=problem.width)
    dtype = torch.float32 if problem.dtype == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()
    options = {"attention": problem.attention, "checkpointing": problem.checkpointing}
    return place(model, Placement(device="meta", dtype=dtype, **options))


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
    """On the meta device: fake parameters cannot be moved."""

    def init(self, generator: torch.Generator) -> tuple[Tensor, nn.Module]:
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
        return Always(self._rows(own.target_batch, 1)), Always(self._rows(own.batch, self._sources))

    @property
    def _sources(self) -> int:
        return len(self.problem.sources) or SOURCES

    def _rows(self, count: int, sources: int) -> Batch:
        with real():
            ids = torch.zeros(count, self.problem.max_length, dtype=torch.long)
            return Batch(
                ids=ids,
                trained=torch.ones_like(ids, dtype=torch.bool),
                source=torch.arange(count) % sources,
                share=torch.full((count,), sources / count, dtype=torch.float64),
                labels=("",) * count,
            )
