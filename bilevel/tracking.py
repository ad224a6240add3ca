"""What a run tells while it runs: its rows as files, and trackers by name, offline unless asked."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

Tracker = Literal["tensorboard", "wandb", "trackio"]
ROWS = "trajectory.jsonl"
RESOURCES = "resources.jsonl"
PROJECT = "bilevel"


def missing(names: Sequence[str]) -> list[str]:
    """A sentence for each tracker that is not installed."""
    return [
        f"track={name} needs the package {name}; install it with: pip install 'bilevel[track]', or "
        f"pip install {name}."
        for name in names
        if (spec := find_spec(name)) is None or spec.origin is None  # a folder of that name
    ]


class Watch:
    """A callback that appends every step's record to files in `out` and to trackers.

    `trajectory.jsonl` has the records; `resources.jsonl` the seconds since the start and the bytes
    of memory, which no two runs share. A run that goes on first drops what it will do again. A file
    or tracker that fails is left out from then on, with a warning: it never ends a run.

    Args:
        out: The run's folder.
        done: Steps done before, of a run that goes on.
        track: Names of trackers.
        options: Of the run, as nested dicts.
    """

    def __init__(
        self, out: Path, *, done: int = 0, track: Sequence[str] = (), options: Any = None
    ) -> None:
        self.out, self.done, self.track, self.options = out, done, track, options or {}
        self.sinks: dict[str, Any] = {}
        self.start = time.perf_counter()

    def __enter__(self) -> Watch:
        self.sinks = {name: _Lines(self.out / name, self.done) for name in (ROWS, RESOURCES)}
        self.start -= self.sinks[RESOURCES].last.get("seconds", 0.0)
        for name in dict.fromkeys(self.track):
            self._try(name, self._start)
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self.sinks):
            self._try(name, lambda name: self.sinks[name].close())

    def __call__(self, state: Any, record: dict[str, Any]) -> None:
        if not self.sinks:
            return
        used = {"seconds": round(time.perf_counter() - self.start, 3)} | memory()
        for name in list(self.sinks):
            row = {"step": record["step"], **used} if name == RESOURCES else record
            if name in TRACKERS:
                row = flat(record) | flat({"resources": used})
            self._try(name, lambda name, row=row: self.sinks[name].log(row, record["step"]))

    def _start(self, name: str) -> None:
        self.sinks[name] = TRACKERS[name](self.out, self.done, self.options)

    def _try(self, name: str, action: Callable[[str], None]) -> None:
        try:
            action(name)
        except Exception as error:  # a tracker raises what it likes
            self.sinks.pop(name, None)
            _warn(f"{name} failed and is left out from now on: {_words(error)}")


def memory() -> dict[str, int]:
    """Bytes that this process holds and the most it ever held, in host memory and on its GPU."""
    found = _resident()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["device"] = torch.cuda.memory_allocated()
        found["device_peak"] = torch.cuda.max_memory_allocated()
    return found


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested record, by keys joined with slashes.

    >>> flat({"step": 1, "weights": {"a b": 0.5}, "note": "x", "bad": float("nan")})
    {'step': 1.0, 'weights/a b': 0.5}
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            found[f"{prefix}{key}"] = float(value)
    return found


class _Sink(ABC):
    """Where rows go."""

    @abstractmethod
    def log(self, row: dict[str, Any], step: int) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class _Lines(_Sink):
    """A file with a line of JSON for each step, whole lines only."""

    def __init__(self, path: Path, done: int) -> None:
        whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        kept = whole[:done]
        path.write_bytes(b"".join(line + b"\n" for line in kept))
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        self.file = path.open("a", encoding="utf-8")

    def log(self, row: dict[str, Any], step: int) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard(_Sink):
    """Event files in `out`/tensorboard; steps that are done again replace the first ones."""

    def __init__(self, out: Path, done: int, options: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
        self.writer.add_text("options", f"```\n{json.dumps(options, indent=1, default=str)}\n```")

    def log(self, row: dict[str, Any], step: int) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WandB(_Sink):
    """A run in `out`/wandb, offline unless WANDB_MODE says otherwise; it never asks for a key."""

    def __init__(self, out: Path, done: int, options: dict[str, Any]) -> None:
        mode = os.environ.get("WANDB_MODE") or "offline"
        path = out / "wandb" / "id.txt"
        known = path.read_text(encoding="utf-8") if path.exists() else None
        own = {"name": out.name, "id": known, "dir": str(out), "config": options}
        try:
            self.run = _wandb(mode, own)
        except Exception as error:
            if mode == "offline":
                raise
            _warn(f"WANDB_MODE={mode} does not work ({_words(error)}); wandb goes on offline.")
            self.run = _wandb("offline", own)
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.run.id, encoding="utf-8")

    def log(self, row: dict[str, Any], step: int) -> None:
        self.run.log(row, step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb(mode: str, own: dict[str, Any]) -> Any:
    """A run, without a question: wandb asks for a key where there is a terminal to answer."""
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb: Any = importlib.import_module("wandb")
    settings = wandb.Settings(console="off", silent=True)
    asked, sys.stdin = sys.stdin, io.StringIO()
    try:
        return wandb.init(project=PROJECT, mode=mode, resume="allow", settings=settings, **own)
    finally:
        sys.stdin = asked


class _Trackio(_Sink):
    """A project in `out`/trackio, or where TRACKIO_DIR says.

    Steps that a run does again after it was killed stand there twice: what it has cannot be taken
    back.
    """

    def __init__(self, out: Path, done: int, options: dict[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((out / "trackio").absolute()))
        with _silent():
            self.trackio: Any = importlib.import_module("trackio")
            self.run = self.trackio.init(
                project=PROJECT, name=out.name, config=options, resume="allow", embed=False
            )

    def log(self, row: dict[str, Any], step: int) -> None:
        self.run.log(row, step=step)

    def close(self) -> None:
        with _silent():
            self.trackio.finish()


TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within the block nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _resident() -> dict[str, int]:
    """From /proc where that is, else the peak alone, else nothing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {k: v for k, _, v in (line.partition(":") for line in lines)}
        kilobytes = {
            n: int(sizes[k].split()[0]) for n, k in (("resident", "VmRSS"), ("peak", "VmHWM"))
        }
        return {name: size * 1024 for name, size in kilobytes.items()}
    except (OSError, KeyError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak if sys.platform == "darwin" else peak * 1024}


def _warn(words: str) -> None:
    logging.getLogger("bilevel").warning(words)
    print(f"warning: {words}", file=sys.stderr, flush=True)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
