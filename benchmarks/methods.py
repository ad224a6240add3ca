"""Every solver on data hyper-cleaning: the honest upper loss against seconds and oracle calls.

Run: python benchmarks/methods.py   (writes benchmarks/results/methods.json, .md and .png)

Digits of scikit-learn, 1000 training rows of which half have wrong labels, one weight each. Every
solver gets the same seconds on one thread. At marks in time the x of that moment is kept; after the
run the lower level is solved again at each, so that no method is judged by its own y. All share the
step of y, 1/(2L), and the optimizer of x, where they have these; what else is set is in the table.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import record
import torch

import bilevel
from bilevel import plugins
from bilevel.problems.hypercleaning import Hypercleaning
from bilevel.solve import start
from bilevel.solvers.auto import Auto

SKIPPED = {
    "llm": "scalebio scalebio_votes",
    "the same as another here": "auto",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "f2sa": {"growth": 1.02},
    "maid": {"upper_lr": 100.0},
    "hoag": {},
    "bome": {"upper_lr": 1.0},
}
"""What a solver needs beside the shared step sizes; found by hand, one short run each."""


def made(name: str, problem: Hypercleaning, lower_lr: float) -> bilevel.Solver:
    solver = plugins.find("solver", name)()
    own = {f.name for f in fields(solver)}
    shared = {"lower_lr": lower_lr, **problem.solver_options}
    shared = {k: v for k, v in shared.items() if k in own} | OPTIONS.get(name, {})
    return replace(solver, **shared)


def run(name: str, problem: Hypercleaning, lower_lr: float, seconds: float) -> dict[str, Any]:
    solver = made(name, problem, lower_lr)
    row: dict[str, Any] = {"solver": name, "options": str(OPTIONS.get(name, ""))}
    if reasons := bilevel.check(problem, solver):
        return row | {"note": reasons[0]}
    launcher, state = bilevel.Single(), start(problem, solver)
    kept, marks = [], [seconds * 2.0**-k for k in range(8, -1, -1)]
    spent = 0.0
    while marks:
        begun = time.perf_counter()
        try:
            state = solver.step(problem, launcher, state)
        except ArithmeticError as error:
            row["note"] = str(error)
            break
        spent += time.perf_counter() - begun
        if spent >= marks[0]:
            calls = sum(n for key, n in state.counts.items() if key != "sweeps")
            kept.append((spent, state.step, calls, state.variables["x"].value.detach().clone()))
            marks = [mark for mark in marks if mark > spent]
    curve = []
    for at, step, calls, x in kept:
        honest = bilevel.resolve(problem, x)
        score = problem.metrics(x, honest.y)
        curve.append({"seconds": at, "step": step, "calls": calls, "upper": honest.upper, **score})
    last = curve[-1] if curve else {}
    return row | last | {"curve": curve}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    drawn = [row for row in rows if row.get("curve")]
    for i, row in enumerate(drawn):
        style = {"marker": "osv^DPX*"[i // 10 % 8], "markersize": 3, "label": row["solver"]}
        for ax, key in zip(axes, ("seconds", "calls"), strict=True):
            ax.plot([p[key] for p in row["curve"]], [p["upper"] for p in row["curve"]], **style)
    for ax, words in zip(axes, ("seconds", "oracle calls"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel=words)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("upper loss, lower level solved again")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--solvers", nargs="+", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = Hypercleaning()
    lower_lr = Auto().choose(problem).options["lower_lr"]
    skipped = " ".join(SKIPPED.values()).split()
    names = options.solvers or [n for n in plugins.names("solver") if n not in skipped]
    rows = [run(name, problem, lower_lr, options.seconds) for name in names]
    rows.sort(key=lambda row: row.get("upper", 1e9))
    x0 = problem.init(torch.Generator())[0]
    before = bilevel.resolve(problem, x0)
    notes = [
        f"Before: upper loss {before.upper:.3f}, test accuracy "
        f"{problem.metrics(x0, before.y)['accuracy']:.3f}. `upper` and `accuracy` are of the lower "
        f"level solved again. lower_lr={lower_lr:.3g}."
    ]
    columns = [
        "solver",
        "upper",
        "auroc",
        "accuracy",
        "seconds",
        "step",
        "calls",
        "options",
        "note",
    ]
    record.write("methods", "Solvers on data hyper-cleaning", notes, rows, columns)
    plot(rows, record.RESULTS / "methods.png")


if __name__ == "__main__":
    main()
