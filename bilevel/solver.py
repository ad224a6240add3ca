"""The solver interface: hyperparameters in a frozen dataclass, what changes in a state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.errors import InputError, NonFiniteError
from bilevel.fields import mistyped, out_of_range
from bilevel.launch import Launcher
from bilevel.memory import Memory
from bilevel.problem import Problem, Stream, constrained
from bilevel.result import Status
from bilevel.tree import leaves, named_leaves
from bilevel.variable import Variable, optimizer_by_name


@dataclass(kw_only=True)
class State:
    """What every solver's state holds; all of it is saved, and restored bit for bit.

    `variables` has "x" and "y" (the answer) and whatever twins the solver keeps. `numbers` are the
    solver's own scalars, such as the penalty, and the evidence that a result shows (see
    `bilevel.evidence`). `counts` are oracle calls. `vectors` are tensors that no optimizer moves.
    """

    variables: dict[str, Variable]
    streams: dict[str, Stream]
    memory: Any
    step: int = 0
    upper: float = float("nan")
    """The upper loss seen by the last step, at its own batch."""
    lower: float = float("nan")
    numbers: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    vectors: dict[str, list[Tensor]] = field(default_factory=dict)
    derived: dict[str, Any] = field(default_factory=dict)
    """What follows from the problem and is kept for speed: made anew where missing, not saved."""

    @property
    def copies(self) -> list[Variable]:
        """y and its twins, the original first."""
        return [v for name, v in self.variables.items() if name != "x"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "variables": {k: v.state_dict() for k, v in self.variables.items()},
            "streams": {k: s.state_dict() for k, s in self.streams.items()},
            "memory": self.memory.state_dict(),
            "step": self.step,
            "upper": self.upper,
            "lower": self.lower,
            "numbers": dict(self.numbers),
            "counts": dict(self.counts),
            "vectors": {k: [t.detach() for t in v] for k, v in self.vectors.items()},
            "places": {k: [self._place(t) for t in v] for k, v in self.vectors.items()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.memory.load_state_dict(saved["memory"], self.copies)
        for name, variable in self.variables.items():
            variable.load_state_dict(saved["variables"][name])
        for name, stream in self.streams.items():
            stream.load_state_dict(saved["streams"][name])
        self.step = saved["step"]
        self.upper, self.lower = saved["upper"], saved["lower"]
        self.numbers = dict(saved["numbers"])
        self.counts = dict(saved["counts"])
        places = saved.get("places", {})
        self.vectors = {
            k: [self._placed(i, t, place) for i, (t, place) in enumerate(pairs)]
            for k, v in saved["vectors"].items()
            for pairs in [zip(v, places.get(k, [""] * len(v)), strict=True)]
        }

    def _devices(self) -> dict[str, torch.device]:
        return {name: leaves(self.variables[name].value)[0].device for name in "xy"}

    def _place(self, tensor: Tensor) -> str:
        """What a tensor lies beside: "x", "y", "both", "host", or "" where all is on the CPU."""
        devices = self._devices()
        beside = [name for name, device in devices.items() if device == tensor.device]
        if {d.type for d in devices.values()} == {"cpu"}:
            return ""
        return {0: "host", 1: "".join(beside), 2: "both"}[len(beside)]

    def _placed(self, index: int, tensor: Tensor, place: str) -> Tensor:
        """A saved tensor on the device of what it lay beside; else of the leaf that it is like."""
        devices = self._devices()
        if place == "host":
            return tensor
        if place in devices:
            return tensor.to(devices[place])
        if place == "both" and devices["x"] == devices["y"]:
            return tensor.to(devices["x"])
        for name in "yx":
            own = leaves(self.variables[name].value)
            if index < len(own) and own[index].shape == tensor.shape:
                return tensor.to(own[index].device)
        return tensor

    def like(self, keys: Sequence[Any], shape: Sequence[int]) -> Tensor | None:
        """The leaf that a tensor of a saved state is cut up as, by the keys that lead to it."""
        match tuple(keys):
            case ("variables", name, "value", leaf):
                return named_leaves(self.variables[name].value).get(leaf)
            case ("variables", name, "optimizer", "state", int(i), *_):
                near = leaves(self.variables[name].value)[i]
            case ("vectors", _, int(i)):
                own = leaves(self.variables["y"].value)
                near = own[i] if i < len(own) else None
            case _:
                near = None
        return near if near is not None and list(near.shape) == list(shape) else None


class Solver(ABC):
    """How to step. Implementations are frozen keyword-only dataclasses."""

    order: ClassVar[int] = 1
    """Highest derivative of the lower loss that the method takes."""
    parallel: ClassVar[bool] = False
    """Whether it shares out batches and gathers gradients through its launcher alone, so that it
    runs on several processes."""

    @abstractmethod
    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        """The state after one upper step; consumes the given one."""

    def terminate(self, state: State) -> Status | None:
        """Why to stop now, or None to go on."""
        return None

    def direct(self) -> list[str]:
        """What of its options reads or writes the numbers of copies of y by itself, in words.

        A launcher may hold them where only `Launcher` and `Variable.clip` reach them; it must know
        what else a solver that is `parallel` does. All of it, unless the solver says otherwise.
        """
        return [f"solver={type(self).__name__}"]

    def notes(self, problem: Problem) -> list[str]:
        """Lines for the user before the first step."""
        return []

    def check(self, problem: Problem) -> list[str]:
        """Every reason why this solver cannot be used on this problem, as sentences."""
        return []


def require(solver: Solver, **ranges: str) -> None:
    """Check fields against ranges by name, and the optimizers in the upper and lower slots.

    Args:
        solver: A dataclass; `upper_optimizer` with `upper_lr` and the same of `lower` are checked
            wherever there are such fields.
        ranges: For each field one key of `fields.RANGES`.

    Raises:
        InputError: With every fault.
    """
    if faults := mistyped("solver", solver):
        raise InputError(faults)
    faults = out_of_range("solver", solver, **ranges)
    own = {f.name for f in fields(solver)} if is_dataclass(solver) else set()
    for slot in ("upper", "lower"):
        if f"{slot}_optimizer" in own:
            try:
                optimizer_by_name(
                    getattr(solver, f"{slot}_optimizer"), getattr(solver, f"{slot}_lr")
                )
            except InputError as error:
                faults.extend(error.faults)
    if faults:
        raise InputError(faults)


def ignored(solver: Solver, key: str, needs: dict[str, tuple[Any, ...]]) -> list[str]:
    """Sentences on options that were given, yet have no effect with this value of field `key`.

    Args:
        solver: A dataclass.
        key: The field that decides.
        needs: For each option the values of `key` with which it is read.
    """
    assert is_dataclass(solver)
    defaults = {f.name: f.default for f in fields(solver)}
    value = getattr(solver, key)
    return [
        f"solver.{name}={getattr(solver, name)} has no effect with {key}={value}; it is read with "
        f"{' or '.join(f'{key}={other}' for other in others)}. Leave it out."
        for name, others in needs.items()
        if getattr(solver, name) != defaults[name] and value not in others
    ]


def free_lower(problem: Problem, needs: str, instead: str = "a penalty solver") -> list[str]:
    """Why a method that knows no constraints on y cannot be used, as a sentence; none if it can.

    Args:
        problem: That may have such constraints.
        needs: The sentence's first words, such as "DARTS needs".
        instead: What to use.
    """
    if not constrained(problem, "lower"):
        return []
    return [
        f"{needs} a lower level without constraints, and project_lower is given; use {instead}."
    ]


def finite_loss(
    name: str, loss: Tensor | float, problem: Problem, x: Variable, y: Variable, batch: Any
) -> float:
    """The number of a loss called "upper" or "lower", taken at a copy of y on a batch.

    Raises:
        NonFiniteError: If it is not finite, with the problem's words about the batch, unless that
            is None.
    """
    number = float(loss.detach() if isinstance(loss, Tensor) else loss)
    if not math.isfinite(number):
        words = "" if batch is None else problem.explain(x.value, y.value, batch)
        found = f"the {name} loss at {y.name} is {number}"
        raise NonFiniteError(f"{found}; {words}" if words else found)
    return number
