"""Launchers on torch's own engine for sharded modules: `FSDP2` shards, `DDP` replicates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bilevel import processes
from bilevel.blocks import units
from bilevel.errors import InputError
from bilevel.memory import Memory
from bilevel.outline import Outline, blueprint, detach
from bilevel.problem import Problem
from bilevel.together import Together, engine_faults, four_bit_faults, option_faults, process_faults
from bilevel.tree import Part, Value, digest, dtypes, leaves, norm, twin
from bilevel.variable import OptimizerFactory, Variable

HALF = (torch.bfloat16, torch.float16)


class _Engine(Together):
    """Modules live in `fully_shard` groups on a mesh of processes; trees are replicated."""

    processes: int
    timeout: float
    reduces: bool

    def __post_init__(self) -> None:
        if faults := option_faults(self.processes, self.timeout):
            raise InputError(faults)

    @abstractmethod
    def mesh(self, device: str) -> Any:
        """The mesh of processes that `fully_shard` takes."""

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
        name = type(self).__name__.lower()
        faults = process_faults(problem, self.processes)
        if getattr(memory, "offload", "none") != "none":
            faults.append(
                f"launcher={name} keeps all shards on the device, so memory.offload has no effect; "
                "leave it out, or use launcher=single."
            )
        faults += four_bit_faults(name, memory)
        return faults + engine_faults(name, order=order, parallel=parallel, constrained=constrained)

    def open(self) -> None:
        processes.connect(timeout=self.timeout)

    def close(self) -> None:
        self._meshes.clear()  # their processes are gone
        processes.disconnect()

    def begin(self, problem: Problem, generator: torch.Generator) -> tuple[Value, Value]:
        return problem.outline(generator)

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
        if isinstance(value, Part):
            self._shard_start(value.whole, detach(value.whole), ())  # with the parts of its twins
        if not isinstance(value, nn.Module) or isinstance(value, Part):
            return Variable(name, value, optimizer, project)
        outline = detach(value)
        empty = blueprint(value)
        module = self._shard_start(value, outline, shared)
        variable = Variable(name, module, optimizer, project)
        variable.blueprint = empty
        return variable

    def twin(
        self,
        original: Variable,
        name: str,
        optimizer: OptimizerFactory,
        shared: Sequence[str] = (),
    ) -> Variable:
        if not isinstance(original.value, nn.Module) or isinstance(original.value, Part):
            return Variable(name, twin(original.value, name), optimizer, original.project)
        device = leaves(original.value)[0].device.type
        module = deepcopy(original.blueprint)
        for path in shared:
            module.set_submodule(path, original.value.get_submodule(path))
        self._shard(module, device, shared)
        inside = tuple(f"{path}." for path in shared)
        _fill(module, original.value, lambda name: not name.startswith(inside))
        variable = Variable(name, module, optimizer, original.project)
        variable.blueprint, variable.borrowed = original.blueprint, set(shared)

        def anew(path: str) -> nn.Module:
            block = self._shard(deepcopy(variable.blueprint.get_submodule(path)), device, ())
            _fill(block, module.get_submodule(path), lambda name: True)
            return block

        variable.copier = anew
        return variable

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        if loss.requires_grad:
            for module in self._sharded:
                module.set_requires_gradient_sync(last or self.reduces, recurse=False)
            loss.backward()

    def gathered(self, variable: Variable) -> float:
        if isinstance(variable.value, nn.Module):
            return norm(variable.gradient())  # summed by the engine already
        return norm(processes.summed(variable.gradient()))

    def settle(self, variables: Sequence[Variable]) -> None:
        for variable in variables:
            if not isinstance(variable.value, nn.Module):
                own = [p for p in leaves(variable.value) if p.requires_grad]
                processes.add_gradients(own)

    def step(self, variables: Sequence[Variable]) -> None:
        for variable in variables:
            variable.step()

    def prime(self, problem: Problem, x: Variable, copies: Sequence[Variable]) -> None:
        """Run each copy once with all of it trainable, if it is in half precision.

        The engine decides at the first pass of a group whether its gradients are summed in float32,
        and what is frozen then would be summed in half precision when it trains later.
        """
        if not any(dtypes(copy.value) & {*HALF} for copy in copies):
            return
        batch = self.parts(problem, problem.whole()[0])[0]
        with torch.no_grad():
            for copy in copies:
                problem.upper(x.value, copy.value, batch)

    def _shard_start(
        self, module: nn.Module, outline: Outline | None, shared: Sequence[str]
    ) -> nn.Module:
        """Cut up the module that a problem starts from, in place; an outline is read by shards."""
        device = home(module)
        if outline is None:
            return self._shard(module, device, shared)
        names = {n: outline.names[id(p)] for n, p in module.named_parameters() if p.is_meta}
        self._shard(module, device, shared)
        held = {n: torch.empty_like(module.get_parameter(n).detach(), device=device) for n in names}
        outline.read({names[n]: t for n, t in held.items()})
        _assign(module, held)
        return module

    def _shard(self, module: nn.Module, device: str, shared: Sequence[str]) -> nn.Module:
        """Put every unit of a module, and what is left, into groups of their own.

        A module that shares units with others has none for what is left: each unit stands alone.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        half = any(p.dtype in HALF for p in module.parameters())
        options = {
            "mesh": self._mesh(device),
            "reshard_after_forward": True,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None),
        }
        for part in [*units(module), *([] if shared else [module])]:
            if not isinstance(part, FSDPModule):
                fully_shard(part, **options)
                group: Any = part
                group.set_gradient_divide_factor(1.0)  # losses are shares of a sum
                group.set_force_sum_reduction_for_comms(True)  # gloo has no other
                _share_streams(group, self._streams)
                self._sharded.add(group)
        for buffer in module.buffers():
            buffer.data = buffer.to(device)  # parameters the engine has moved
        return module

    def _mesh(self, device: str) -> Any:
        """The one mesh of a device: each of two dimensions has process groups of its own."""
        if device not in self._meshes:
            self._meshes[device] = self.mesh(device)
        return self._meshes[device]

    @cached_property
    def _meshes(self) -> dict[str, Any]:
        """By the type of a device, while the processes are joined."""
        return {}

    @cached_property
    def _streams(self) -> dict[tuple[str, str], Any]:
        """What all groups of a device communicate on, by its type and the engine's name."""
        return {}

    @cached_property
    def _sharded(self) -> WeakSet[Any]:
        """The groups that this launcher has made, while anyone holds them."""
        return WeakSet()


