"""A variable: a value, the optimizer that moves it, and the gradient gathered for its next step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import InputError
from bilevel.tree import Value, clone, leaves, named_leaves, size_bytes
from bilevel.votes import PairwiseVotes

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


UNFIT = {
    "lbfgs": "it evaluates the loss by itself; use sgd or adam",
    "sparseadam": "it takes sparse gradients only; use adam",
    "adahessian": "it differentiates the gradient, which is not kept; use adam",
    "sophiah": "it differentiates the gradient, which is not kept; use adam",
}
"""Optimizers that need more than the gradient at the present point, and why."""


class Holder(ABC):
    """An engine that keeps the numbers of a variable elsewhere than in its leaves."""

    @abstractmethod
    def tensors(self) -> dict[str, list[Tensor]]:
        """What this process holds of `value`, `gradient` and `optimizer`."""

    def piece(self, leaf: Tensor) -> Tensor:
        """What the optimizer steps in the place of a leaf, and where its gradient is gathered."""
        return leaf

    @abstractmethod
    def clip(self, largest: float) -> None:
        """Let the next step be along the gathered gradient, clipped to this norm."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What `Variable.state_dict` gives where no engine is; all processes must call this."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take such a state on, from whatever engine it is."""


class Keeper(ABC):
    """Moves what belongs to one variable alone between its device and host memory."""

    @abstractmethod
    def is_here(self, variable: Variable) -> bool:
        """Whether the variable can be computed with."""

    @abstractmethod
    def fetch(self, variable: Variable) -> None:
        """Bring the variable to its device; others may have to leave."""

    @abstractmethod
    def step(self, variable: Variable) -> None:
        """Run the variable's optimizer, as `optimizer.step` does."""


