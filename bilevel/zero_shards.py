"""ZeRO-3 as a sharder alone: DeepSpeed cuts up and gathers, an optimizer of torch steps the shards.

DeepSpeed's own optimizers make flat buffers of what trains at the start. Here every parameter has
a piece of its own, so that what trains may change, and copies may use modules of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilevel import processes
from bilevel.blocks import units
from bilevel.precision import LOW
from bilevel.tree import Part, leaves, named_leaves, norm, whole
from bilevel.variable import Variable
from bilevel.zero_engine import Engine, kept, per_entry
from bilevel.zero_package import package


class Sharder:
    """Modules whose parameters are cut up among the processes, and gathered where a pass needs one.

    Args:
        config: What DeepSpeed gets.
        apart: Whether copies share units of modules, so that each is gathered by itself.
    """

    def __init__(self, config: dict[str, Any], *, apart: bool) -> None:
        self.apart = apart
        zero = config["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
        self.config = config | {"zero_optimization": zero}  # what stays gathered would not move
        self.on_host = zero.get("offload_optimizer", {}).get("device") == "cpu"
        self._zero = package().DeepSpeedConfig(self.config).zero_config
        self._hooked: list[Any] = []
        self._pieces: dict[Any, nn.Parameter] = {}

    def shard(self, module: nn.Module, shared: Sequence[str] = ()) -> None:
        """Cut up what is not yet; each unit by itself if copies of the module share some of them.

        Args:
            module: Is changed in place, and gets hooks.
            shared: Paths of submodules that copies use too.
        """
        known = {id(hooked.module) for hooked in self._hooked}
        for part in units(module) if shared else [module]:
            if id(part) not in known:
                self._hooked.append(self._hook(part))
                for p in leaves(part):
                    _clear_padding(p)
        _place_buffers(module)

    def copied(self, empty: nn.Module, source: nn.Module, shared: Sequence[str] = ()) -> nn.Module:
        """As `copied`, with hooks."""
        module = copied(empty, source, shared)
        self.shard(module, shared)
        return module

    def part(self, original: Part, name: str) -> Part:
        """The part of that name of the same sharded whole, made equal to another."""
        twin = original.twin(name)
        own: list[Any] = leaves(original)
        pairs: list[tuple[Any, Any]] = list(zip(leaves(twin), own, strict=True))
        for p, held in pairs:
            p.ds_tensor.copy_(held.ds_tensor)
        return twin

    def piece(self, parameter: Any) -> nn.Parameter:
        """What an optimizer steps in the place of a parameter: the shard of this process, flat.

        The mean of the processes' gradients is gathered in its `grad`. With optimizers in host
        memory its numbers are there from the first gradient to the step.
        """
        if parameter not in self._pieces:
            shard = parameter.ds_tensor
            own = torch.empty(0, dtype=shard.dtype) if self.on_host else shard
            self._pieces[parameter] = nn.Parameter(own)
            parameter.register_post_accumulate_grad_hook(self._reduce)
        return self._pieces[parameter]

    def moved(self, parameter: Any) -> None:
        """Take over what a step has made of a parameter's piece, and drop the gradient."""
        piece = self._pieces[parameter]
        piece.grad = None
        if self.on_host:
            parameter.ds_tensor.copy_(piece.data)
            piece.data = torch.empty(0, dtype=piece.dtype)

    def release(self) -> None:
        """Free what a backward pass has left gathered: hooks miss modules without a gradient."""
        for hooked in self._hooked:
            hooked.partition_all_parameters()

    def close(self) -> None:
        """Remove all hooks; the modules stay cut up."""
        stack: list[nn.Module] = _offload().FWD_MODULE_STACK
        for hooked in self._hooked:
            hooked.destroy()
            stack[:] = [module for module in stack if module is not hooked.module]
        self._hooked.clear()

    def _hook(self, module: nn.Module) -> Any:
        """What an engine of stage 3 makes where it gets no optimizer.

        A unit by itself sees its own backward pass follow its forward pass: if it looked ahead, all
        units would stay gathered in between.
        """
        return _offload().DeepSpeedZeRoOffload(
            module,
            timers=None,
            ds_config=self.config,
            overlap_comm=self._zero.overlap_comm,
            prefetch_bucket_size=0 if self.apart else self._zero.prefetch_bucket_size,
            max_reuse_distance=0 if self.apart else self._zero.max_reuse_distance,
            max_live_parameters=self._zero.max_live_parameters,
            param_persistence_threshold=0,
            offload_param_config=self._zero.offload_param,
        )

    def _reduce(self, parameter: Any) -> None:
        """Add the mean of the processes' gradients of a pass to the piece's, and drop this one."""
        gradient = parameter.grad.float() if parameter.grad.dtype in LOW else parameter.grad
        scatter = import_module("deepspeed.runtime.comm.coalesced_collectives")
        group = parameter.ds_process_group
        (mean,) = scatter.reduce_scatter_coalesced([gradient.contiguous()], group=group)
        parameter.grad, piece = None, self._pieces[parameter]
        if piece.grad is None:
            if self.on_host:
                piece.data = parameter.ds_tensor.to("cpu", copy=True)
            piece.grad = torch.zeros_like(piece)
        piece.grad[: mean.numel()] += mean.to(piece.grad)