@dataclass(frozen=True, kw_only=True)
class FSDP2(_Engine):
    """Every process holds its shard of y and its copies, gathered block by block when used.

    Started by torchrun; one process without a starter. Gradients, optimizer state and LISA's
    switches live on the shards. Built on `torch.distributed.fsdp.fully_shard`.
    """

    processes: int = 0
    """How many processes there must be; 0 takes as many as were started."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before it gives up."""
    reduces: bool = True
    """Whether gradients are summed and cut up after every micro-batch rather than once a step: less
    memory, more communication."""

    def mesh(self, device: str) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device, (processes.count(),))


@dataclass(frozen=True, kw_only=True)
class DDP(_Engine):
    """Every process holds y and its copies whole, and works on its share of each batch.

    Started by torchrun; one process without a starter. The engine is that of `FSDP2` on a mesh of
    replicas with one shard each, so that LISA's switches need no new wrapping.
    """

    processes: int = 0
    """How many processes there must be; 0 takes as many as were started."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before it gives up."""
    reduces: bool = False
    """Whether gradients are summed after every micro-batch rather than once a step."""

    def mesh(self, device: str) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        names = ("replicate", "shard")
        return init_device_mesh(device, (processes.count(), 1), mesh_dim_names=names)


def _share_streams(group: Any, streams: dict[tuple[str, str], Any]) -> None:
    """Let a group communicate on the streams of those before it.

    The engine gives streams of its own to every module that is not inside another, as each unit is
    of a copy that shares some; and a GPU's allocator keeps what was freed on a stream for that
    stream. `torch.distributed.fsdp.share_comm_ctx` also shares the order of the passes, by which
    the engine fetches ahead; that is of one module, and mixed up by another's backward pass.
    """
    context = group._get_fsdp_state()._comm_ctx
    own = context.lazy_init

    def lazy_init(device: torch.device) -> None:
        own(device)
        for name in [name for name in vars(context) if name.endswith("_stream")]:
            shared = streams.setdefault((device.type, name), getattr(context, name))
            setattr(context, name, shared)

    context.lazy_init = lazy_init


def _fill(module: nn.Module, source: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Give a sharded module without content copies of the shards of another of its kind."""
    alone = {name for name, _ in source.named_parameters()}
    aliases = {name for name, _ in source.named_parameters(remove_duplicate=False)} - alone
    held = {
        k: v.detach().clone()
        for k, v in source.state_dict().items()
        if wanted(k) and k not in aliases
    }
    _assign(module, held)


def _assign(module: nn.Module, held: Mapping[str, Tensor]) -> None:
    """Put tensors in place of parameters and buffers by name; what is tied to one stays so."""
    first: dict[int, str] = {}
    tied = {
        name: first.setdefault(id(p), name)
        for name, p in module.named_parameters(remove_duplicate=False)
    }
    module.load_state_dict(held, assign=True, strict=False)
    for name, other in tied.items():
        if name != other and other in held:
            path, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(path), attribute, module.get_parameter(other))


def home(module: nn.Module) -> str:
    """Where a module shall compute: at its `home` if it has one, else where it is."""
    return getattr(module, "home", None) or next(module.parameters()).device.type
