"""What to change in a command line whose run does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from bilevel import cards, forecast
from bilevel.errors import InputError
from bilevel.forecast import Plan

SHOWN = 4
"""Remedies that are told."""
MOST = 64
"""Devices that are tried as a remedy."""

Change: TypeAlias = tuple[str, ...]
"""Words of a command line that take the place of others."""


def remedies(plan: Plan) -> list[tuple[Change, float]]:
    """Changes of the command line that make it fit, with the bytes then needed, cheapest first.

    Options are tried alone; where none is enough, they are added up until they are. Then more
    devices and larger cards are tried alone, and where nothing has helped on top of all options.
    """
    own, bought = plan.footprint.remedies, tuple(_bought(plan))
    sum_of: Change = ()
    found = _alone(plan, own)
    if not found:
        sum_of, fits = _added(plan, own)
        found = [fits] if fits else []
    found += _alone(plan, bought)
    if not found:
        fits = _added(plan, bought, sum_of)[1]
        found = [fits] if fits else []
    return found[:SHOWN]


def _alone(plan: Plan, changes: Iterable[Change]) -> list[tuple[Change, float]]:
    """The changes that are enough by themselves."""
    tried = [(change, _tried(plan.words, change)) for change in changes]
    return [(change, made.footprint.total) for change, made in tried if made and made.fits]


def _added(
    plan: Plan, changes: Iterable[Change], sum_of: Change = ()
) -> tuple[Change, tuple[Change, float] | None]:
    """The changes that lower what is needed, added up, and as few of them as are enough, if any."""
    start = _tried(plan.words, sum_of) or plan
    least = start.footprint.total
    for change in changes:
        both = _tried(_changed(plan.words, sum_of), change)
        if both is None or both.footprint.total >= least:
            continue
        sum_of, least = _changed(sum_of, change), both.footprint.total
        if both.fits:
            return sum_of, _least(plan, sum_of)
    return sum_of, None


def _least(plan: Plan, change: Change) -> tuple[Change, float]:
    """A change that is enough, without the words that it does not need."""
    kept = change
    for word in change:
        fewer = tuple(w for w in kept if w != word)
        made = _tried(plan.words, fewer)
        if made is not None and made.fits:
            kept = fewer
    made = _tried(plan.words, kept)
    assert made is not None
    return kept, made.footprint.total


def _bought(plan: Plan) -> Iterator[Change]:
    """More devices, then another card."""
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
