"""What is trainable and what is kept: the whole lower variable, or a few drawn blocks (LISA)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bilevel.blocks import block_paths, end_paths, falls_apart, parameter_groups
from bilevel.errors import InputError
from bilevel.fields import out_of_range
from bilevel.offload import Offload, Turns
from bilevel.precision import Precision, with_precision
from bilevel.stepping import Stepping, apart_faults, with_step
from bilevel.tree import Value, named_leaves
from bilevel.trunk import Trunk
from bilevel.variable import OptimizerFactory, Variable

log = logging.getLogger("bilevel")


class Memory(ABC):
    """A strategy for the lower variable and its twins; `init` gives its state for one run."""

    switches: ClassVar[bool] = False
    """Whether what trains changes during a run."""

    def check(
        self, *, constrained: bool, direct: Sequence[str], options: Mapping[str, Any]
    ) -> list[str]:
        """Why this cannot be used, as sentences; called before anything is loaded.

        Args:
            constrained: Whether the lower variable has a feasible set of its own.
            direct: What of the solver reads or writes the numbers of y itself (`Solver.direct`).
            options: The solver's options, by name.
        """
        return []

    def loading(self) -> AbstractContextManager[None]:
        """Within it the problem makes the start of y."""
        return nullcontext()

    def prepare(self, value: Value, names: Sequence[str]) -> Value:
        """The start of y as this strategy trains it, for copies of these names; y comes first."""
        return value

    def optimizer(self, factory: OptimizerFactory, generator: torch.Generator) -> OptimizerFactory:
        """The optimizers of the lower variable and its twins, made from those of a solver."""
        return factory

    def shared(self, value: Value) -> Sequence[str]:
        """The submodules of y that its twins use too, until `Variable.fork` copies them."""
        return ()

    @abstractmethod
    def init(self, value: Value, generator: torch.Generator) -> MemoryState:
        """The state for a lower variable of this structure.

        Raises:
            InputError: If the strategy cannot be used on such a value.
        """


class MemoryState(ABC):
    """Called before every step with all copies of the lower variable, the original first."""

    @abstractmethod
    def before_step(self, step: int, variables: Sequence[Variable]) -> None:
        """Decide what this step may move; the same for every copy."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], variables: Sequence[Variable]) -> None:
        """Go on from a state; called before the variables take their own."""


@dataclass(frozen=True, kw_only=True)
class Full(Memory):
    """Everything trains, at every step."""

    precision: Precision = "master"
    """How bfloat16 and float16 parameters step: with float32 masters of what trains, by stochastic
    rounding, or plain, which loses small steps. Float32 and float64 are not concerned."""
    stepping: Stepping = "whole"
    """How a copy steps: all its parameters in one call of the optimizer, or, with parts, one after
    the other, each gradient freed once it was used: the same numbers. That saves, of all but one
    parameter, the float32 gradients of half precision, and on a GPU temporaries."""

    def check(
        self, *, constrained: bool, direct: Sequence[str], options: Mapping[str, Any]
    ) -> list[str]:
        return _step_faults(self.stepping, options)

    def optimizer(self, factory: OptimizerFactory, generator: torch.Generator) -> OptimizerFactory:
        return with_step(with_precision(factory, self.precision, generator), self.stepping)

    def init(self, value: Value, generator: torch.Generator) -> MemoryState:
        return _FullState()


