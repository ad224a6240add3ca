"""Methods side by side on one problem: how far each one's hypergradient is from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bilevel.errors import InputError
from bilevel.hypergradient import Estimates, Hypergradient, hypergradient
from bilevel.linear import norm
from bilevel.oracle import Vector
from bilevel.plugins import find, names
from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.tree import Value, dot

MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method: its relative error and cosine against the reference after its last step.

    `steps`, `errors` and `calls` are the path: after so many steps the error was so large, at so
    many oracle calls (gradients and second-order products of either loss). `calls_per_step` and
    `seconds_per_step` are means. `note` says why there are no numbers.
    """

    method: str
    error: float = float("nan")
    cosine: float = float("nan")
    calls_per_step: float = float("nan")
    seconds_per_step: float = float("nan")
    counts: dict[str, int] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    errors: tuple[float, ...] = ()
    calls: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rows of a comparison, best first, and the reference that they were held against."""

    rows: list[Row]
    reference: Hypergradient

    def __repr__(self) -> str:
        width = max(6, *(len(row.method) for row in self.rows))
        head = f"{'method':<{width}}  rel. error    cosine calls/step  ms/step"
        lines = [repr(self.reference), "", head]
        for row in self.rows:
            lines.append(
                f"{row.method:<{width}} {row.error:>11.2e} {row.cosine:>9.6f} "
                f"{row.calls_per_step:>10.1f} {1e3 * row.seconds_per_step:>8.2f}"
                if not row.note
                else f"{row.method:<{width}} {row.note}"
            )
        return "\n".join(lines)

    def plot(self, path: Path | str) -> Path:
        """Write a picture of error against oracle calls, one line a method; returns its path."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for i, row in enumerate(row for row in self.rows if row.errors):
            marker = "osv^DPX*"[i // 10 % 8]
            axes.loglog(row.calls, row.errors, marker=marker, markersize=4, label=row.method)
        axes.set_xlabel("oracle calls (gradients and second-order products)")
        axes.set_ylabel("relative error of the hypergradient")
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
        return Path(path)


def compare(
    problem: Problem,
    methods: str | Sequence[str | Solver] = (),
    *,
    x: Value | None = None,
    steps: int = 100,
    seed: int = 0,
) -> Comparison:
    """Hold x, run every method, and measure |est - dF| / |dF| and the cosine as it goes.

    Args:
        problem: The two losses.
        methods: Solvers or names; every installed solver without it.
        x: Where; the problem's own start without it.
        steps: Of each method.
        seed: Of their generators.

    >>> from bilevel.problems.quadratic import Quadratic
    >>> found = compare(Quadratic(), ["aid", "f2ba"], steps=50)
    >>> [row.method for row in found.rows], found.rows[0].error < 1e-5
    (['aid', 'f2ba'], True)
    """
    if x is None:
        x = problem.init(torch.Generator().manual_seed(seed))[0]
    if steps < 1:
        raise InputError(f"steps must be at least 1, got steps={steps}.")
    methods = [methods] if isinstance(methods, str) else methods
    for name in methods:
        if isinstance(name, str):
            find("solver", name)  # an unknown one is told before anything is computed
    reference = hypergradient(problem, x, seed=seed)
    rows = [
        _row(problem, x, method, reference.value, steps=steps, seed=seed)
        for method in methods or names("solver")
    ]
    rows.sort(key=lambda row: (bool(row.note), row.error if row.error == row.error else 1e300))
    return Comparison(rows=rows, reference=reference)


def _row(
    problem: Problem, x: Value, method: str | Solver, true: Vector, *, steps: int, seed: int
) -> Row:
    name = method if isinstance(method, str) else type(method).__name__
    marks = [mark for mark in MARKS if mark < steps] + [steps]
    errors, calls = [], []
    try:
        path = Estimates(problem, x, method, seed=seed)
        for step in range(1, steps + 1):
            path.advance()
            if step in marks:
                errors.append(_error(path.latest().value, true))
                calls.append(_calls(path.state.counts))
    except InputError as error:
        return Row(method=name, note=str(error))
    last = path.latest()
    lengths = norm(last.value) * norm(true)
    return Row(
        method=name,
        error=errors[-1],
        cosine=float(dot(last.value, true)) / lengths if lengths else float("nan"),
        calls_per_step=calls[-1] / steps,
        seconds_per_step=path.seconds / steps,
        counts=last.counts,
        steps=tuple(marks),
        errors=tuple(errors),
        calls=tuple(calls),
    )


def _error(found: Vector, true: Vector) -> float:
    gap = [a - b for a, b in zip(found, true, strict=True)]
    return norm(gap) / max(norm(true), 1e-300)


def _calls(counts: dict[str, int]) -> int:
    return sum(n for name, n in counts.items() if name != "sweeps")
