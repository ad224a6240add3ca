"""The launcher on DeepSpeed: ZeRO-2 and ZeRO-3, an engine for y and one for each of its copies."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilevel import processes, zero_config
from bilevel.errors import InputError, NonFiniteError
from bilevel.fsdp import blueprint, engine_faults, option_faults, process_faults
from bilevel.launch import Launcher
from bilevel.memory import Full, Memory
from bilevel.problem import Problem
from bilevel.tree import Part, Value, digest, leaves, named_leaves
from bilevel.variable import Holder, OptimizerFactory, Variable

OLDEST = (0, 19, 8)  # the first with managed_gradient_accumulation

ENTRYWISE = (
    *("sgd", "adam", "adamw", "adamax", "nadam", "radam"),
    *("rmsprop", "rprop", "adadelta", "asgd"),
)
"""Optimizers whose steps on a flat piece of a parameter are those on the parameter. Of adagrad
DeepSpeed makes another one of its own."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeed(Launcher):
    """DeepSpeed's ZeRO: gradients and optimizer state sharded (2), and the parameters too (3).

    Started by torchrun, `accelerate launch` or `deepspeed`; one process without a starter. y and
    every copy have an engine with the same config. One engine for all, with a pass for each copy,
    would lose gradients: ZeRO-3 counts the passes of a step for all parameters together, so that
    the first pass of a copy would add to its gradient of the step before, and an offloaded
    gradient arrives only where the last pass of all has reached it. Two engines also let DeepSpeed
    clip every copy by itself.
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
        faults = _check_package() + _check_memory(memory)
        faults += engine_faults(
            "deepspeed", order=order, parallel=parallel, constrained=constrained
        )
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
            faults += zero_config.contradictions(
                zero_config.read(self.config),
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
        if faults := _check_package():
            raise InputError(faults)
        processes.connect(timeout=self.timeout)
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed wants without a starter too
        deepspeed = _package()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of optimizers of torch
        builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None:  # on CPUs: compiled for a minute, to add up small tensors faster
            deepspeed.ops.__compatible_ops__[builder.NAME] = False
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        counts = {
            "WORLD_SIZE": processes.expected(),
            "torch.distributed": processes.count(),
            "deepspeed.comm": deepspeed.comm.get_world_size(),
        }
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count} ({name})" for name, count in counts.items())
            raise processes.ProcessError(
                f"the number of processes is not clear: {said}; start all with torchrun, and leave "
                "WORLD_SIZE alone."
            )

    def close(self) -> None:
        for engine in list(self._engines):
            engine.close()
        self._engines.clear()
        if dist.is_initialized() and _package().comm.is_initialized():
            _package().comm.destroy_process_group()  # which forgets groups that it keeps, too
        processes.disconnect()

    def variable(
        self,
        name: str,
        value: Value,
        optimizer: OptimizerFactory,
        project: Callable[[Value], Value] | None = None,
        shared: Sequence[str] = (),  # what LISA shares, which is refused here
    ) -> Variable:
        processes.same(f"the start of {name}", digest(value))
        if name == "x":  # small, and the same on every process
            return Variable(name, value, optimizer, project)
        if not isinstance(value, nn.Module) or isinstance(value, Part):
            raise InputError(
                "launcher=deepspeed needs a lower variable that is an nn.Module of its own, got "
                f"{type(value).__name__}; use launcher=ddp or fsdp2."
            )
        return self._held(name, value, optimizer, project)

    def twin(
        self,
        original: Variable,
        name: str,
        optimizer: OptimizerFactory,
        shared: Sequence[str] = (),
    ) -> Variable:
        whole = whole_parameters(original.value).values()
        empty = original.blueprint
        memo: dict[int, Any] = {
            id(p): nn.Parameter(held) for p, held in zip(leaves(empty), whole, strict=True)
        }
        return self._held(name, deepcopy(empty, memo), optimizer, original.project)

    def parts(self, problem: Problem, batch: Any) -> Sequence[Any]:
        own = batch
        if self.world_size > 1:
            own = problem.share(batch, processes.rank(), self.world_size)
        return problem.split(own)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        if not loss.requires_grad:
            return
        if not self._called:
            raise RuntimeError("launcher=deepspeed: the loss must call the module y that it is of.")
        self._called.pop().backward(loss * self.world_size)  # DeepSpeed takes the mean

    def total(self, numbers: Sequence[float]) -> list[float]:
        return processes.total(numbers)

    def told(self, text: str) -> str:
        return processes.broadcast(text)

    def settle(self, variables: Sequence[Variable]) -> None:
        for variable in variables:
            if variable.holder is None:
                own = [p for p in leaves(variable.value) if p.requires_grad]
                processes.add_gradients(own)
                for p in own:
                    if p.grad is not None:
                        p.grad /= self.world_size  # losses were multiplied by it

    def step(self, variables: Sequence[Variable]) -> None:
        held = [v.holder for v in variables if isinstance(v.holder, _Held)]
        bad = [engine.name for engine in held if not engine.step()]
        if bad:
            raise NonFiniteError(
                f"the gradient of {' and '.join(bad)} is not finite; x has not moved, nor have they"
            )
        for variable in variables:
            if variable.holder is None:
                variable.step()

    @property
    def world_size(self) -> int:
        return processes.count()

    @property
    def is_main(self) -> bool:
        return processes.rank() == 0

    def _held(
        self,
        name: str,
        module: nn.Module,
        optimizer: OptimizerFactory,
        project: Callable[[Value], Value] | None,
    ) -> Variable:
        dtypes = {p.dtype for p in module.parameters()}
        config = zero_config.read(self.config)
        faults = [f for dtype in dtypes for f in zero_config.numbers(config, dtype)]
        if len(dtypes) > 1:
            faults.append(
                "launcher=deepspeed needs parameters of one type, got "
                f"{', '.join(sorted(map(str, dtypes)))}."
            )
        if faults:
            raise InputError(faults)
        settled = zero_config.filled(
            config,
            stage=self.stage,
            offload=self.offload,
            dtype=dtypes.pop(),
            width=getattr(getattr(module, "config", None), "hidden_size", None),
        )
        empty = blueprint(module)
        variable = Variable(name, module, optimizer, project)
        variable.blueprint = empty
        variable.holder = _Held(variable, settled, self._called)
        self._engines.add(variable.holder)
        return variable

    @cached_property
    def _engines(self) -> WeakSet[_Held]:
        """The engines that this launcher has made, while anyone holds them."""
        return WeakSet()

    @cached_property
    def _called(self) -> list[_Held]:
        """The engine whose module was called last, which the next loss is of."""
        return []


class _Root(nn.Module):
    """What an engine is given: a module whose own forward pass computes nothing.

    Losses call the module inside. The engine's pass over this one tells it that another begins.
    """

    def __init__(self, value: nn.Module) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> None:
        return None


class _Held(Holder):
    """One copy of y in an engine; adds up the gradients of any number of passes until a step."""

    def __init__(self, variable: Variable, config: dict[str, Any], called: list[_Held]) -> None:
        self.name = variable.name
        self.value: nn.Module = variable.value
        self.called = called
        self.stage = config["zero_optimization"]["stage"]
        self.engine: Any
        self.engine, *_ = _package().initialize(
            model=_Root(self.value),
            optimizer=variable.optimizer,
            config=config,
            dist_init_required=False,
        )
        variable.optimizer = self._optimizer
        self.value.register_forward_pre_hook(self._begin, prepend=True)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> bool:
        """Take a step; False if the gradient was not finite and nothing has moved."""
        self.engine.step()
        for gradient in self.tensors()["gradient"]:
            gradient.zero_()  # kept, it would be added to where the next first pass does not reach
        return self.engine.was_step_applied()

    def close(self) -> None:
        self.engine.destroy()

    def clip(self, largest: float) -> None:
        self.engine.optimizer.clip_grad = largest

    def tensors(self) -> dict[str, list[Tensor]]:
        """Masters, which are made of float32 parameters too, count as optimizer state."""
        zero = self.engine.optimizer
        states = [t for s in self._optimizer.state.values() for t in s.values()]
        gradients = [flat.grad for flat in self._masters if flat.grad is not None]
        if self.stage == 3:
            gradients.append(zero.grad_partitions_flat_buffer)
        else:
            gradients += getattr(zero, "accumulated_grads_in_cpu", {}).values()  # with offload
        return {
            "value": [getattr(p, "ds_tensor", p).detach() for p in self.value.parameters()],
            "gradient": gradients,
            "optimizer": [*self._masters, *(t for t in states if torch.is_tensor(t))],
        }

    def state_dict(self) -> dict[str, Any]:
        """What a plain optimizer of whole parameters would save; empty tensors but on the main
        process."""
        utils, main = _package().utils, processes.rank() == 0
        entries, counts = self._state_keys()
        value: dict[str, Tensor] = {}
        state: dict[int, dict[str, Any]] = {}
        for i, (name, leaf) in enumerate(named_leaves(self.value).items()):
            master = _kept(utils.safe_get_full_fp32_param(leaf), main)
            value[name] = master.to(leaf.dtype)
            if entries or counts:
                state[i] = {k: v.clone() if torch.is_tensor(v) else v for k, v in counts.items()}
                for key in entries:
                    state[i][key] = _kept(utils.safe_get_full_optimizer_state(leaf, key), main)
                if leaf.dtype != master.dtype:
                    state[i]["master"] = master
        groups = [
            {k: v for k, v in group.items() if k != "params"} | {"params": list(range(len(value)))}
            for group in self._optimizer.param_groups[:1]
        ]
        return {"value": value, "optimizer": {"state": state, "param_groups": groups}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        utils = _package().utils
        saved: dict[int, dict[str, Any]] = state["optimizer"]["state"]
        own = named_leaves(self.value)
        self._set_values({name: state["value"][name] for name in own})
        if saved:
            first = next(iter(own))
            self._make_state(saved[0], state["value"][first].shape)
        for i, (name, leaf) in enumerate(own.items()):
            value, entries = state["value"][name], saved.get(i, {})
            master = entries.get("master", value).float()
            utils.safe_set_full_fp32_param(leaf, master.to(self.engine.device))
            for key, held in entries.items():
                if key != "master" and _per_entry(key, held, value.shape):
                    utils.safe_set_full_optimizer_state(leaf, held.to(self.engine.device), key)
        for group, kept in zip(
            self._optimizer.param_groups, state["optimizer"]["param_groups"], strict=False
        ):
            group.update({k: v for k, v in kept.items() if k != "params"})

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Torch's optimizer, which steps on the flat pieces of this process."""
        return self.engine.optimizer.optimizer

    @property
    def _masters(self) -> list[Tensor]:
        zero = self.engine.optimizer
        flats = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        return list(flats)

    def _begin(self, *module_and_input: object) -> None:
        """Before a loss runs the module: the engine's pass over all, which computes nothing."""
        self.called[:] = [self]
        self.engine()

    def _state_keys(self) -> tuple[list[str], dict[str, Any]]:
        """The names of what the optimizer holds for every entry, and what it holds besides."""
        flat = self._masters[0]
        own = self._optimizer.state.get(flat, {})
        entries = [k for k, v in own.items() if _per_entry(k, v, flat.shape)]
        return entries, {k: v for k, v in own.items() if k not in entries}

    def _set_values(self, values: dict[str, Tensor]) -> None:
        """Overwrite the parameters that losses see."""
        own = named_leaves(self.value)
        if self.stage < 3:
            with torch.no_grad():
                for name, leaf in own.items():
                    leaf.copy_(values[name])
            return
        gathered = _package().zero.GatheredParameters
        for name, leaf in own.items():
            with gathered([leaf], modifier_rank=0), torch.no_grad():
                if processes.rank() == 0:
                    leaf.copy_(values[name])

    def _make_state(self, saved: dict[str, Any], shape: torch.Size) -> None:
        """Let the optimizer have what it makes at its first step, with the counts that were saved.

        Args:
            saved: The state of the first parameter.
            shape: Of that parameter.
        """
        for flat in self._masters:
            own = self._optimizer.state[flat]
            for key, held in saved.items():
                if key == "master":
                    continue
                if _per_entry(key, held, shape):
                    own[key] = torch.zeros_like(flat)
                else:
                    own[key] = held.clone() if torch.is_tensor(held) else held
        if self.stage < 3:  # as it does after its own first step
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module that ZeRO may have sharded, gathered; every process must call it.

    They lie where the module was made to compute; one at a time is gathered.
    """
    found = {}
    for name, p in module.named_parameters():
        if hasattr(p, "ds_id"):
            with _package().zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        else:
            found[name] = p.detach().clone()
    return found


def _per_entry(key: str, held: Any, shape: torch.Size) -> bool:
    """Whether an optimizer holds a number for each entry of a tensor of this shape, not a count."""
    return torch.is_tensor(held) and key != "step" and held.shape == shape


def _package() -> Any:
    """DeepSpeed, which is not there for everyone, type checkers among them."""
    return import_module("deepspeed")


def _kept(tensor: Tensor | None, main: bool) -> Tensor:
    assert tensor is not None
    return tensor.detach().cpu() if main else torch.empty(0, dtype=tensor.dtype)


def _check_memory(memory: Memory) -> list[str]:
    name = type(memory).__name__.lower()
    if name == "lisa":
        return [
            "launcher=deepspeed cannot run memory=lisa: ZeRO makes flat buffers of what trains at "
            "the start, in which frozen blocks keep moving and thawed ones never move; use "
            "launcher=fsdp2."
        ]
    if not isinstance(memory, Full):
        return [
            f"launcher=deepspeed cannot run memory={name}, whose copies share modules that each of "
            "its engines would shard; use launcher=fsdp2."
        ]
    if memory.precision != "master":
        return [
            f"launcher=deepspeed steps float32 masters of its own, got memory.precision="
            f"{memory.precision}; use memory.precision=master."
        ]
    return []


def _check_package() -> list[str]:
    install = "pip install 'bilevel[deepspeed]'"
    if find_spec("deepspeed") is None:
        return [f"launcher=deepspeed needs the package deepspeed, not installed: {install}."]
    found = metadata.version("deepspeed")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return [f"launcher=deepspeed needs deepspeed {oldest} or newer, found {found}: {install}."]
    return []