class Shards(Engine):
    """One copy of y on the pieces that a sharder has of its parameters.

    Args:
        variable: The copy, whose optimizer steps the pieces.
        sharder: Of this copy and all others.
        called: The engine whose module was called last, which the next loss is of.
    """

    def __init__(self, variable: Variable, sharder: Sharder, called: list[Engine]) -> None:
        self.name, self.variable, self.sharder = variable.name, variable, sharder
        self.largest = math.inf
        self._hook: Any = variable.value.register_forward_pre_hook(
            lambda *module_and_input: called.__setitem__(slice(None), [self]), prepend=True
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.sharder.release()

    def step(self) -> bool:
        pieces = {p: self.piece(p) for p in leaves(self.variable.value)}
        moving = {p: piece for p, piece in pieces.items() if piece.grad is not None}
        own = [piece.grad for piece in moving.values() if piece.grad is not None]
        length = math.sqrt(processes.total([norm(own) ** 2 if own else 0.0])[0])
        if math.isfinite(length):
            if own and self.largest < math.inf:
                total = torch.tensor(length, dtype=torch.float64).to(own[0])
                torch.nn.utils.clip_grads_with_norm_(moving.values(), self.largest, total)
            self.variable.optimizer.step()
        for p in moving:
            self.sharder.moved(p)
        return math.isfinite(length)

    def close(self) -> None:
        self._hook.remove()
        self.sharder.close()

    def piece(self, leaf: Tensor) -> Tensor:
        return self.sharder.piece(leaf)

    def clip(self, largest: float) -> None:
        self.largest = largest

    def tensors(self) -> dict[str, list[Tensor]]:
        own = [self.piece(p) for p in leaves(self.variable.value)]
        states = [t for s in self.variable.optimizer.state.values() for t in s.values()]
        return {
            "value": [p.ds_tensor for p in self._owned().values()],
            "gradient": [piece.grad for piece in own if piece.grad is not None],
            "optimizer": [t for t in states if torch.is_tensor(t)],
        }

    def state_dict(self) -> dict[str, Any]:
        """What a plain optimizer of whole parameters would save; empty tensors but on the main
        process."""
        main = processes.rank() == 0
        body = self.variable.optimizer.state_dict()
        own: list[Any] = leaves(self.variable.value)
        state = {
            i: {
                key: kept(_join(own[i], held), main) if _is_cut(own[i], key, held) else held
                for key, held in entries.items()
            }
            for i, entries in body["state"].items()
        }
        value = {name: kept(whole(p), main) for name, p in self._owned().items()}
        return {"value": value, "optimizer": body | {"state": state}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, p in self._owned().items():
            p.ds_tensor.copy_(_cut(p, state["value"][name]))
        own: list[Any] = leaves(self.variable.value)
        body = state["optimizer"]
        pieces = {
            i: {
                key: _cut(own[i], held) if per_entry(key, held, own[i].ds_shape) else held
                for key, held in entries.items()
            }
            for i, entries in body["state"].items()
        }
        self.variable.optimizer.load_state_dict(body | {"state": pieces})

    def _owned(self) -> dict[str, Any]:
        named = named_leaves(self.variable.value)
        return {name: p for name, p in named.items() if self.variable.owns(name)}


def cut_up(module: nn.Module, config: dict[str, Any]) -> None:
    """Cut a module up among the processes, in place; one parameter at a time is on the device.

    Args:
        module: Lies anywhere.
        config: What DeepSpeed gets.
    """
    package().zero.Init(module=module, config_dict_or_path=config)
    for p in leaves(module):
        _clear_padding(p)
    _place_buffers(module)


def copied(empty: nn.Module, source: nn.Module, shared: Sequence[str] = ()) -> nn.Module:
    """A module like `empty` with the numbers of one that is cut up; parameter by parameter.

    Args:
        empty: A module whose parameters have no memory.
        source: Another of its kind.
        shared: Paths of submodules of the source that it uses too.
    """
    inside = tuple(f"{path}." for path in shared)
    found = named_leaves(source)
    memo: dict[int, Any] = {
        id(p): _copy(found[name])
        for name, p in empty.named_parameters()
        if not name.startswith(inside)
    }
    module = deepcopy(empty, memo)
    for path in shared:
        module.set_submodule(path, source.get_submodule(path))
    return module


def _place_buffers(module: nn.Module) -> None:
    """Where parameters are moved when they are cut up."""
    device = package().accelerator.get_accelerator().current_device_name()
    for buffer in module.buffers():
        buffer.data = buffer.to(device)


def _offload() -> Any:
    return import_module("deepspeed.runtime.zero.parameter_offload")


def _copy(parameter: Any) -> nn.Parameter:
    """A sharded parameter with the numbers of another."""
    copy = nn.Parameter(whole(parameter))
    parameter.convert_to_zero_parameters(param_list=[copy])
    _clear_padding(copy)
    return copy


def _span(parameter: Any) -> slice:
    """The entries of the flat parameter that this process holds; as many, and padding behind."""
    size = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * size, parameter.ds_numel)
    return slice(start, min(start + size, parameter.ds_numel))


def _clear_padding(parameter: Any) -> None:
    """DeepSpeed leaves it as it was in memory, where it may be no number."""
    span = _span(parameter)
    parameter.ds_tensor[span.stop - span.start :].zero_()


def _cut(parameter: Any, tensor: Tensor) -> Tensor:
    """The part of a whole tensor like the parameter that belongs to its piece."""
    own = tensor.flatten()[_span(parameter)]
    part = torch.zeros(parameter.ds_tensor.ds_numel, dtype=tensor.dtype, device=tensor.device)
    part[: own.numel()] = own
    return part


def _join(parameter: Any, part: Tensor) -> Tensor:
    """The whole of what processes hold parts of, cut up as the parameter is."""
    count = parameter.ds_zero_partition_world_size
    flat = part.new_empty(count * part.numel())
    dist.all_gather(list(flat.chunk(count)), part, group=parameter.ds_process_group)
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def _is_cut(parameter: Any, key: str, held: Any) -> bool:
    return per_entry(key, held, parameter.ds_tensor.shape)
