"""Where a run runs: makes variables, runs backward passes, takes steps. Solvers go through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import InputError
from bilevel.tree import Value, clone
from bilevel.variable import OptimizerFactory, Variable


class Launcher(ABC):
    """One process or many. It may hold several variables in one engine, so solvers gather all
    terms with `backward` and then step all variables together with `step`."""

    @abstractmethod
    def variable(
        self,
        name: str,
        value: Value,
        optimizer: OptimizerFactory,
        project: Callable[[Value], Value] | None = None,
    ) -> Variable:
        """A variable that owns `value`."""

    @abstractmethod
    def twin(self, original: Variable, name: str, optimizer: OptimizerFactory) -> Variable:
        """A variable that starts as an independent copy of another, sharded and saved alike."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar to every variable it depends on."""

    @abstractmethod
    def step(self, variables: Sequence[Variable]) -> None:
        """Move the variables along what they have gathered."""

    @property
    @abstractmethod
    def is_main(self) -> bool:
        """Whether this process prints and writes."""


@dataclass(frozen=True, kw_only=True)
class Single(Launcher):
    """One process, on the device where the start values are."""

    threads: int = 0
    """Threads of one operation; 0 keeps torch's own choice."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise InputError(f"launcher.threads must be non-negative, got {self.threads}.")

    def variable(
        self,
        name: str,
        value: Value,
        optimizer: OptimizerFactory,
        project: Callable[[Value], Value] | None = None,
    ) -> Variable:
        if self.threads:
            torch.set_num_threads(self.threads)
        return Variable(name, value, optimizer, project)

    def twin(self, original: Variable, name: str, optimizer: OptimizerFactory) -> Variable:
        return self.variable(name, clone(original.value), optimizer, original.project)

    def backward(self, loss: Tensor) -> None:
        if loss.requires_grad:  # not where it depends on nothing that gathers now
            loss.backward()

    def step(self, variables: Sequence[Variable]) -> None:
        for variable in variables:
            variable.step()

    @property
    def is_main(self) -> bool:
        return True