class Variable:
    """A value that an optimizer moves, v <- project(optimizer(v, gradient)).

    Made by a launcher, never by a solver, so that a twin is created, saved and counted exactly as
    its original. Losses add their gradients to the leaves' `.grad`; `step` uses and clears them.

    Args:
        name: Used in messages and checkpoints.
        value: The tree or module; its leaves are moved in place.
        optimizer: Builds the optimizer from the list of leaves.
        project: Euclidean projection on the feasible set; receives the value, returns a value.
    """

    def __init__(
        self,
        name: str,
        value: Value,
        optimizer: OptimizerFactory,
        project: Callable[[Value], Value] | None = None,
    ) -> None:
        self.name = name
        self.value = value
        self.project = project
        self.blueprint: Any = None
        """What a launcher keeps to make twins of a value that cannot be copied as it is."""
        self.borrowed: set[str] = set()
        """Paths of the submodules that are the original's too, until `fork`."""
        self.copier: Callable[[str], nn.Module] = self._copy
        """Makes a submodule at a path anew, equal to what is there."""
        self.holder: Holder | None = None
        """The engine of a launcher that has the leaves' numbers in its own hands."""
        self.keeper: Keeper | None = None
        """What a memory strategy has put in charge of where the leaves' numbers are."""
        self._leaves = leaves(value)
        for leaf in self._leaves:
            leaf.requires_grad_()
        self.optimizer = optimizer(self._leaves)

    def step(self) -> None:
        """Move the value along its gathered gradient, project it, and clear the gradient."""
        if self.keeper:
            self.keeper.step(self)
        else:
            self.optimizer.step()
        self.clear()
        if self.project is not None:
            with torch.no_grad():
                for leaf, projected in zip(
                    self._leaves, leaves(self.project(self.value)), strict=True
                ):
                    leaf.copy_(projected)

    def fetch(self) -> None:
        """Make sure that losses can be computed here; the numbers of others may be elsewhere then.

        Nothing to do unless a memory strategy keeps copies in host memory by turns.
        """
        if self.keeper:
            self.keeper.fetch(self)

    @property
    def is_here(self) -> bool:
        """Whether `fetch` has nothing to do."""
        return self.keeper is None or self.keeper.is_here(self)

    def clear(self) -> None:
        """Forget the gathered gradient."""
        for leaf in self._leaves:
            leaf.grad = self._piece(leaf).grad = None

    def fork(self, paths: Sequence[str]) -> None:
        """Give this variable submodules of its own where it uses those of its original.

        Args:
            paths: As in `borrowed`; others are left as they are.
        """
        for path in self.borrowed.intersection(paths):
            self.value.set_submodule(path, self.copier(path))
            self.borrowed.discard(path)
        self._leaves = leaves(self.value)
        (group,) = self.optimizer.param_groups
        group["params"] = [self._piece(leaf) for leaf in self._leaves]

    def forget(self, leaf: Tensor) -> None:
        """Drop what was gathered for a leaf, and its optimizer state."""
        piece = self._piece(leaf)
        leaf.grad = piece.grad = None
        self.optimizer.state.pop(piece, None)

    def _piece(self, leaf: Tensor) -> Tensor:
        return self.holder.piece(leaf) if self.holder else leaf

    def _copy(self, path: str) -> nn.Module:
        return clone(self.value.get_submodule(path))

    def owns(self, name: str) -> bool:
        """Whether the leaf of that name is this variable's alone."""
        return not any(name.startswith(f"{path}.") for path in self.borrowed)

    def gather(self, gradient: list[Tensor]) -> None:
        """Add a gradient that was computed elsewhere, one tensor for each leaf."""
        for leaf, g in zip(self._leaves, gradient, strict=True):
            leaf.grad = g.to(leaf).clone() if leaf.grad is None else leaf.grad + g

    def assign(self, tensors: list[Tensor]) -> None:
        """Overwrite the leaves; the optimizer's state stays as it is."""
        with torch.no_grad():
            for leaf, t in zip(self._leaves, tensors, strict=True):
                leaf.copy_(t)

    def gradient(self) -> list[Tensor]:
        """The gathered gradient, a zero tensor where nothing was gathered."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._leaves]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block no gradient is gathered here: others' losses take it as a constant."""
        was = [leaf.requires_grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.requires_grad_(False)
        try:
            yield
        finally:
            for leaf, flag in zip(self._leaves, was, strict=True):
                leaf.requires_grad_(flag)

    @contextmanager
    def weighted(self, factor: float) -> Iterator[None]:
        """Within the block every gradient is multiplied by `factor` before it is gathered."""
        hooks = [p.register_hook(lambda g: g * factor) for p in self._leaves if p.requires_grad]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def clip(self, largest: float, length: float) -> None:
        """Scale the gathered gradient, whose norm is `length`, to a norm of at most `largest`."""
        if self.holder:
            self.holder.clip(largest)
            return
        gathered = [p for p in self._leaves if p.grad is not None]
        if gathered:
            total = torch.tensor(length, dtype=torch.float64).to(gathered[0])
            torch.nn.utils.clip_grads_with_norm_(gathered, largest, total)

    def tensors(self) -> dict[str, list[Tensor]]:
        """What is held now of the value, its gradient and its optimizer state."""
        if self.holder:
            return self.holder.tensors()
        states = [t for s in self.optimizer.state.values() for t in s.values()]
        return {
            "value": [p for name, p in named_leaves(self.value).items() if self.owns(name)],
            "gradient": [p.grad for p in self._leaves if p.grad is not None],
            "optimizer": [t for t in states if torch.is_tensor(t)],
        }

    def memory(self) -> dict[str, int]:
        """Bytes held now by the value, its gradient and its optimizer state."""
        return {what: size_bytes(held) for what, held in self.tensors().items()}

    def state_dict(self) -> dict[str, Any]:
        if self.holder:
            return self.holder.state_dict()
        own = {k: v.detach() for k, v in named_leaves(self.value).items() if self.owns(k)}
        return {
            "value": own,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = {k: v for k, v in named_leaves(self.value).items() if self.owns(k)}
        if own.keys() != state["value"].keys():
            raise InputError(
                f"the saved value of {self.name} has other parts: expected {sorted(own)[:5]}, "
                f"got {sorted(state['value'])[:5]}; resume with the same problem and model."
            )
        if self.holder:
            self.holder.load_state_dict(state)
            return
        with torch.no_grad():
            for name, leaf in own.items():
                leaf.copy_(state["value"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def optimizer_by_name(name: str, lr: float, **options: Any) -> OptimizerFactory:
    """A factory of the optimizer called `name` (any case) with step size `lr`.

    From `torch.optim`; "votes" is `PairwiseVotes`, for logits of weights; and, where the package
    pytorch_optimizer is installed, from there what torch does not have.

    Raises:
        InputError: If there is no such optimizer (names the nearest), it needs more than a gradient
            at one point, or the step size is not positive and finite. The factory raises it for
            parameters that the optimizer does not take.

    >>> make = optimizer_by_name("adamw", 1e-2)
    >>> type(make([torch.zeros(2, requires_grad=True)])).__name__
    'AdamW'
    """
    from difflib import get_close_matches

    if name.lower() in UNFIT:
        raise InputError(f"the optimizer {name} cannot be used here: {UNFIT[name.lower()]}.")
    known: dict[str, type[torch.optim.Optimizer]] = {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and n != "Optimizer"
    } | {"votes": PairwiseVotes}
    kind = known.get(name.lower()) or _elsewhere(name.lower())
    if kind is None:
        near = get_close_matches(name.lower(), known.keys() - UNFIT.keys(), n=1)
        choices = ", ".join(sorted(known.keys() - UNFIT.keys()))
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {choices}."
        raise InputError(f"unknown optimizer {name!r}; {hint}")
    if not 0 < lr < math.inf:
        raise InputError(f"the step size of {name} must be positive and finite, got lr={lr}.")
    build: Any = kind  # the base class declares no options, every optimizer has its own

    def made(parameters: Any) -> torch.optim.Optimizer:
        try:
            return build(parameters, lr=lr, **options)
        except ValueError as error:  # muon takes matrices only
            raise InputError(f"the optimizer {name} cannot be used here: {error}.") from error

    return made


def _elsewhere(name: str) -> type[torch.optim.Optimizer] | None:
    """The optimizer of pytorch_optimizer, if that is installed and has it."""
    try:
        package = import_module("pytorch_optimizer")
    except ImportError:
        return None
    known = name in package.get_supported_optimizers()
    return package.load_optimizer(name) if known else None


def is_module(value: Value) -> bool:
    """Whether a value is an `nn.Module` rather than a tree of tensors."""
    return isinstance(value, nn.Module)
