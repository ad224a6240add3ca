"""Host memory for what a copy of y does not work with: its own blocks, gradients, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bilevel.precision import by_parts
from bilevel.stepping import alone
from bilevel.storage import on_host
from bilevel.tree import leaves
from bilevel.variable import Keeper, Variable

Offload = Literal["none", "idle", "states"]


class Turns(Keeper):
    """Keeps what belongs to one copy of y alone on the device only while that copy is at work.

    A copy that is fetched comes from host memory once the one that was there has gone; what copies
    share stays. Numbers move, and are computed on the device alone, so that none of them changes.
    On a machine without a GPU both places are the same memory, and tensors still move.

    Args:
        states: Whether masters and moments stay in host memory, but for those of one parameter
            during its step; then a copy steps parameter by parameter, with all else away.
    """

    def __init__(self, *, states: bool) -> None:
        self.states = states
        self._copies: dict[str, _Copy] = {}

    def adopt(self, variables: Sequence[Variable]) -> None:
        """Take over copies of y, again when one has got blocks of its own; the first one stays."""
        users: dict[int, int] = {}
        for variable in variables:
            for p in leaves(variable.value):
                users[id(p)] = users.get(id(p), 0) + 1
        for variable in variables:
            own = [p for p in leaves(variable.value) if users[id(p)] == 1]
            known = self._copies.get(variable.name)
            if known is None:
                known = _Copy(variable=variable, home=own[0].device)
                self._copies[variable.name] = known
                variable.keeper = self
            new = {*map(id, own)} - {*map(id, known.own)}
            known.own = own
            if known.away:
                self._move([p for p in own if id(p) in new], known, _to_host, states=True)
        for variable in variables if self.states else variables[1:]:
            self._park(self._copies[variable.name])

    def is_here(self, variable: Variable) -> bool:
        return not self._copies[variable.name].away

    def fetch(self, variable: Variable) -> None:
        copy = self._copies[variable.name]
        if copy.away:
            for other in self._copies.values():
                self._park(other)
            self._move(copy.own, copy, copy.to_device, states=not self.states)
            copy.away = False

    def step(self, variable: Variable) -> None:
        if self.states:
            self._step_by_parts(self._copies[variable.name])
        else:
            self.fetch(variable)
            variable.optimizer.step()

    def _park(self, copy: _Copy) -> None:
        if not copy.away:
            self._move(copy.own, copy, _to_host, states=not self.states)
            copy.away = True

    def _step_by_parts(self, copy: _Copy) -> None:
        """Step the parameters one by one; on the device there is no more of the copy than that."""
        self._park(copy)
        optimizer = copy.variable.optimizer
        (group,) = optimizer.param_groups
        with by_parts(optimizer):
            for p in [p for p in group["params"] if p.grad is not None]:
                self._move([p], copy, copy.to_device, states=True)
                with alone(optimizer, p):
                    optimizer.step()
                p.grad = None
                self._move([p], copy, _to_host, states=True)

    def _move(
        self, own: Sequence[Tensor], copy: _Copy, to: Callable[[Tensor], Tensor], *, states: bool
    ) -> None:
        """Put the numbers of parameters and their gradients elsewhere; with `states` all of them.

        Single numbers, such as an optimizer's count of its steps, stay where they are.
        """
        for p in own:
            gradient, p.grad = p.grad, None
            p.data = to(p.data)
            p.grad = None if gradient is None else to(gradient)
            held = copy.variable.optimizer.state.get(p, {}) if states else {}
            for key, value in held.items():
                if torch.is_tensor(value) and value.dim():
                    held[key] = to(value)
        if copy.home.type == "cuda":
            torch.cuda.current_stream(copy.home).synchronize()  # the host may read them now


@dataclass(kw_only=True)
class _Copy:
    variable: Variable
    home: torch.device
    own: list[Tensor] = field(default_factory=list)
    """The leaves that no other copy uses."""
    away: bool = False

    def to_device(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self.home).copy_(tensor, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    with on_host():
        held = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return held.copy_(tensor, non_blocking=True)
