"""Where benchmark results go: one JSON and one Markdown table each, with machine and command."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bilevel.markdown import table

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The machine and the version of torch, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    return (
        f"{platform.machine()}, {cores} cores, {device}, torch {torch.__version__}, python {python}"
    )


def write(
    name: str,
    title: str,
    notes: Sequence[str],
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    *,
    script: str = "",
) -> None:
    """Write results/`name`.json with all of it, .md with `columns` of the rows; print the table.

    `script` is the benchmark's own name where it writes several results.
    """
    print(save(name, title, notes, rows, columns, script=script))


def save(
    name: str,
    title: str,
    notes: Sequence[str],
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    *,
    folder: Path = RESULTS,
    script: str = "",
) -> str:
    """Write `name`.json with all of it and .md with `columns` of the rows; returns the latter."""
    command = " ".join(["python", f"benchmarks/{script or name}.py", *sys.argv[1:]])
    folder.mkdir(parents=True, exist_ok=True)
    body = {"command": command, "machine": machine(), "notes": list(notes), "rows": list(rows)}
    (folder / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")
    lines = [f"# {title}", "", f"`{command}`; {machine()}.", "", *notes, ""]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    lines += table(columns, [[_cell(row.get(c)) for c in columns] for row in rows])
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.md").write_text(text)
    return text


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