class _FullState(MemoryState):
    def before_step(self, step: int, variables: Sequence[Variable]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], variables: Sequence[Variable]) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class LISA(Memory):
    """A few blocks drawn uniformly every `period` steps train, with embedding, head and norms.

    All copies of the lower variable share one draw. Optimizer state exists for the active set
    only: what leaves the set loses its state. With `share` the copies use the same blocks until
    these are first drawn, when each takes a copy of its own: the same numbers in less memory. What
    lies below every block that can be drawn is the trunk, if the embedding is frozen too; with
    `trunk` one copy passes it for all: the same numbers, bit for bit on a CPU, in less time.

    Reference: Pan et al., LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
    Model Fine-Tuning, 2024, Algorithm 1. Deviations: final norms train with the head; the state of
    leaving blocks is dropped; the draw comes from a saved generator, one for both twins.
    """

    switches: ClassVar[bool] = True

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
    pool: int = 0
    """Blocks that are ever drawn, chosen at the start; 0 takes all. Bounds memory with `share`, but
    is not the published sampling."""
    pool_from: Literal["all", "top"] = "all"
    """Where those of the pool are chosen: at random among all blocks, or the last ones, next to the
    head. Those below train never; with embedding=false they are the trunk."""
    share: bool = True
    """Whether all copies use one set of the blocks that have never been drawn, and of the ends that
    never train; not where parameters are tied between parts of the model, such as embedding and
    head."""
    trunk: bool = True
    """Whether the trunk is passed once for all copies on the same rows; takes memory for its
    output on a lower batch."""
    precision: Precision = "master"
    """How bfloat16 and float16 parameters step: with float32 masters of what trains, by stochastic
    rounding, or plain, which loses small steps. Float32 and float64 are not concerned."""
    stepping: Stepping = "whole"
    """How a copy steps: all its parameters in one call of the optimizer, or, with parts, one after
    the other, each gradient freed once it was used: the same numbers. That saves, of all but one
    parameter, the float32 gradients of half precision, and on a GPU temporaries. With
    offload=states parameters step so in any case."""
    offload: Offload = "none"
    """What lies in host memory: nothing; with idle, what belongs to one copy alone while another is
    at work; with states also all masters and moments, fetched for one parameter after the other."""

    def __post_init__(self) -> None:
        faults = out_of_range("memory", self, gamma="at least 1", period="at least 1")
        if faults:
            raise InputError(faults)
        if self.pool and self.pool < self.gamma:
            faults.append(
                f"memory.pool must be 0 or at least memory.gamma={self.gamma}, got {self.pool}."
            )
        if self.pool_from == "top" and not self.pool:
            faults.append(
                "memory.pool_from=top needs the number of those blocks, such as memory.pool=8."
            )
        if faults:
            raise InputError(faults)

    def check(
        self, *, constrained: bool, direct: Sequence[str], options: Mapping[str, Any]
    ) -> list[str]:
        if self.offload == "none":
            return _step_faults(self.stepping, options)
        faults = []
        if direct:
            faults.append(
                f"memory.offload={self.offload} keeps one copy of y on the device at a time; use "
                f"solver=scalebio, or solver=penalty without what reads several, here "
                f"{' and '.join(direct)}; or use memory.offload=none."
            )
        if self.offload == "states":
            return faults + apart_faults("memory.offload=states", "memory.offload=idle", options)
        return faults + _step_faults(self.stepping, options)

    def optimizer(self, factory: OptimizerFactory, generator: torch.Generator) -> OptimizerFactory:
        made = with_precision(factory, self.precision, generator)
        return made if self.offload == "states" else with_step(made, self.stepping)

    def shared(self, value: Value) -> Sequence[str]:
        if not (self.share and isinstance(value, nn.Module) and falls_apart(value)):
            return ()
        ends = end_paths(value)
        frozen = [ends[part] for part in ends if not getattr(self, part)]
        return [*block_paths(value), *frozen]

    def init(self, value: Value, generator: torch.Generator) -> MemoryState:
        groups = parameter_groups(value)
        count = len(groups["blocks"])
        faults = [
            f"memory.{name} must be at most the number of blocks, {count}, got {number}."
            for name, number in (("gamma", self.gamma), ("pool", self.pool))
            if number > count
        ]
        if faults:
            raise InputError(faults)
        own = torch.Generator().manual_seed(
            int(torch.randint(2**62, (), generator=generator, dtype=torch.int64))
        )
        pool = list(range(count))
        if self.pool and self.pool_from == "top":
            pool = pool[-self.pool :]
        elif self.pool:
            pool = sorted(torch.randperm(count, generator=own)[: self.pool].tolist())
        turns = None if self.offload == "none" else Turns(states=self.offload == "states")
        return _LISAState(self, groups, block_paths(value), pool, own, turns)


class _LISAState(MemoryState):
    def __init__(
        self,
        options: LISA,
        groups: dict[str, list],
        paths: list[str],
        pool: list[int],
        generator: torch.Generator,
        turns: Turns | None,
    ) -> None:
        self.options, self.groups, self.paths, self.pool = options, groups, paths, pool
        self.generator, self.turns = generator, turns
        self.trunk = self._trunk()
        self.active: list[int] = []
        self.drawn: list[int] = []
        """Every block drawn so far: of these each copy has its own."""

    def before_step(self, step: int, variables: Sequence[Variable]) -> None:
        if self.trunk:
            self.trunk.adopt(variables)
        if step % self.options.period == 0 or not self.active:
            draw = torch.randperm(len(self.pool), generator=self.generator)
            self.active = sorted(self.pool[i] for i in draw[: self.options.gamma].tolist())
            self._fork([i for i in self.active if i not in self.drawn], variables)
            self._apply(variables)
            log.info("step %d: LISA trains blocks %s; %s", step, self.active, _held(variables))
        elif any(self._is_stale(v) for v in variables):
            self._apply(variables)

    def state_dict(self) -> dict[str, Any]:
        state = {"active": self.active, "drawn": self.drawn, "pool": self.pool}
        return state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], variables: Sequence[Variable]) -> None:
        self.active, self.pool = list(state["active"]), list(state["pool"])
        self.trunk = self._trunk()
        self.generator.set_state(state["generator"])
        self._fork(list(state["drawn"]), variables)

    def _trunk(self) -> Trunk | None:
        """What no draw can reach, where copies go through it together."""
        still = self.options.trunk and not self.options.embedding
        return Trunk(self.pool[0]) if still and self.pool[0] else None

    def _fork(self, blocks: list[int], variables: Sequence[Variable]) -> None:
        """Give every copy but the first, which owns all, blocks of its own."""
        self.drawn = sorted({*self.drawn, *blocks})
        if self.options.share:
            for twin in variables[1:]:
                twin.fork([self.paths[i] for i in blocks])
        if self.turns:
            self.turns.adopt(variables)

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
                    variable.forget(parameter)


def _step_faults(stepping: Stepping, options: Mapping[str, Any]) -> list[str]:
    if stepping == "whole":
        return []
    return apart_faults("memory.stepping=parts", "memory.stepping=whole", options)


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
