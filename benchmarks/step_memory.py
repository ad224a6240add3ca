"""Peak memory of LoRA twins against one LoRA fine-tune, as `step_cost.py` measures it.

Each figure comes from a process of its own, which prints it: the bytes of tensors alive at the peak
of a step, counted as storages are made and freed, and the most that the process ever held, with
what it held before the model in a column of its own. Counting takes time and memory, so the two
are never measured in one process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bilevel
from bilevel.storage import LiveStorage
from bilevel.tracking import memory as memory_used

SIZES = {"layers": 8, "width": 512, "rows": 8, "length": 64}
STEPS = 3
KINDS = {"one LoRA fine-tune": "one", "LoRA twins": "twins"}


def table(repeats: int) -> list[dict[str, Any]]:
    """A row for each kind; the peaks of processes are medians."""
    rows = []
    for name, kind in KINDS.items():
        counted = _child(kind, "counted")
        peaks = [_child(kind, "process") for _ in range(repeats)]
        rows.append({"case": name, "tensors MB": counted["tensors"] / 1e6})
        for key in ("peak", "before"):
            rows[-1][f"{key} MB"] = statistics.median(found[key] for found in peaks) / 1e6
    first = rows[0]
    for row in rows:
        row["tensors ratio"] = row["tensors MB"] / first["tensors MB"]
        row["peak ratio"] = row["peak MB"] / first["peak MB"]
        grown, least = (r["peak MB"] - r["before MB"] for r in (row, first))
        row["peak less before ratio"] = grown / least
    return rows


def _child(kind: str, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, kind, what]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Counted(TorchDispatchMode):
    """Within the block, the bytes of all storages that operations make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = LiveStorage()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.storage.count(tensor)
        return out


def measure(kind: str, what: str) -> dict[str, float]:
    """The bytes of one process that takes a few steps."""
    import peft.tuners.lora  # noqa: F401 - what is imported counts as held before
    import step_cost
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    options, lora = Namespace(**SIZES), bilevel.LoRA()
    before = memory_used()["resident"]
    counted = Counted()

    def steps() -> None:
        rows = options.rows
        if kind == "one":
            step = step_cost.by_hand(options, lora, [("y", rows)])
        else:
            step = step_cost.ours(options, rows // 4, lora)
        for _ in range(STEPS):
            step()

    if what == "counted":
        with counted:
            steps()
        return {"tensors": counted.storage.peak}
    steps()
    return {"before": before, "peak": memory_used()["peak"]}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
