"""A step's record in the few words of the progress line."""

from __future__ import annotations

from typing import Any

from bilevel.problems.llm_reweight import per_example

MOST_SHOWN = 4
"""Targets whose losses are shown, at most."""


def headline(record: dict[str, Any]) -> str:
    """The target loss, the largest weights, and how far those of examples are apart."""
    top = sorted(record["weights"].items(), key=lambda item: -item[1])[:3]
    words = " ".join(f"{name} {weight:.2f}" for name, weight in top)
    if "examples" in record:
        words += f" | examples {per_example.words(record['examples'])}"
    each = {name: loss for name, loss in record.get("targets", {}).items() if loss is not None}
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in [*each.items()][:MOST_SHOWN])
    return f"target loss {record['upper']:.3f}{f' ({shown})' * bool(shown)} | {words}"
