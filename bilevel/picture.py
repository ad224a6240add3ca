"""Pictures of results: matplotlib without a display, imported when the first one is drawn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""Paul Tol's bright scheme, told apart also by color-blind readers."""


def figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (7.0, 4.0), dpi: int = 110
) -> Any:
    """An empty figure and its axes, one or an array of them, as `matplotlib.pyplot.subplots` gives.

    Args:
        rows: Of the grid of axes.
        columns: Of the grid of axes.
        size: Width and height, inches.
        dpi: Pixels of an inch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained", dpi=dpi)
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(rows, columns)
    for one in drawn.axes:
        one.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def image(axes: Any, pixels: Any, title: str = "", **options: Any) -> Any:
    """Show a matrix as a gray image without ticks; `options` are those of `imshow`."""
    shown = axes.imshow(pixels, **{"cmap": "gray", "interpolation": "nearest"} | options)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    return shown


def save(drawn: Any, path: Path) -> str:
    """Write a figure as PNG; returns the line that tells where it is."""
    drawn.savefig(path)
    return f"picture: {path}"


def missing() -> list[str]:
    """What to install before pictures can be drawn, nothing if all is there."""
    if find_spec("matplotlib"):
        return []
    return ["pictures need matplotlib; install it with: pip install 'bilevel[examples]'."]
