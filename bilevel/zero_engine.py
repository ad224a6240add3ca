"""DeepSpeed's own engines: what trains of a copy of y in flat pieces, with DeepSpeed's step."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import processes
from bilevel.tree import Part, leaves, named_leaves
from bilevel.variable import Holder, Variable
from bilevel.zero_package import package


class Engine(Holder):
    """Holds what trains of one copy of y, gathers the gradients of any number of passes, steps."""

    name: str

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the mean of the processes' gradients."""

    @abstractmethod
    def step(self) -> bool:
        """Take a step; False if the gradient was not finite and nothing has moved."""

    @abstractmethod
    def close(self) -> None:
        """Leave the module as it is, without hooks."""


class _Root(nn.Module):
    """What an engine is given: a module whose own forward pass computes nothing.

    Losses call the module inside. The engine's pass over this one tells it that another begins.
    """

    def __init__(self, value: nn.Module) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> None:
        return None


class Flat(Engine):
    """One copy of y in an engine of DeepSpeed; of a part of a module its own parameters alone.

    Args:
        variable: The copy, whose optimizer steps on flat pieces from now on.
        config: What DeepSpeed gets.
        called: The engine whose module was called last, which the next loss is of.
    """

    def __init__(self, variable: Variable, config: dict[str, Any], called: list[Engine]) -> None:
        self.name = variable.name
        self.value: nn.Module = variable.value
        self.called, self.config = called, config
        self.stage = config["zero_optimization"]["stage"]
        self.engine: Any
        own = nn.ParameterList(leaves(self.value)) if isinstance(self.value, Part) else self.value
        self.engine, *_ = package().initialize(
            model=_Root(own),
            optimizer=variable.optimizer,
            config=config,
            dist_init_required=False,
        )
        variable.optimizer = self._optimizer
        self.value.register_forward_pre_hook(self._begin, prepend=True)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> bool:
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
        utils, main = package().utils, processes.rank() == 0
        entries, counts = self._state_keys()
        value: dict[str, Tensor] = {}
        state: dict[int, dict[str, Any]] = {}
        for i, (name, leaf) in enumerate(named_leaves(self.value).items()):
            master = kept(utils.safe_get_full_fp32_param(leaf), main)
            value[name] = master.to(leaf.dtype)
            if entries or counts:
                state[i] = {k: v.clone() if torch.is_tensor(v) else v for k, v in counts.items()}
                for key in entries:
                    state[i][key] = kept(utils.safe_get_full_optimizer_state(leaf, key), main)
                if leaf.dtype != master.dtype:
                    state[i]["master"] = master
        groups = [
            {k: v for k, v in group.items() if k != "params"} | {"params": list(range(len(value)))}
            for group in self._optimizer.param_groups[:1]
        ]
        return {"value": value, "optimizer": {"state": state, "param_groups": groups}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        utils = package().utils
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
                if key != "master" and per_entry(key, held, value.shape):
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
        entries = [k for k, v in own.items() if per_entry(k, v, flat.shape)]
        return entries, {k: v for k, v in own.items() if k not in entries}

    def _set_values(self, values: dict[str, Tensor]) -> None:
        """Overwrite the parameters that losses see."""
        own = named_leaves(self.value)
        if self.stage < 3:
            with torch.no_grad():
                for name, leaf in own.items():
                    leaf.copy_(values[name])
            return
        gathered = package().zero.GatheredParameters
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
                if per_entry(key, held, shape):
                    own[key] = torch.zeros_like(flat)
                else:
                    own[key] = held.clone() if torch.is_tensor(held) else held
        if self.stage < 3:  # as it does after its own first step
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def kept(tensor: Tensor | None, main: bool) -> Tensor:
    """A tensor as the main process saves it; empty on others."""
    assert tensor is not None
    return tensor.detach().cpu() if main else torch.empty(0, dtype=tensor.dtype)


def per_entry(key: str, held: Any, shape: torch.Size) -> bool:
    """Whether an optimizer holds a number for each entry of a tensor of this shape, not a count."""
    return torch.is_tensor(held) and key != "step" and held.shape == shape
