"""The records of a run as Markdown tables and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tasks

Row = dict[str, Any]
COMPILED = "jaxopt"


def write(rows: list[Row], out: Path) -> None:
    """Write `out`.md and .png."""
    text = "\n".join(_lines(rows)) + "\n"
    out.with_suffix(".md").write_text(text)
    _plot(rows, out.with_suffix(".png"))
    print(text)


def _lines(rows: list[Row]) -> Iterable[str]:
    machine = next((row for row in rows if row["kind"] == "machine"), {})
    yield "# This library beside others"
    yield ""
    yield "`python benchmarks/peers/run.py`; " + ", ".join(
        f"{k} {v}" for k, v in machine.items() if k != "kind"
    )
    yield ""
    yield (
        "100 inner steps of gradient descent, 20 products of a linear solver, float64, one thread; "
        "x by gradient descent. `error` and `cosine` are of the first hypergradient against the "
        "exact one, `long` is the error after 2,000 inner steps and 100 products; `ms` is CPU time "
        "of an outer step, median of interleaved repeats, with the least and the most; `upper` is "
        "the loss at the end of the curve's budget, with the lower level solved again; calls of "
        "an oracle (a gradient, or a product with second derivatives) are counted by the formula "
        "of the method. `first` are the wall seconds of the first step, where jaxopt and ours "
        "compiled compile, with nothing kept from a run before. `MB` is the peak of a step over "
        "what was there before it. `s to 0.6` are "
        "the CPU seconds to that loss with the step of x that all share, `best` with the best of "
        "it and 3, 10 and 30 times it."
    )
    yield from _peers(rows)
    for name, words in tasks.WORDS.items():
        if any(row.get("task") == name for row in rows):
            yield from ["", f"## {words[0].upper()}{words[1:]}", ""]
            yield from _task(rows, name)
    yield from ["", "## Ratios", ""]
    yield from _ratios(rows)
    yield from ["", "## Growth", ""]
    yield from _growth(rows)


def _peers(rows: list[Row]) -> Iterable[str]:
    scripts = {row["peer"]: row for row in rows if row["kind"] == "script"}
    yield from [
        "",
        "| library | versions | lines of a user's hyper-cleaning | its loss, 20 steps |",
    ]
    yield "| --- | --- | --- | --- |"
    for row in (row for row in rows if row["kind"] == "peer"):
        versions = ", ".join(f"{k} {v}" for k, v in row.get("versions", {}).items())
        script = scripts.get(row["peer"], {})
        loss = script.get("fault") or _number(script.get("upper"))
        cells = [row["peer"], row.get("fault") or versions, row.get("lines", ""), loss]
        yield "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"


def _task(rows: list[Row], name: str) -> Iterable[str]:
    head = ["library", "method", "error", "cosine", "long", "ms", "range", "wall ms", "first", "MB"]
    digits = not name.startswith("quadratic")
    head += ["upper", "seconds", "calls"] if digits else []
    head += ["s to 0.6", "best"] if name == "cleaning" else []
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    own = [row for row in rows if row.get("task") == name]
    for first in (r for r in own if r["kind"] == "error" and r["inner"] == 100):
        mine = [r for r in own if (r["peer"], r["method"]) == (first["peer"], first["method"])]
        if first.get("fault"):
            yield f"| {first['peer']} | {first['method']} | {first['fault'].replace('|', '/')} |"
            continue
        cpu, wall = (_times(mine, k) for k in ("cpu", "wall"))
        long = next((r for r in mine if r["kind"] == "error" and r["inner"] != 100), {})
        cells = [first["peer"], first["method"], *map(_number, (first["error"], first["cosine"]))]
        cells.append(_number(long.get("error")))
        cells.append(_number(statistics.median(cpu) if cpu else None))
        cells.append(f"{min(cpu):.3g} to {max(cpu):.3g}" if cpu else "")
        cells.append(_number(statistics.median(wall) if wall else None))
        cells.append(_number(first.get("seconds")))
        cells.append(_number(first["memory"] / 1e6 if first.get("memory") is not None else None))
        curve = next((r for r in mine if r["kind"] == "curve" and not r.get("fault")), None)
        if digits:
            cells += _end(curve)
        if name == "cleaning":
            cells += _goal(mine)
        yield "| " + " | ".join(cells) + " |"


def _goal(mine: list[Row]) -> list[str]:
    """CPU seconds to the goal with the common step of x, and with the best one and its scale."""
    goals = {r.get("scale", 1.0): r["goal"]["cpu"] for r in mine if r.get("goal")}
    if not goals:
        return ["no", "no"]
    best = min(goals, key=goals.__getitem__)
    common = f"{goals[1.0]:.3g}" if 1.0 in goals else "no"
    return [common, f"{goals[best]:.3g} ({best:g})"]


def _end(curve: Row | None) -> list[str]:
    if curve is None or not curve["upper"]:
        return ["", "", ""]
    calls = CALLS.get(curve["family"].split(",")[0])
    told = f"{calls * curve['step'][-1]:,}" if calls else ""
    return [_number(curve["upper"][-1]), f"{curve['wall'][-1]:.1f}", told]


CALLS = {"implicit": 100 + 1 + 20 + 1 + 1, "unrolled": 100 + 100 + 1}
"""Oracle calls of an outer step: gradients of g, of f, and products with H and J' or both."""


