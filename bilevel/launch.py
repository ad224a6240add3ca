"""Where a run runs: makes variables, runs backward passes, takes steps. Solvers go through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InputError
from bilevel.memory import Memory
from bilevel.problem import Problem
from bilevel.tree import Value, norm, twin
from bilevel.variable import OptimizerFactory, Variable


class Launcher(ABC):
    """One process or many. It may hold several variables in one engine, so solvers gather all
    terms with `backward`, call `settle`, and then step all variables together with `step`."""

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
        """Why this cannot run here, as sentences; called before anything is loaded.

        Args:
            problem: The problem.
            memory: What is trainable.
            order: The highest derivative that the solver takes.
            parallel: Whether the solver goes through its launcher alone.
            direct: What of the solver reads or writes the numbers of y itself (`Solver.direct`).
            constrained: Whether the lower variable has a feasible set of its own.
            options: The solver's options, by name.
        """
        return []

    def rooted(self) -> Launcher:
        """The launcher with paths that hold from any folder, as runs keep it; by default itself."""
        return self

    def open(self) -> None:  # noqa: B027 - for many processes only
        """Find the other processes; nothing where there are none, or when called again."""

    def close(self) -> None:  # noqa: B027
        """Leave the other processes."""

    def begin(self, problem: Problem, generator: torch.Generator) -> tuple[Value, Value]:
        """The start of a problem as `variable` takes it, with all numbers or an outline of them."""
        return problem.init(generator)

    @abstractmethod
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
        """A variable that owns `value`, of which twins will share the submodules at these paths.

        Args:
            name: Used in messages and checkpoints.
            value: Its start.
            optimizer: Builds the optimizer from the list of leaves.
            project: Euclidean projection on the feasible set.
            shared: Paths of submodules.
            switches: Whether what trains of it changes during the run.
        """

    @abstractmethod
    def twin(
        self,
        original: Variable,
        name: str,
        optimizer: OptimizerFactory,
        shared: Sequence[str] = (),
    ) -> Variable:
        """A variable that starts as a copy of another, sharded and saved alike.

        It is independent of that but for the submodules at the paths `shared`, which it uses too
        until `Variable.fork`.
        """

    def prime(  # noqa: B027 - for engines only
        self, problem: Problem, x: Variable, copies: Sequence[Variable]
    ) -> None:
        """Do what an engine needs before the first step."""

    def parts(self, problem: Problem, batch: Any) -> Sequence[Any]:
        """The micro-batches of a batch that this process works on, as many on every process."""
        return problem.split(batch)

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of a scalar to every variable it depends on.

        Args:
            loss: The share of this process; the shares add up to the loss.
            last: Whether no more is added to the lower variable it depends on before `settle`.
        """

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over the processes; the same on all of them."""
        return list(numbers)

    def gathered(self, variable: Variable) -> float:
        """The norm of what a variable has gathered over all processes, after a `last` backward."""
        return norm(variable.gradient())

    def told(self, text: str) -> str:
        """The text that the main process gives."""
        return text

    def settle(self, variables: Sequence[Variable]) -> None:  # noqa: B027
        """Make what the variables gathered the sum over the processes; once for every step."""

    @abstractmethod
    def step(self, variables: Sequence[Variable]) -> None:
        """Move the variables along what they have gathered."""

    @property
    def world_size(self) -> int:
        """How many processes run this."""
        return 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return True


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
        shared: Sequence[str] = (),
        *,
        switches: bool = False,
    ) -> Variable:
        if self.threads:
            torch.set_num_threads(self.threads)
        return Variable(name, value, optimizer, project)

    def twin(
        self,
        original: Variable,
        name: str,
        optimizer: OptimizerFactory,
        shared: Sequence[str] = (),
    ) -> Variable:
        copy = twin(original.value, name, shared)
        variable = self.variable(name, copy, optimizer, original.project)
        variable.borrowed = set(shared)
        return variable

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        if loss.requires_grad:  # not where it depends on nothing that gathers now
            loss.backward()

    def step(self, variables: Sequence[Variable]) -> None:
        for variable in sorted(variables, key=lambda v: not v.is_here):  # none depends on another
            variable.step()
