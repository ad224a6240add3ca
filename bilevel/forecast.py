"""What the run of a command line would need, and whether it fits."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bilevel import cards, fields
from bilevel.cards import Card
from bilevel.errors import InputError
from bilevel.footprint import Footprint, Planned, work
from bilevel.options import Options, read


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it would run."""

    devices: int = 1
    """Accelerators, all on one machine."""
    device: str = "h100"
    """The card: a40, a100-40, a100-80, h100 or h200; here takes what this machine has."""
    mfu: float = 0.4
    """Assumed share of the card's dense bfloat16 operations per second that a step reaches."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A command line with what it would need."""

    words: tuple[str, ...]
    options: Options
    machine: Machine
    card: Card
    footprint: Footprint
    notes: tuple[str, ...]

    @property
    def spare(self) -> float:
        """Bytes of a device that are left; negative where it does not fit."""
        return self.card.usable - self.footprint.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def compute_seconds(self) -> float:
        machine = self.machine
        return self.footprint.flops / (machine.devices * self.card.flops * machine.mfu)

    @property
    def traffic_seconds(self) -> float:
        return sum(self.footprint.traffic.values()) / self.card.link

    @property
    def swap_seconds(self) -> float:
        """Of moving to host memory and back, during which nothing is computed."""
        return 2 * self.footprint.swapped / self.card.host

    @property
    def steps(self) -> int:
        """Upper steps of all seeds."""
        return self.options.settings.steps * self.options.settings.seeds

    @property
    def seconds(self) -> float:
        """Of one upper step, where traffic hides behind computing or the other way round."""
        return max(self.compute_seconds, self.traffic_seconds) + self.swap_seconds


def make(words: Sequence[str]) -> Plan:
    """The plan of a command line.

    Raises:
        InputError: With every fault of words, card, devices, shape and batches.
    """
    faults: list[str] = []
    machine, rest = _machine(words, faults)
    card = None
    try:
        card = cards.find(machine.device)
    except InputError as error:
        faults += error.faults
    options, more = read(rest)
    faults += more
    found: Footprint | None = None
    notes: tuple[str, ...] = ()
    if options is not None:
        problem = options.problem
        if not isinstance(problem, Planned):
            faults.append(
                f"problem={options.names['problem']} does not say what it needs; llm_reweight does."
            )
        else:
            given = {w.removeprefix("--").partition("=")[0].rpartition(".")[2] for w in rest}
            devices = max(1, machine.devices)
            problem = problem.on(card) if card else problem
            problem, notes = problem.shared(devices, given)
            options = dataclasses.replace(options, problem=problem)
            try:
                does = work(options.solver, problem.number(options.memory), options.memory)
                parts = (options.memory, options.launcher)
                found = problem.footprint(does, *parts, devices, options.settings.steps)
            except InputError as error:
                faults += error.faults
    if faults or card is None or options is None or found is None:
        raise InputError(faults)
    return Plan(
        words=tuple(words),
        options=options,
        machine=machine,
        card=card,
        footprint=found,
        notes=notes,
    )


def here(options: Options) -> Plan | None:
    """The plan of a run on this machine as it stands, full rows taken; None where none is known."""
    problem, card = options.problem, cards.here()
    if not isinstance(problem, Planned):
        return None
    try:
        problem = problem.on(card).unread()
        does = work(options.solver, problem.number(options.memory), options.memory)
        devices, steps = options.launcher.world_size, options.settings.steps
        found = problem.footprint(does, options.memory, options.launcher, devices, steps)
    except (InputError, ArithmeticError):
        return None
    return Plan(
        words=(),
        options=dataclasses.replace(options, problem=problem),
        machine=Machine(devices=devices, device="here"),
        card=card,
        footprint=found,
        notes=(),
    )


def measure(plan: Plan) -> tuple[float, float]:
    """Bytes between steps and at the peak of one step of the real code on fake tensors.

    Raises:
        InputError: If the plan is for several devices.
    """
    problem = plan.options.problem
    if plan.machine.devices > 1 or not isinstance(problem, Planned):
        raise InputError(
            "--measure counts a step in one process; leave out launcher= and devices=."
        )
    return problem.measured(plan.options.solver, plan.options.memory)


def clock(plan: Plan) -> tuple[float, float]:
    """Seconds of an upper step on this machine, and the most bytes its process held.

    Raises:
        InputError: If the plan is for another machine, for several devices, or does not fit.
    """
    problem = plan.options.problem
    if plan.card.name != "here" or plan.machine.devices > 1 or not isinstance(problem, Planned):
        raise InputError("--time runs on this machine, in one process; give device=here.")
    if not plan.fits:
        raise InputError("--time runs steps here, where they do not fit; leave it out.")
    return problem.timed(plan.options.solver, plan.options.memory)


def _machine(words: Sequence[str], faults: list[str]) -> tuple[Machine, list[str]]:
    """The machine that the words name, and the words that are left."""
    hints = typing.get_type_hints(Machine)
    values: dict[str, Any] = {}
    rest = []
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals or key not in hints:
            rest.append(word)
            continue
        if key in values:
            faults.append(f"{key} is given twice; keep one.")
        try:
            values[key] = fields.read(hints[key], value)
        except ValueError:
            faults.append(f"{key} must be {fields.describe(hints[key])}, got {value!r}.")
    machine = Machine(**values)
    if machine.devices < 1:
        faults.append(f"devices must be at least 1, got devices={machine.devices}.")
    if not 0 < machine.mfu <= 1:
        faults.append(f"mfu must be in (0, 1], got mfu={machine.mfu}.")
    return machine, rest
