"""What to change in a command line whose run does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bilevel import cards, forecast
from bilevel.errors import InputError
from bilevel.forecast import Plan

SHOWN = 4
"""Remedies that are told."""
MOST = 64
"""Devices that are tried as a remedy."""


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
        return forecast.make(_changed(words, change))
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
