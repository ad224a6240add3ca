"""The launcher on DeepSpeed: ZeRO-2 and ZeRO-3, for y and each of its copies by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bilevel import processes, zero_config
from bilevel.errors import InputError, NonFiniteError
from bilevel.fsdp import home
from bilevel.memory import Full, Memory
from bilevel.outline import blueprint
from bilevel.problem import Problem
from bilevel.together import Together, engine_faults, four_bit_faults, option_faults, process_faults
from bilevel.tree import Part, Value, digest, leaves
from bilevel.variable import OptimizerFactory, Variable
from bilevel.zero_engine import Engine, Flat
from bilevel.zero_package import join, leave, package_faults
from bilevel.zero_shards import Sharder, Shards, copied, cut_up

ENTRYWISE = (
    *("sgd", "adam", "adamw", "adamax", "nadam", "radam"),
    *("rmsprop", "rprop", "adadelta", "asgd"),
)
"""Optimizers whose steps on a flat piece of a parameter are those on the parameter. Of adagrad
DeepSpeed makes another one of its own."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeed(Together):
    """DeepSpeed's ZeRO: gradients and optimizer state sharded (2), and the parameters too (3).

    Started by torchrun, `accelerate launch` or `deepspeed`; one process without a starter. y and
    every copy have an engine with the same config. One engine for all, with a pass for each copy,
    would lose gradients: ZeRO-3 counts the passes of a step for all parameters together, so that
    the first pass of a copy would add to its gradient of the step before, and an offloaded
    gradient arrives only where the last pass of all has reached it. Two engines also let DeepSpeed
    clip every copy by itself.

    Of adapters ZeRO-2 gets the adapters alone. Under ZeRO-3, adapters, and blocks that are drawn to
    train, are stepped by torch on the shards that DeepSpeed makes, one for each parameter: its own
    optimizers fix at the start what trains, and shard a base for each copy.
    """

    config: str = ""
    """A DeepSpeed JSON file; "auto" is filled in, and what contradicts other options is refused."""
    stage: int = 0
    """2 or 3; 0 takes that of the config, or 3."""
    offload: bool = False
    """Whether optimizer state lives in the memory of the host; the config may say so too."""
    processes: int = 0
    """How many processes there must be; 0 takes as many as were started."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        faults = option_faults(self.processes, self.timeout)
        if self.stage not in (0, 2, 3):
            faults.append(f"launcher.stage must be 0, 2 or 3, got {self.stage}.")
        if faults:
            raise InputError(faults)

    def check(
        self,
        problem: Problem,
        memory: Memory,
        *,
        order: int,
        parallel: bool,
        direct: Sequence[str],
        constrained: bool,
        options: Mapping[str, Any],
    ) -> list[str]:
        faults = package_faults()
        faults += engine_faults(
            "deepspeed", order=order, parallel=parallel, constrained=constrained
        )
        faults += four_bit_faults("deepspeed", memory)
        if parallel and direct:
            faults.append(
                "launcher=deepspeed keeps the numbers of y and its copies in engines, out of reach "
                f"of {' and '.join(direct)}; or use launcher=fsdp2."
            )
        name = str(options.get("lower_optimizer", "sgd")).lower()
        if name not in ENTRYWISE:
            faults.append(
                "launcher=deepspeed steps on flat pieces of y, which "
                f"solver.lower_optimizer={name} cannot; choose from {', '.join(ENTRYWISE)}, or "
                "launcher=fsdp2."
            )
        try:
            config = zero_config.read(self.config)
            faults += memory_faults(memory, zero_config.stage_of(config, self.stage))
            faults += zero_config.contradictions(
                config,
                problem,
                stage=self.stage,
                offload=self.offload,
                options=options,
                count=processes.expected(),
            )
        except InputError as error:
            faults += error.faults
        return faults + process_faults(problem, self.processes)

    def rooted(self) -> DeepSpeed:
        return replace(self, config=self.config and os.path.abspath(self.config))

    def open(self) -> None:
        if faults := package_faults():
            raise InputError(faults)
        processes.connect(timeout=self.timeout)
        join()

    def close(self) -> None:
        for engine in list(self._engines):
            engine.close()
        self._engines.clear()
        leave()
        processes.disconnect()

    def variable(
        self,
        name: str,
        value: Value,
        optimizer: OptimizerFactory,
        project: Callable[[Value], Value] | None = None,
        shared: Sequence[str] = (),
        *,
        switches: bool = False,
    ) -> Variable:
        own = value.whole if isinstance(value, Part) else value
        processes.same(f"the start of {name}", digest(own))
        if name == "x":  # small, and the same on every process
            return Variable(name, value, optimizer, project)
        if not isinstance(value, nn.Module):
            raise InputError(
                "launcher=deepspeed needs a lower variable that is an nn.Module, got "
                f"{type(value).__name__}; use launcher=ddp or fsdp2."
            )
        config = self._config(value)
        empty = None if isinstance(value, Part) else blueprint(value)
        if config["zero_optimization"]["stage"] < 3 or not (switches or isinstance(value, Part)):
            if isinstance(value, Part):  # the base is nobody's, so nobody moves it
                value.whole.to(home(value.whole))
            elif config["zero_optimization"]["stage"] == 3:
                cut_up(value, config)
            variable = self._flat(Variable(name, value, optimizer, project), config)
        else:
            sharder = Sharder(config, apart=bool(shared))
            sharder.shard(own, shared)
            variable = self._sharded(name, value, optimizer, project, sharder)
        variable.blueprint = empty
        return variable

    def twin(
        self,
        original: Variable,
        name: str,
        optimizer: OptimizerFactory,
        shared: Sequence[str] = (),
    ) -> Variable:
        value, empty, engine = original.value, original.blueprint, original.holder
        if isinstance(engine, Shards):
            sharder = engine.sharder
            copy = (
                sharder.part(value, name)
                if isinstance(value, Part)
                else sharder.copied(empty, value, shared)
            )
            variable = self._sharded(name, copy, optimizer, original.project, sharder)
            variable.borrowed = set(shared)
            variable.copier = lambda path: sharder.copied(
                empty.get_submodule(path), copy.get_submodule(path)
            )
        else:
            assert isinstance(engine, Flat)
            if isinstance(value, Part):
                copy = value.twin(name)
            else:
                copy = copied(empty, value) if engine.stage == 3 else _filled(empty, value)
            variable = Variable(name, copy, optimizer, original.project)
            self._flat(variable, engine.config)
        variable.blueprint = empty
        return variable

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        if not loss.requires_grad:
            return
        if not self._called:
            raise RuntimeError("launcher=deepspeed: the loss must call the module y that it is of.")
        self._called.pop().backward(loss * self.world_size)  # DeepSpeed takes the mean

    def settle(self, variables: Sequence[Variable]) -> None:
        for variable in variables:
            if variable.holder is None:
                own = [p for p in leaves(variable.value) if p.requires_grad]
                processes.add_gradients(own)
                for p in own:
                    if p.grad is not None:
                        p.grad /= self.world_size  # losses were multiplied by it

    def step(self, variables: Sequence[Variable]) -> None:
        engines = [v.holder for v in variables if isinstance(v.holder, Engine)]
        bad = [engine.name for engine in engines if not engine.step()]
        if bad:
            raise NonFiniteError(
                f"the gradient of {' and of '.join(bad)} is not finite; neither it nor x has moved"
            )
        for variable in variables:
            if variable.holder is None:
                variable.step()

    def _config(self, value: nn.Module) -> dict[str, Any]:
        """What DeepSpeed gets.

        Raises:
            InputError: If the file says other than the numbers of the model are.
        """
        own = {p.dtype for p in value.parameters()}
        first = leaves(value.whole if isinstance(value, Part) else value)[0]
        config = zero_config.read(self.config)
        faults = zero_config.numbers(config, first.dtype)
        if len(own) > 1:
            faults.append(
                "launcher=deepspeed needs parameters of one type, got "
                f"{', '.join(sorted(map(str, own)))}."
            )
        if faults:
            raise InputError(faults)
        return zero_config.filled(
            config,
            stage=self.stage,
            offload=self.offload,
            dtype=own.pop(),
            width=getattr(getattr(value, "config", None), "hidden_size", None),
            most=sum(p.numel() for p in value.parameters()),
        )

    def _flat(self, variable: Variable, config: dict[str, Any]) -> Variable:
        variable.holder = engine = Flat(variable, config, self._called)
        self._engines.add(engine)
        return variable

    def _sharded(
        self,
        name: str,
        value: nn.Module,
        optimizer: OptimizerFactory,
        project: Callable[[Value], Value] | None,
        sharder: Sharder,
    ) -> Variable:
        def build(own: list[Tensor]) -> torch.optim.Optimizer:
            return optimizer([sharder.piece(p) for p in own])

        variable = Variable(name, value, build, project)
        variable.holder = engine = Shards(variable, sharder, self._called)
        self._engines.add(engine)
        return variable

    @cached_property
    def _engines(self) -> WeakSet[Engine]:
        """The engines that this launcher has made, while anyone holds them."""
        return WeakSet()

    @cached_property
    def _called(self) -> list[Engine]:
        """The engine whose module was called last, which the next loss is of."""
        return []


def memory_faults(memory: Memory, stage: int) -> list[str]:
    """Why DeepSpeed cannot train this at a stage, as sentences."""
    name, faults = type(memory).__name__.lower(), []
    if memory.switches and stage < 3:
        faults.append(
            f"launcher=deepspeed cannot run memory={name} at stage {stage}: ZeRO-{stage} makes "
            "flat buffers of what trains at the start, in which frozen blocks keep moving and keep "
            "their optimizer state, and thawed ones never move; use stage 3, or launcher=fsdp2."
        )
    if getattr(memory, "offload", "none") != "none":
        faults.append(
            "launcher=deepspeed keeps both copies on the device, so memory.offload has no effect; "
            "use launcher.offload for optimizer states, or launcher=single."
        )
    if getattr(memory, "stepping", "whole") != "whole":
        faults.append(
            "launcher=deepspeed steps by its engines, so memory.stepping has no effect; leave it "
            "out, or use launcher=fsdp2."
        )
    if isinstance(memory, Full) and memory.precision != "master":
        faults.append(
            f"launcher=deepspeed steps float32 masters of its own, got memory.precision="
            f"{memory.precision}; use memory.precision=master."
        )
    return faults


def _filled(empty: nn.Module, source: nn.Module) -> nn.Module:
    """A module like `empty` with the numbers of another."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(own.detach().clone())
        for p, own in zip(leaves(empty), leaves(source), strict=True)
    }
    return deepcopy(empty, memo)
