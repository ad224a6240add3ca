"""What is trainable and what is kept: the whole lower variable, or a few drawn blocks (LISA)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.blocks import parameter_groups
from bilevel.errors import InputError
from bilevel.precision import Precision, with_precision
from bilevel.tree import Value, named_leaves
from bilevel.variable import OptimizerFactory, Variable

log = logging.getLogger("bilevel")


class Memory(ABC):
    """A strategy for the lower variable and its twins; `init` gives its state for one run."""

    def check(self, *, constrained: bool) -> list[str]:
        """Why this cannot be used, as sentences; called before anything is loaded.

        Args:
            constrained: Whether the lower variable has a feasible set of its own.
        """
        return []

    def prepare(self, value: Value, names: Sequence[str]) -> Value:
        """The start of y as this strategy trains it, for copies of these names; y comes first."""
        return value

    def optimizer(self, factory: OptimizerFactory, generator: torch.Generator) -> OptimizerFactory:
        """The optimizers of the lower variable and its twins, made from those of a solver."""
        return factory

    @abstractmethod
    def init(self, value: Value, generator: torch.Generator) -> MemoryState:
        """The state for a lower variable of this structure.

        Raises:
            InputError: If the strategy cannot be used on such a value.
        """


class MemoryState(ABC):
    """Called before every step with all copies of the lower variable."""

    @abstractmethod
    def before_step(self, step: int, variables: Sequence[Variable]) -> None:
        """Decide what this step may move; the same for every copy."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Full(Memory):
    """Everything trains, at every step."""

    precision: Precision = "master"
    """How bfloat16 and float16 parameters step: with float32 masters of what trains, by stochastic
    rounding, or plain, which loses small steps. Float32 and float64 are not concerned."""

    def optimizer(self, factory: OptimizerFactory, generator: torch.Generator) -> OptimizerFactory:
        return with_precision(factory, self.precision, generator)

    def init(self, value: Value, generator: torch.Generator) -> MemoryState:
        return _FullState()


class _FullState(MemoryState):
    def before_step(self, step: int, variables: Sequence[Variable]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class LISA(Memory):
    """A few blocks drawn uniformly every `period` steps train, with embedding, head and norms.

    All copies of the lower variable share one draw. Optimizer state exists for the active set
    only: what leaves the set loses its state.

    Reference: Pan et al., LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
    Model Fine-Tuning, 2024, Algorithm 1. Deviations: final norms train with the head; the state of
    leaving blocks is dropped; the draw comes from a saved generator, one for both twins.
    """

    gamma: int = 2
    """Blocks that train at a time."""
    period: int = 20
    """Steps between draws."""
    embedding: bool = True
    """Whether the input embedding trains."""
    head: bool = True
    """Whether the output head trains."""
    norms: bool = True
    """Whether parameters outside blocks, embedding and head (the final norm) train."""
    precision: Precision = "master"
    """How bfloat16 and float16 parameters step: with float32 masters of what trains, by stochastic
    rounding, or plain, which loses small steps. Float32 and float64 are not concerned."""

    def __post_init__(self) -> None:
        faults = [
            f"memory.{name} must be at least 1, got {getattr(self, name)}."
            for name in ("gamma", "period")
            if getattr(self, name) < 1
        ]
        if faults:
            raise InputError(faults)

    def optimizer(self, factory: OptimizerFactory, generator: torch.Generator) -> OptimizerFactory:
        return with_precision(factory, self.precision, generator)

    def init(self, value: Value, generator: torch.Generator) -> MemoryState:
        groups = parameter_groups(value)
        count = len(groups["blocks"])
        if self.gamma > count:
            raise InputError(
                f"memory.gamma must be at most the number of blocks, {count}, got {self.gamma}."
            )
        own = torch.Generator().manual_seed(
            int(torch.randint(2**62, (), generator=generator, dtype=torch.int64))
        )
        return _LISAState(self, groups, own)


class _LISAState(MemoryState):
    def __init__(self, options: LISA, groups: dict[str, list], generator: torch.Generator) -> None:
        self.options = options
        self.groups = groups
        self.generator = generator
        self.active: list[int] = []

    def before_step(self, step: int, variables: Sequence[Variable]) -> None:
        if step % self.options.period == 0 or not self.active:
            draw = torch.randperm(len(self.groups["blocks"]), generator=self.generator)
            self.active = sorted(draw[: self.options.gamma].tolist())
            self._apply(variables)
            log.info("step %d: LISA trains blocks %s; %s", step, self.active, _held(variables))
        elif any(self._is_stale(v) for v in variables):
            self._apply(variables)

    def state_dict(self) -> dict[str, Any]:
        return {"active": self.active, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active = list(state["active"])
        self.generator.set_state(state["generator"])

    def _trainable(self) -> set[str]:
        names = {n for i in self.active for n in self.groups["blocks"][i]}
        for part in ("embedding", "head", "norms"):
            if getattr(self.options, part):
                names.update(self.groups[part])
        return names

    def _is_stale(self, variable: Variable) -> bool:
        trainable = self._trainable()
        leaves = named_leaves(variable.value)
        return any(p.requires_grad != (n in trainable) for n, p in leaves.items())

    def _apply(self, variables: Sequence[Variable]) -> None:
        trainable = self._trainable()
        for variable in variables:
            for name, parameter in named_leaves(variable.value).items():
                parameter.requires_grad_(name in trainable)
                if name not in trainable:
                    parameter.grad = None
                    variable.optimizer.state.pop(parameter, None)


def _held(variables: Sequence[Variable]) -> str:
    parts = []
    for variable in variables:
        held = variable.memory()
        text = ", ".join(f"{k} {v / 1e6:.2f} MB" for k, v in held.items())
        parts.append(f"{variable.name}: {text}")
    return "; ".join(parts)


def trainable(variable: Variable) -> list[Tensor]:
    """The leaves of a variable that the memory strategy lets move now."""
    return [p for p in named_leaves(variable.value).values() if p.requires_grad]
