"""Plots as PNG and one self-contained HTML page; every text from data is escaped."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LINES = 9
"""Sources drawn in a color of their own; the others are gray. Matplotlib has ten colors."""


def write(body: dict[str, Any], history: Sequence[dict[str, Any]], out: Path) -> None:
    """Write plots/*.png and report.html into `out`."""
    from jinja2 import Environment

    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    images = [
        ("Weights over steps", _weights(history, folder / "weights.png")),
        ("Losses over steps", _losses(history, folder / "losses.png")),
        ("Final weights", _bars(body, folder / "bars.png")),
    ]
    encoded = [(title, base64.b64encode(path.read_bytes()).decode()) for title, path in images]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template).render(body=body, images=encoded)
    (out / "report.html").write_text(page, encoding="utf-8")


def _figure(*, width: float = 7.0, height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _weights(history: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure(width=8.5)
    steps = [r["step"] for r in history]
    last = history[-1]["weights"]
    largest = sorted(last, key=lambda name: -last[name])[:LINES]
    rest = [name for name in last if name not in largest]
    for i, name in enumerate(rest):
        label = f"{len(rest)} others" if i == 0 else None
        axes.plot(steps, [r["weights"][name] for r in history], color="#bbbbbb", label=label)
    for name in largest:
        axes.plot(steps, [r["weights"][name] for r in history], label=_plain(name))
    axes.axhline(1 / len(last), color="black", linestyle=":", linewidth=1, label="uniform")
    axes.set(xlabel="step", ylabel="weight", ylim=(0, None))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def _losses(history: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure()
    steps = [r["step"] for r in history]
    axes.plot(steps, [r["upper"] for r in history], label="target")
    axes.plot(steps, [r["lower"] for r in history], label="weighted sources")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    return _save(figure, path)


def _bars(body: dict[str, Any], path: Path) -> Path:
    sources = body["sources"][::-1]
    figure, axes = _figure(height=max(2.5, 1.2 + 0.28 * len(sources)))
    names = [_plain(s["name"]) for s in sources]
    total = sum(s["records"] for s in sources)
    places = range(len(sources))
    axes.barh(places, [s["weight"] for s in sources], color="#4477aa", label="learned")
    sizes = [s["records"] / total for s in sources]
    axes.plot(sizes, places, "k|", markersize=14, label="size-proportional")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="weight", ylim=(-0.7, len(sources) - 0.3))
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # glyphs no font here has
        figure.savefig(path)
    return path


def _plain(name: str) -> str:
    """A name on one line that fits, and that matplotlib takes neither as formula nor as hidden."""
    text = " ".join(name.split())
    text = text if len(text) <= 28 else text[:27] + "\u2026"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
