"""What a run would need: python -m bilevel.plan problem=NAME memory=NAME devices=N device=CARD."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel import cards, fields
from bilevel.cards import Card
from bilevel.errors import InputError
from bilevel.footprint import Footprint, Planned, work
from bilevel.options import Options, read
from bilevel.piped import unbroken

FLAGS = ("--json", "--measure", "--time", "--help", "-h")
SHOWN = 4
"""Remedies that are shown."""
MOST = 64
"""Devices that are tried as a remedy."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it would run."""

    devices: int = 1
    """Accelerators, all on one machine."""
    device: str = "h100"
    """The card: a40, a100-40, a100-80, h100 or h200; here takes what this machine has."""
    mfu: float = 0.4
    """Assumed share of the card's dense bfloat16 operations per second that a step reaches."""


USAGE = """usage: python -m bilevel.plan problem=NAME [memory=NAME] [launcher=NAME] [devices=N]
           [device=CARD] [mfu=SHARE] [KEY=VALUE ...] [--json] [--measure] [--time]

What the sources hold, from the heads of their files; memory, operations and traffic of one step,
from shapes alone, without weights. --measure counts the memory of a step on fake tensors, --time
runs three real steps on this machine. Keys are those of python -m bilevel.run, and:

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 it fits, 1 it does not, 2 wrong input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or "--help" in words or "-h" in words:
        docs = fields.documentation(Machine)
        own = [f"  {f.name}={f.default}  {docs[f.name]}" for f in dataclasses.fields(Machine)]
        print(USAGE + "\n".join(own))
        return 0 if words else 2
    try:
        plan = make([w for w in words if w not in FLAGS])
        counted = measure(plan) if "--measure" in words else None
        timed = clock(plan) if "--time" in words else None
        tried = [] if plan.fits else remedies(plan)
    except InputError as error:
        print("\n".join(f"error: {fault}" for fault in error.faults), file=sys.stderr)
        return 2
    with unbroken():
        if "--json" in words:
            print(json.dumps(as_dict(plan, tried, counted, timed), indent=1))
        else:
            print("\n".join(lines(plan, tried, counted, timed)))
    return 0 if plan.fits else 1


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


def remedies(plan: Plan) -> list[tuple[tuple[str, ...], float]]:
    """Changes of the command line that make it fit, with the bytes then needed, cheapest first.

    Each is tried alone; where none is enough, they are added up until they are.
    """
    found = []
    sum_of: tuple[str, ...] = ()
    least = plan.footprint.total
    for change in _changes(plan):
        alone = _tried(plan.words, change)
        if alone is not None and alone.fits:
            found.append((change, alone.footprint.total))
    if found:
        return found[:SHOWN]
    for change in _changes(plan):
        both = _tried(_changed(plan.words, sum_of), change)
        if both is None or both.footprint.total >= least:
            continue
        sum_of = _changed(sum_of, change)
        least = both.footprint.total
        if both.fits:
            return [(sum_of, least)]
    return []


def as_dict(
    plan: Plan,
    tried: Sequence[tuple[tuple[str, ...], float]] = (),
    counted: tuple[float, float] | None = None,
    timed: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """The plan as JSON holds it; bytes, operations and seconds."""
    found = plan.footprint
    body = {
        "words": list(plan.words),
        "device": dataclasses.asdict(plan.card),
        "devices": plan.machine.devices,
        "mfu": plan.machine.mfu,
        "footprint": dataclasses.asdict(found) | {"peak": found.peak, "total": found.total},
        "fits": plan.fits,
        "spare": plan.spare,
        "compute_seconds": plan.compute_seconds,
        "traffic_seconds": plan.traffic_seconds,
        "swap_seconds": plan.swap_seconds,
        "tokens_per_second": found.tokens / plan.seconds,
        "remedies": [{"change": list(c), "total": total} for c, total in tried],
        "notes": list(plan.notes),
        "steps": plan.options.settings.steps,
        "seeds": plan.options.settings.seeds,
        "run_seconds": plan.steps * plan.seconds,
        "here": plan.card.name == "here",
        "computed": "by arithmetic on shapes; nothing was run on a device",
    }
    if counted is not None:
        body["counted_on_fake_tensors"] = {"between_steps": counted[0], "peak": counted[1]}
    if timed is not None:
        body["timed"] = {"step_seconds": timed[0], "peak": timed[1]}
    return body


def lines(
    plan: Plan,
    tried: Sequence[tuple[tuple[str, ...], float]] = (),
    counted: tuple[float, float] | None = None,
    timed: tuple[float, float] | None = None,
) -> Iterator[str]:
    """The plan as text."""
    found, card, machine = plan.footprint, plan.card, plan.machine
    parts = ", ".join(f"{name} {n / 1e9:.3f}" for name, n in found.parameters.items())
    total = sum(found.parameters.values())
    names = plan.options.names
    for rows in found.tables.values():
        yield from columns(rows)
        yield ""
    yield f"parameters, in billions: {total / 1e9:.3f} ({parts}); {found.trained / 1e9:.3f} train"
    where = f"{machine.devices} x {card.name}"
    yield f"memory={names['memory']} launcher={names['launcher']} on {where}"
    yield ""
    yield f"GB on each device, {found.peak} (the peak)"
    for name, size in found.moments[found.peak].items():
        if size:
            yield f"  {name:<48}{size / 1e9:>9.2f}"
    word = "fits" if plan.fits else "does NOT fit"
    margin = f"{abs(plan.spare) / 1e9:.1f} GB {'to spare' if plan.fits else 'too much'}"
    yield f"  {'total':<48}{found.total / 1e9:>9.2f}"
    yield f"  {f'usable on {card.name}':<48}{card.usable / 1e9:>9.2f}   {word}, {margin}"
    others = [m for m in found.moments if m != found.peak]
    yield "otherwise: " + ", ".join(
        f"{sum(found.moments[m].values()) / 1e9:.2f} {m}" for m in others
    )
    yield ""
    for title, held in (("host memory", found.host), ("disk", found.disk)):
        if held:
            yield f"{title}, GB: " + ", ".join(f"{n} {size / 1e9:.1f}" for n, size in held.items())
    traffic = ", ".join(f"{n} {size / 1e9:.1f}" for n, size in found.traffic.items()) or "none"
    yield f"received by each device in a step, GB: {traffic}"
    if found.swapped:
        yield (
            f"moved to host memory and back in a step: {found.swapped / 1e9:.1f} GB each way, "
            f"{plan.swap_seconds:.2f} s at {card.host / 1e9:.0f} GB/s"
        )
    yield (
        f"one upper step: {found.flops / 1e12:,.1f} TFLOP, {plan.compute_seconds:.2f} s at "
        f"{machine.mfu:.0%} of {card.flops / 1e12:.0f} TFLOP/s a device; traffic "
        f"{plan.traffic_seconds:.2f} s at {card.link / 1e9:.0f} GB/s; "
        f"about {found.tokens / plan.seconds:,.0f} tokens/s"
    )
    seeds = plan.options.settings.seeds
    steps = f"{plan.options.settings.steps} steps" + (f" of {seeds} seeds" if seeds > 1 else "")
    yield f"{steps}: {duration(plan.steps * plan.seconds)} by arithmetic"
    if timed is not None:
        yield (
            f"measured here: {timed[0]:.2f} s a step, {steps} {duration(plan.steps * timed[0])}; "
            f"at most {timed[1] / 1e9:.2f} GB held"
        )
    yield ""
    if not plan.fits:
        yield "what would fit, cheapest first, each by this arithmetic:"
        for change, size in tried:
            yield f"  {' '.join(change)}: {size / 1e9:.1f} GB"
        if not tried:
            yield "  nothing that was tried"
        yield ""
    if counted is not None:
        slack = found.moments[found.peak].get("context and slack", 0.0)
        yield (
            f"counted on fake tensors, one process: {counted[0] / 1e9:.2f} GB between steps, "
            f"{counted[1] / 1e9:.2f} at the peak (without context and slack; by arithmetic "
            f"{(found.total - slack) / 1e9:.2f})"
        )
    run = "three steps were timed" if timed is not None else "nothing was run on a device"
    yield f"Computed from shapes; {run}. It rests on:"
    seconds = f"Seconds: {machine.mfu:.0%} of the data sheet is assumed, traffic hides behind it."
    for line in (*plan.notes, *found.assumptions, seconds, f"{card.name}: {card.source}."):
        yield f"  {line}"


def columns(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table as lines; a row that is `estimated` has a ~ before its counts."""
    heads = [key for key in rows[0] if key != "estimated"]
    cells = [heads, *([_cell(row, key) for key in heads] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    for row in cells:
        first, *others = (
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()


def duration(seconds: float) -> str:
    """A time in the largest unit that it fills twice.

    >>> duration(90), duration(3 * 3600)
    ('90 s', '3.0 hours')
    """
    for name, unit in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, int):
        return f"{'~' * bool(row.get('estimated'))}{value:,}"
    if isinstance(value, float):
        return f"{value:.1%}" if key in ("truncated", "dropped") else f"{value:.2f}"
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:39] + "…"


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


def _changes(plan: Plan) -> Iterator[tuple[str, ...]]:
    """What may be changed: options of the problem, then more devices, then another card."""
    yield from plan.footprint.remedies
    devices = plan.machine.devices
    if devices > 1:
        yield ("launcher=fsdp2",)
    while devices < MOST:
        devices *= 2
        yield ("launcher=fsdp2", f"devices={devices}")
    larger = [c for c in cards.CARDS.values() if c.usable > plan.card.usable]
    for card in sorted(larger, key=lambda c: c.usable):
        yield (f"device={card.name}",)


def _tried(words: Sequence[str], change: tuple[str, ...]) -> Plan | None:
    """The plan of changed words, None where these cannot be used or change nothing."""
    try:
        return make(_changed(words, change))
    except InputError:
        return None


def _changed(words: Sequence[str], change: tuple[str, ...]) -> tuple[str, ...]:
    """The words with some replaced; options of a part that is replaced go with it."""
    keys = {word.partition("=")[0] for word in change}
    parts = tuple(f"{key}." for key in keys)
    short = {key.rpartition(".")[2] for key in keys}
    kept = []
    for word in words:
        key = word.removeprefix("--").partition("=")[0]
        if key not in keys | short and not key.startswith(parts):
            kept.append(word)
    return (*kept, *change)


if __name__ == "__main__":
    sys.exit(main())
