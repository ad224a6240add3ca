"""What one upper step needs: the answer of a problem, and what a solver asks of any problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bilevel.cards import Card
from bilevel.errors import InputError
from bilevel.launch import Launcher, Single
from bilevel.memory import Full, Memory
from bilevel.problem import Always, Functions, Stream
from bilevel.solver import Solver
from bilevel.variable import Variable

ENTRIES = 1000
"""Entries of y in the toy problem that a solver is watched on."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one upper step of a solver does, whatever the problem."""

    copies: int
    """Copies of y."""
    upper: int
    """Gradients of the upper loss, over all copies."""
    lower: int
    """Gradients of the lower loss, over all copies."""
    batches: int
    """Batches of the lower loss, each of which may serve several copies."""
    gradients: int
    """Copies of which the gathered gradients exist at the same time."""
    held: int
    """Bytes that the optimizer holds for each number that it trains."""
    width: int
    """Bytes of a number that the optimizer computes with."""
    kept: int
    """Bytes of vectors that the solver keeps for each number of y."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one upper step needs, in bytes, operations and tokens."""

    parameters: Mapping[str, int]
    """Numbers of the lower variable by part."""
    trained: int
    """Numbers of one copy that train at a time."""
    moments: Mapping[str, Mapping[str, float]]
    """Bytes on every device by part, at the moments of a step that may be the peak."""
    host: Mapping[str, float]
    """Bytes of the machine's own memory by part, over all processes."""
    disk: Mapping[str, float]
    """Bytes of files by part."""
    flops: float
    """Operations of one upper step, over all devices."""
    tokens: int
    """Tokens of the batches of one upper step, each counted once."""
    traffic: Mapping[str, float]
    """Bytes that every device receives from others in one upper step."""
    swapped: float
    """Bytes that every device sends to host memory in one upper step, and receives again."""
    assumptions: tuple[str, ...]
    """What the figures rest on, in sentences."""
    remedies: tuple[tuple[str, ...], ...]
    """Changes of options that need less memory, cheapest first."""
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """What else there is to tell, as rows; a row that is `estimated` says so."""

    @property
    def peak(self) -> str:
        """The moment that needs the most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def total(self) -> float:
        """Bytes on every device at the peak."""
        return sum(self.moments[self.peak].values())


@runtime_checkable
class Planned(Protocol):
    """A problem that says what it needs before it is made."""

    def on(self, card: Card) -> Any:
        """The problem with what depends on the card chosen for it."""
        ...

    def unread(self) -> Any:
        """The problem without its data, which is then not looked at."""
        ...

    def number(self, memory: Memory) -> torch.dtype:
        """Of what trains, on a card."""
        ...

    def shared(self, devices: int, given: Set[str]) -> tuple[Any, tuple[str, ...]]:
        """The problem with batches that devices can share, where these are not among `given`;
        and what was changed, in sentences."""
        ...

    def footprint(
        self, work: Work, memory: Memory, launcher: Launcher, devices: int, steps: int
    ) -> Footprint: ...

    def measured(self, solver: Solver, memory: Memory) -> tuple[float, float]:
        """The bytes between steps and at the peak of a step in one process, on fake tensors."""
        ...

    def timed(self, solver: Solver, memory: Memory) -> tuple[float, float]:
        """Seconds of an upper step here, and the most bytes its process held."""
        ...


def work(solver: Solver, dtype: torch.dtype = torch.float32, memory: Memory | None = None) -> Work:
    """Watch one upper step of a solver on a toy problem, with y in `dtype`.

    Of a memory strategy those options count that `Full` has too, such as how it rounds.

    Raises:
        InputError: If the solver takes second derivatives or cannot step there.

    >>> from bilevel.solvers.penalty import scalebio
    >>> work(scalebio())
    Work(copies=2, upper=1, lower=2, batches=1, gradients=1, held=8, width=4, kept=0)
    """
    name = type(solver).__name__

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return (y.float() - 1).square().mean()

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return (y.float() - x.softmax(0)[0]).square().mean()

    y0 = torch.zeros(ENTRIES, dtype=dtype)
    problem = Functions(upper, lower, torch.zeros(3, dtype=torch.float64), y0)
    if solver.order > 1:
        raise InputError(f"{name} takes second derivatives, which cannot be planned yet.")
    generator = torch.Generator().manual_seed(0)
    own = {f.name for f in fields(Full)}
    kept_options = fields(memory) if is_dataclass(memory) else ()
    full = Full(**{f.name: getattr(memory, f.name) for f in kept_options if f.name in own})
    state = solver.init(problem, full, Single(), generator)
    copies = state.copies
    gradients = _gradients_of(copies)
    state.streams["lower"] = drawn = _Counted(state.streams["lower"])
    state = solver.step(problem, Single(), state)
    first = dict(state.counts)
    drawn.count = 0
    state = solver.step(problem, Single(), state)
    counts = {k: n - first[k] for k, n in state.counts.items()}
    if not counts["lower_grad"]:
        raise InputError(f"{name} takes no gradient of y, which cannot be planned yet.")
    held = _each([t for s in copies[0].optimizer.state.values() for t in s.values()])
    kept = _each([t for vector in state.vectors.values() for t in vector])
    return Work(
        copies=len(copies),
        upper=counts["upper_grad"],
        lower=counts["lower_grad"],
        batches=drawn.count,
        gradients=max(gradients),
        held=sum(held),
        width=max([*held, y0.element_size()]),
        kept=sum(kept),
    )


class _Counted(Always):
    """The stream of a toy problem, and how often it was asked."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(next(stream))
        self.count = 0

    def __next__(self) -> Any:
        self.count += 1
        return self.batch


def _gradients_of(copies: Sequence[Variable]) -> list[int]:
    """A list that grows by the number of copies with a gradient whenever one of them steps."""
    counts: list[int] = []

    def count(stepping: Variable) -> None:
        others = [c for c in copies if c is not stepping and c.memory()["gradient"]]
        counts.append(1 + len(others))

    for copy in copies:
        copy.optimizer.register_step_pre_hook(lambda *_, copy=copy: count(copy))
    return counts


def _each(tensors: list[Any]) -> list[int]:
    """Bytes of an entry of every tensor that has the shape of y."""
    own = [t for t in tensors if torch.is_tensor(t) and t.numel() == ENTRIES]
    return [t.element_size() for t in own]
