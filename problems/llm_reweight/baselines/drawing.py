"""The comparison as a picture: gain over uniform with its interval, and what the search cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bilevel import picture


def draw(body: dict[str, Any], path: Path) -> str:
    """Write a comparison as PNG, best method on top; returns the line that tells where it is."""
    rows = body["rows"][::-1]
    drawn, (left, right) = picture.figure(1, 2, size=(10.0, 1.4 + 0.34 * len(rows)))
    places = range(len(rows))
    base = next(row["loss"] for row in rows if row["method"] == "uniform")
    for place, row in enumerate(rows):
        low, high = (base - end for end in row["interval"][::-1])
        color = picture.COLORS[1] if row["method"] == "learned" else picture.COLORS[0]
        if math.isfinite(low):
            left.plot([low, high], [place, place], color=color, linewidth=1.5)
        left.plot(row["loss"], place, "o", color=color, markersize=6)
        losses = [seed["loss"] for seed in row["seeds"]]
        left.plot(losses, [place] * len(losses), "|", color="#888888", markersize=7)
        right.barh(place, row["search_tokens"] / 1e3, color=color)
    for axes in (left, right):
        axes.set_ylim(-0.7, len(rows) - 0.3)
    left.axvline(base, color="black", linestyle=":", linewidth=1)
    left.set_yticks(places, [row["method"].replace("$", r"\$") for row in rows])
    left.set_xlabel(
        "test loss, nats per token; line: 95 % interval of\nthe pairs with uniform (dotted)"
    )
    right.axvline(body["budget_tokens"] / 1e3, color="black", linestyle=":", linewidth=1)
    right.set_yticks([])
    right.set_xlabel("tokens of the search, thousands; dotted: budget")
    return picture.save(drawn, path)