def _ratios(rows: list[Row]) -> Iterable[str]:
    yield (
        "CPU time of an outer step over that of the fastest other library of the same family whose "
        "error is no larger than 1.02 of ours: the median of the repeats' ratios, the least, the "
        "most."
    )
    yield from ["", "| task | ours | against | ratio | range |", "| --- | --- | --- | --- | --- |"]
    for name in tasks.WORDS:
        errors = {
            (r["peer"], r["method"]): r
            for r in rows
            if r["kind"] == "error" and r.get("task") == name and r["inner"] == 100
        }
        mine = [key for key in errors if key[0] == "ours" and "error" in errors[key]]
        for key in mine:
            for compiled in (False, True):
                rival = _rival(rows, errors, name, key, compiled=compiled)
                if rival:
                    ours, theirs = _paired(rows, name, key), _paired(rows, name, rival)
                    ratios = [ours[i] / theirs[i] for i in ours if i in theirs]
                    if ratios:
                        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                        middle = f"{statistics.median(ratios):.2f}"
                        yield f"| {name} | {key[1]} | {' '.join(rival)} | {middle} | {spread} |"


def _rival(
    rows: list[Row],
    errors: dict[tuple[str, str], Row],
    name: str,
    key: tuple[str, str],
    *,
    compiled: bool,
) -> tuple[str, str] | None:
    family = errors[key]["family"].split(",")[0]
    fit = [
        other
        for other, r in errors.items()
        if other[0] != "ours"
        and (other[0] == COMPILED) == compiled
        and r["family"].split(",")[0] == family
        and r.get("error", math.inf) <= 1.02 * errors[key]["error"]
        and _paired(rows, name, other)
    ]
    middle = {other: statistics.median(_paired(rows, name, other).values()) for other in fit}
    return min(middle, key=middle.__getitem__) if middle else None


def _paired(rows: list[Row], name: str, key: tuple[str, str]) -> dict[int, float]:
    return {
        r["repeat"]: r["cpu"]
        for r in rows
        if r["kind"] == "time" and r.get("task") == name and (r["peer"], r["method"]) == key
    }


def _growth(rows: list[Row]) -> Iterable[str]:
    yield (
        "Exponent of the growth from 10,000 to 1,000,000 lower variables: of CPU time and of "
        "memory (1 is linear)."
    )
    yield from ["", "| library | method | time | memory |", "| --- | --- | --- | --- |"]
    names = ("quadratic-10000", "quadratic-1000000")
    keys = {
        (r["peer"], r["method"]) for r in rows if r.get("task") == names[1] and r["kind"] == "time"
    }
    for key in sorted(keys, key=lambda k: (k[0] != "ours", k)):
        found = []
        for name in names:
            times = list(_paired(rows, name, key).values())
            memory = next(
                (
                    r.get("memory")
                    for r in rows
                    if r["kind"] == "error"
                    and r.get("task") == name
                    and (r["peer"], r["method"]) == key
                ),
                None,
            )
            found.append((statistics.median(times) if times else None, memory))
        slopes = [
            _number(math.log(b / a) / math.log(100)) if a and b else ""
            for a, b in zip(*found, strict=True)
        ]
        yield f"| {key[0]} | {key[1]} | {slopes[0]} | {slopes[1]} |"


def _plot(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [n for n in tasks.WORDS if any(r["kind"] == "curve" and r["task"] == n for r in rows)]
    if not names:
        return
    figure = Figure(figsize=(5 * len(names), 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(names), squeeze=False)
    labels = list(dict.fromkeys((r["peer"], r["method"]) for r in rows if r["kind"] == "curve"))
    peers = list(dict.fromkeys(peer for peer, _ in labels))
    colors = {peer: "black" if peer == "ours" else f"C{k}" for k, peer in enumerate(peers)}
    for column, name in enumerate(names):
        drawn = [r for r in rows if r["kind"] == "curve" and r["task"] == name and r.get("upper")]
        for r in drawn:
            peer, method = r["peer"], r["method"]
            label = f"{peer} {method}"
            style: dict[str, Any] = {"markersize": 4, "label": label, "color": colors[peer]}
            own = [m for p, m in labels if p == peer]
            style |= {"marker": "osv^DPX"[own.index(method) % 7]}
            style |= {"linewidth": 2.2, "zorder": 3} if peer == "ours" else {"linewidth": 1.0}
            axes[0][column].plot(r["cpu"], r["upper"], **style)
            calls = CALLS.get(r["family"].split(",")[0])
            if calls:
                axes[1][column].plot([calls * s for s in r["step"]], r["upper"], **style)
        axes[0][column].set(title=name, xscale="log", xlabel="CPU seconds")
        axes[1][column].set(xscale="log", xlabel="oracle calls")
        for line in (axes[0][column], axes[1][column]):
            line.grid(alpha=0.3)
            line.set_ylabel("upper loss, lower level solved again")
    shown = {h.get_label(): h for ax in axes.flat for h in ax.get_lines()}
    figure.legend(handles=list(shown.values()), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=90)


def _times(mine: list[Row], what: str) -> list[float]:
    return [1e3 * r[what] for r in mine if r["kind"] == "time"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
