"""What every tool's writer gives back, and what is known of the tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bilevel.problems.llm_reweight.exports.job import Job
from bilevel.problems.llm_reweight.exports.shares import Shares, Unit

SOME = ("per_source", "paths")
"""Options of an export that most tools have no use for."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written for a tool, for the words to the user."""

    total: int
    """Examples of one epoch, or of one pass through the mixture."""
    use: str
    """The command or the lines that use it."""
    notes: list[str] = field(default_factory=list)
    shares: Shares | None = None
    """Those of the tool's own examples, where these are not the records."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool: how its files are written and what its trainer averages over."""

    write: Callable[[Job], Written]
    averages: Unit
    sure: bool = True
    """Whether `averages` is what the tool does, not just what is usual of those who use it."""
    takes: tuple[str, ...] = ()
    """Those of `SOME` that it uses."""
    reads: bool = True
    """Whether it is given records; else their shares alone."""
    read: str
    """The version whose source was read for this, with its date."""


def counted(job: Job, shares: Shares | None = None) -> tuple[list[tuple[int, int]], list[str]]:
    """The number of a source and its count for each with a count, and a note on the others.

    A count of nothing is taken for no count at all by several tools.
    """
    counts = (shares or job.shares).counts(job.total)
    kept = [(i, count) for i, count in enumerate(counts) if count]
    gone = [source.name for source, count in zip(job.sources, counts, strict=True) if not count]
    note = f"left out, since their share of {job.total:,} examples is below one: {', '.join(gone)}"
    return kept, [note] if gone else []
