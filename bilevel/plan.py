"""What a run would need: python -m bilevel.plan problem=NAME memory=NAME devices=N device=CARD."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bilevel import fields
from bilevel.errors import InputError
from bilevel.forecast import Machine, Plan, clock, make, measure
from bilevel.piped import unbroken
from bilevel.remedies import remedies

FLAGS = ("--json", "--measure", "--time", "--help", "-h")

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


if __name__ == "__main__":
    sys.exit(main())
