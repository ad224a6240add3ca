"""Plots as PNG and one self-contained HTML page; every text from data is escaped."""

from __future__ import annotations

import base64
import json
import math
import shlex
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bilevel import picture

LINES = 9
"""Sources drawn in a color of their own; the others are gray. Matplotlib has ten colors."""
POINTS = 500
"""Steps of a path that are drawn at most: more cannot be told apart."""
JUDGES = ("the learned mixture", "no evidence")
"""How the sentence of a verdict begins that judges; it is put first."""
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei")
FONTS += ("Droid Sans Fallback", "IPAGothic", "PingFang SC", "Hiragino Sans", "Microsoft YaHei")
FONTS += ("Malgun Gothic", "Arial Unicode MS")
"""Fonts with Chinese, Japanese or Korean letters, used where one is installed."""
TOOLS = ("mixed", "llamafactory", "axolotl", "trl", "hf")
"""Exports whose commands are shown; the tool itself names all."""

Histories = Sequence[Sequence[dict[str, Any]]]
"""A history for each seed."""
Line = tuple[list[int], list[float]]
"""Steps and values."""


def write(
    body: dict[str, Any],
    history: Sequence[dict[str, Any]],
    out: Path,
    *,
    compared: bool = True,
) -> None:
    """Write plots/*.png and report.html into `out`; `compared` if its comparison is of this run.

    What the folder holds beside is shown too: the histories and the resources of several seeds,
    comparison.json, plan.json, and what was exported.
    """
    from jinja2 import Environment

    histories = [rows for rows in _each(out, "trajectory.jsonl") if rows] or [history]
    resources = [rows for rows in _each(out, "resources.jsonl") if rows]
    plan = _json(out / "plan.json")
    (out / "plots").mkdir(exist_ok=True)
    images = _images(body, histories, resources, plan, out / "plots")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    sentences = (body.get("verdict") or {}).get("sentences", [])
    shown = {
        "body": body,
        "images": images,
        "sentences": sorted(sentences, key=lambda s: not s.startswith(JUDGES)),
        "several": len(histories) > 1,
        "comparison": _json(out / "comparison.json") if compared else None,
        "plan": plan and _planned(plan, resources),
        "used": _used(resources),
        "commands": _commands(body, out),
        "number": _number,
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(shown)
    (out / "report.html").write_text(page, encoding="utf-8")


def _each(out: Path, name: str) -> list[list[dict[str, Any]]]:
    """The rows of a file in the folder of each seed, or in that of the run."""
    folders = [p for p in sorted(out.glob("seed-*")) if (p / name).exists()]
    found = []
    for folder in folders or [out]:
        path = folder / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found.append([json.loads(line) for line in text.splitlines()])
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _images(
    body: dict[str, Any], histories: Histories, resources: Histories, plan: Any, folder: Path
) -> list[dict[str, str]]:
    """Every plot with its title and what is to be seen in it."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in FONTS if name in there)]
    band = "; the band is from the lowest to the highest seed" if len(histories) > 1 else ""
    with matplotlib.rc_context({"font.family": fonts}):
        found = [
            (
                "Weights over steps",
                f"Mean over seeds{band}." * bool(band),
                _weights(histories, folder),
            ),
            ("Final weights", "", _bars(body, folder)),
        ]
        if any("losses" in row for row in histories[0]):
            words = f"Mean loss of the rows of each source in a batch, at y, smoothed{band}."
            found.append(("Losses of the sources", words, _sources(histories, folder)))
        words = f"At the batch of each step, smoothed{band}."
        found.append(("Target and sources", words, _losses(histories, folder)))
        if (body.get("verdict") or {}).get("losses"):
            words = "Test loss of models trained afresh; a dot for each seed, a bar for their mean."
            found.append(("Target loss against uniform", words, _verdict(body["verdict"], folder)))
        if resources:
            found.append(("Memory over the run", "", _memory(resources, plan, folder)))
    return [
        {
            "title": title,
            "words": words,
            "data": base64.b64encode(path.read_bytes()).decode(),
        }
        for title, words, path in found
    ]


def _figure(*, width: float = 5.6, height: float = 3.6) -> tuple[Any, Any]:
    """A figure whose letters can be read at the width of a phone."""
    return picture.figure(size=(width, height), dpi=140)


def _weights(histories: Histories, folder: Path) -> Path:
    paths = {n: _paths(histories, "weights", n) for n in histories[-1][-1]["weights"]}
    figure, axes = _figure(height=4.4)
    _draw(axes, paths, _order(histories))
    axes.axhline(1 / len(paths), color="black", linestyle=":", linewidth=1, label="uniform")
    axes.set(xlabel="step", ylabel="weight", ylim=(0, None))
    return _save(figure, axes, folder / "weights.png")


def _sources(histories: Histories, folder: Path) -> Path:
    order = _order(histories)
    paths = {n: [_smooth(*path) for path in _paths(histories, "losses", n)] for n in order}
    paths = {name: [path for path in own if path[0]] for name, own in paths.items()}
    paths = {name: own for name, own in paths.items() if own}
    figure, axes = _figure(height=4.4)
    _draw(axes, paths, [name for name in order if name in paths])
    axes.set(xlabel="step", ylabel="loss, nats per token")
    return _save(figure, axes, folder / "sources.png")


def _losses(histories: Histories, folder: Path) -> Path:
    figure, axes = _figure()
    targets = histories[0][-1].get("targets", {})
    both = "targets by their weights" if targets else "target"
    keys = {both: ("upper",), "weighted sources": ("lower",)}
    keys |= {f"target {name}": ("targets", name) for name in targets}
    paths = {n: [_smooth(*p) for p in _paths(histories, *own)] for n, own in keys.items()}
    _draw(axes, paths, list(paths))
    axes.set(xlabel="step", ylabel="loss, nats per token")
    return _save(figure, axes, folder / "losses.png")


def _bars(body: dict[str, Any], folder: Path) -> Path:
    sources = body["sources"][::-1]
    figure, axes = _figure(height=max(2.5, 1.3 + 0.28 * len(sources)))
    names = [_plain(s["name"]) for s in sources]
    total = sum(s["records"] for s in sources)
    places = range(len(sources))
    spread = [s.get("weight_std") or 0.0 for s in sources]
    bars = {"xerr": spread, "ecolor": "#222222", "capsize": 2} if any(spread) else {}
    axes.barh(places, [s["weight"] for s in sources], color="#4477aa", label="learned", **bars)
    sizes = [s["records"] / total for s in sources]
    axes.plot(sizes, places, "k|", markersize=14, label="size-proportional")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="weight", ylim=(-0.7, len(sources) - 0.3), xlim=(0, None))
    return _save(figure, axes, folder / "bars.png")


def _verdict(verdict: dict[str, Any], folder: Path) -> Path:
    losses = {name: values for name, values in verdict["losses"].items() if values}
    figure, axes = _figure(height=max(2.2, 1.2 + 0.35 * len(losses)))
    for place, values in enumerate(reversed(losses.values())):
        axes.plot(values, [place] * len(values), "o", color="#4477aa", alpha=0.7)
        axes.plot([math.fsum(values) / len(values)], [place], "k|", markersize=16)
    axes.set_yticks(range(len(losses)), [_plain(name) for name in reversed(losses)])
    axes.set(xlabel="test loss, nats per token", ylim=(-0.6, len(losses) - 0.4))
    return _save(figure, axes, folder / "verdict.png")


def _memory(resources: Histories, plan: Any, folder: Path) -> Path:
    figure, axes = _figure()
    names = {"resident": "process", "device": "GPU", "device_peak": "GPU, peak", "peak": "peak"}
    for key, label in names.items():
        for i, rows in enumerate(resources):
            path = [(row["step"], row[key] / 1e9) for row in rows if key in row]
            if path:
                style = {"color": f"C{list(names).index(key)}", "label": label if not i else None}
                axes.plot(*zip(*path[:: max(1, len(path) // POINTS)], strict=True), **style)
    total = (plan or {}).get("footprint", {}).get("total")
    if total and plan.get("here"):
        axes.axhline(total / 1e9, color="black", linestyle=":", linewidth=1, label="planned")
    axes.set(xlabel="step", ylabel="memory, GB", ylim=(0, None))
    return _save(figure, axes, folder / "memory.png")


def _order(histories: Histories) -> list[str]:
    """The sources by their weight at the end, the largest first."""
    last = [rows[-1]["weights"] for rows in histories]
    return sorted(last[0], key=lambda name: -math.fsum(weights[name] for weights in last))


def _paths(histories: Histories, *keys: str) -> list[Line]:
    """Steps and values of one number in every history, where it is known."""
    found = []
    for history in histories:
        steps, values = [], []
        for row in history[:: max(1, len(history) // POINTS)]:
            value: Any = row
            for key in keys:
                value = (value or {}).get(key)
            if value is not None:
                steps.append(row["step"])
                values.append(value)
        found.append((steps, values))
    return found


def _smooth(steps: list[int], values: list[float], *, windows: int = 25) -> Line:
    """Means over up to `windows` neighbors, since a batch is small."""
    half = min(windows, max(1, len(values) // 10)) // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return steps, [math.fsum(span) / len(span) for span in spans]


def _mean(paths: list[Line]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all paths have, with the mean, the least and the most."""
    columns = [dict(zip(*path, strict=True)) for path in paths]
    steps = sorted(set.intersection(*(set(column) for column in columns)))
    rows = [[column[step] for column in columns] for step in steps]
    return (
        steps,
        [math.fsum(row) / len(row) for row in rows],
        [min(row) for row in rows],
        [max(row) for row in rows],
    )


def _draw(axes: Any, paths: dict[str, list[Line]], order: list[str]) -> None:
    """A line for each name, with a band over the seeds; those after the first few in gray."""
    for i, name in enumerate(order[LINES:]):
        steps, means, _, _ = _mean(paths[name])
        label = f"{len(order) - LINES} others" if i == 0 else None
        axes.plot(steps, means, color="#bbbbbb", linewidth=1, label=label)
    for name in order[:LINES]:
        steps, means, low, high = _mean(paths[name])
        (line,) = axes.plot(steps, means, label=_plain(name))
        if len(paths[name]) > 1:
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        most = max(map(len, labels))
        figure.legend(
            handles, labels, frameon=False, loc="outside lower center", ncols=2 + (most < 16)
        )
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # glyphs no font here has
        figure.savefig(path)
    return path


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _plain(name: str) -> str:
    """A name on one line that fits, and that matplotlib takes neither as formula nor as hidden."""
    text = " ".join(name.split())
    text = text if len(text) <= 28 else text[:27] + "\u2026"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _used(resources: Histories) -> dict[str, Any]:
    """What all seeds together took."""
    last = [rows[-1] for rows in resources]
    if not last:
        return {}
    key = "device_peak" if "device_peak" in last[-1] else "peak"
    peaks = [row[key] for row in last if key in row]
    return {"seconds": sum(row["seconds"] for row in last), "peak": max(peaks, default=0)}


def _planned(plan: dict[str, Any], resources: Histories) -> dict[str, Any]:
    """Of a plan what a reader wants to see."""
    found = plan["footprint"]
    parts = {k: v for k, v in found["moments"][found["peak"]].items() if v}
    return {**plan, "parts": parts, "when": found["peak"], "total": found["total"]}


def _commands(body: dict[str, Any], out: Path) -> list[str]:
    """Command lines that make training files of the weights."""
    if find_spec("bilevel.export") is None:
        return []
    total = sum(source["records"] for source in body["sources"])
    run = shlex.quote(str(out))
    return [f"python -m bilevel.export {run} --to {tool} --total {total}" for tool in TOOLS]
