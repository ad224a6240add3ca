"""Plots as PNG and one self-contained HTML page; every text from data is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _weights(history: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure()
    steps = [r["step"] for r in history]
    for name in history[0]["weights"]:
        axes.plot(steps, [r["weights"][name] for r in history], label=_plain(name))
    axes.set(xlabel="step", ylabel="weight", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def _losses(history: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure()
    steps = [r["step"] for r in history]
    axes.plot(steps, [r["upper"] for r in history], label="target")
    axes.plot(steps, [r["lower"] for r in history], label="weighted sources")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def _bars(body: dict[str, Any], path: Path) -> Path:
    figure, axes = _figure()
    sources = body["sources"][::-1]
    names = [_plain(s["name"]) for s in sources]
    total = sum(s["records"] for s in sources)
    places = range(len(sources))
    axes.barh(places, [s["weight"] for s in sources], color="#4477aa", label="learned")
    sizes = [s["records"] / total for s in sources]
    axes.plot(sizes, places, "k|", markersize=18, label="size-proportional")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="weight")
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics, and that fits."""
    return text.replace("$", r"\$")[:40]
