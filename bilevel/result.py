"""What a solve returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from bilevel.tree import Value


class Status(Enum):
    """Why a solve ended; the value is the message."""

    CONVERGED = "The upper step fell below the tolerance."
    STEPS = "The requested number of steps was done."
    STOPPED = "A callback stopped the run."
    RUNNING = "The run goes on."
    NONFINITE = (
        "The step was not done, because its numbers are not finite. "
        "Lower the step sizes or the penalty, or mend the data."
    )

    DIVERGED = (
        "The losses grew beyond all bounds: the answer is of no use. "
        "Lower the step sizes, first that of y to below 2 over the largest curvature of g."
    )

    @property
    def success(self) -> bool:
        return self not in (Status.NONFINITE, Status.DIVERGED)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answer of a solve, with what it cost and how it got there.

    `nit` counts upper steps, `counts` oracle calls by name, `history` one dict a step.
    `upper` and `lower` are the losses at the last step's own batch and iterate. `evidence` are the
    solver's last numbers (see `bilevel.evidence`), `warnings` what in them is too large for the
    answer to mean much, with remedies. `repeats` are the results of all seeds where several were
    asked for, this one the last of them; the others have no y.
    """

    x: Value
    y: Value
    status: Status
    message: str
    nit: int
    upper: float
    lower: float
    counts: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    evidence: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seed: int = 0
    repeats: tuple[Result, ...] = ()

    @property
    def success(self) -> bool:
        return self.status.success

    def __repr__(self) -> str:
        lines = [
            f"  message: {self.message}",
            f"  success: {self.success}",
            f"   status: {self.status.name}",
            f"      nit: {self.nit}",
            f"    upper: {self.upper:.6g}",
            f"    lower: {self.lower:.6g}",
            f"   counts: {self.counts}",
            f"        x: {_short(self.x)}",
            f"        y: {_short(self.y)}",
        ]
        if self.evidence:
            numbers = ", ".join(f"{k} {v:.3g}" for k, v in self.evidence.items())
            lines.insert(7, f" evidence: {numbers}")
        if self.repeats:
            losses = " ".join(f"{result.upper:.6g}" for result in self.repeats)
            lines.insert(5, f"   seeds: upper {losses}")
        lines += [f"  warning: {words}" for words in self.warnings]
        return "\n".join(lines)


def together(results: Sequence[Result]) -> Result:
    """The last of several results, with all of them as its repeats; one alone as it is."""
    if len(results) == 1:
        return results[0]
    earlier = [replace(result, y=None) for result in results[:-1]]
    return replace(results[-1], repeats=(*earlier, results[-1]))


def _short(value: Value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 160 else text[:157] + "..."
