"""One library on one task, in its own environment: reads commands, answers in JSON lines.

Started by `run.py` as `python -P worker.py NAME`; loads NAME.py from this folder under another
name, so that a library may be called as its file. That file has METHODS, oracle calls of a step by
method; start(task, method, inner, products), a run; and script(...), a user's hyper-cleaning.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def module(name: str) -> Any:
    """A file of this folder, as a module that shadows no library."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


class Worker:
    """The state between commands: the library's file, the task, the run."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer

    def about(self, packages: list[str]) -> dict[str, Any]:
        found = {}
        for name in packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return {"methods": self.peer.METHODS, "versions": found}

    def open(
        self, path: str, method: str, inner: int, products: int, scale: float = 1.0
    ) -> dict[str, Any]:
        """A new run at the task's start, with `scale` times the task's step size of x."""
        self.task = self.peer.load(path)
        self.task.options["upper_lr"] *= scale
        self.held = _memory("VmRSS")
        self.run = self.peer.start(self.task, method, inner, products)
        return {"x": self.run.x().tolist()}

    def step(self, count: int) -> dict[str, Any]:
        """So many outer steps, timed together."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.run.step()
        x = self.run.x()
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        return {**seconds, "count": count, "x": x.tolist()}

    def curve(self, steps: int, seconds: float) -> dict[str, Any]:
        """Every x of a run and the seconds spent until it had it."""
        found: dict[str, list[Any]] = {"cpu": [], "wall": [], "x": []}
        cpu = wall = 0.0
        while len(found["x"]) < steps and wall < seconds:
            here = self.step(1)
            if not np.isfinite(here["x"]).all():
                break
            cpu, wall = cpu + here["cpu"], wall + here["wall"]
            for name, value in (("cpu", cpu), ("wall", wall), ("x", here["x"])):
                found[name].append(value)
        return found

    def memory(self) -> dict[str, Any]:
        """The peak of one more step over what was there before the run."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return {"bytes": None}
        self.run.step()
        self.run.x()
        return {"bytes": max(0, _memory("VmHWM") - self.held)}

    def script(self, path: str, steps: int) -> dict[str, Any]:
        """What the user's script finds, and its lines."""
        task = self.peer.load(path)
        names = ("train", "labels", "valid", "valid_labels")
        x = self.peer.script(*(task.data[n] for n in names), task.lower_lr, steps)
        return {"x": np.asarray(x).tolist()}


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return 0


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes with the errors
    sys.path.append(str(HERE))  # last, for losses.py
    worker = Worker(module(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # any fault of a library becomes its row
            answer = {"fault": f"{type(error).__name__}: {error}"[:500]}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
