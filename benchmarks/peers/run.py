"""This library beside others: the same data, the same budgets, in one run.

Run: python benchmarks/peers/run.py   (writes benchmarks/results/peers.jsonl, .md and .png)

Every library runs in its own environment and process on one thread in float64, from the same start,
by gradient descent of the same step, with plain gradient descent on x, so that the hypergradient it
used is the move of x over the step size. Each record is kept in build/peers as soon as it is
there, and the same command goes on where an interrupted one stopped; one that ended starts anew.
Timings are interleaved: each library does a few steps in turn, so that a slow moment of the machine
hits all alike. Nothing else runs beside a library but the start of the next one.

    --prepare          only make the environments
    --fresh            forget what an interrupted run has kept
    --source NAME=DIR  install a library from a folder instead
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import report
import tasks
import torch
from environments import FOLDER, PEERS, ROOT, prepare
from session import COMPILED, Fault, Session

RESULTS = ROOT / "benchmarks" / "results"
INNER, PRODUCTS = 100, 20
LONG, MANY = 2000, 100
"""Inner steps and products of the check that a library is right."""
BUDGET = {"steps": 120, "seconds": 6.0}
"""Of a curve of the outer loss."""
GOAL = 0.6
"""An outer loss of hyper-cleaning, to be reached in as few seconds as can be."""
SCALES = (3.0, 10.0, 30.0)
"""Of the task's step size of x, tried besides 1, so that each library has its best one."""


class Records:
    """A file of JSON lines that is added to, and what is in it by its key."""

    KEY = ("kind", "task", "peer", "method", "inner", "repeat", "scale")

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]
        self._keys = {self._key(row) for row in self.rows}

    def has(self, **row: Any) -> bool:
        return self._key(row) in self._keys

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self._keys.add(self._key(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def drop(self, which: Callable[[dict[str, Any]], bool]) -> None:
        """Forget the rows that are meant."""
        self.rows = [row for row in self.rows if not which(row)]
        self._keys = {self._key(row) for row in self.rows}
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        self.path.with_suffix(".new").write_text(text)
        self.path.with_suffix(".new").replace(self.path)

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.KEY)


class Harness:
    """One run over the libraries and tasks.

    Args:
        records: What is known already; grows.
        peers: The libraries that could be installed.
        repeats: Of every timing.
        solvers: Processes that solve the lower level again, while no library runs.
    """

    def __init__(
        self, records: Records, peers: list[str], repeats: int, solvers: ProcessPoolExecutor
    ) -> None:
        self.records, self.peers, self.repeats = records, peers, repeats
        self.solvers = solvers
        self.methods: dict[str, dict[str, str]] = {}
        for peer in peers:
            shown = list(PEERS[peer].shown) if peer in PEERS else ["torch"]
            try:
                with Session(peer) as session:
                    about = session.ask("about", packages=shown)
            except Fault as fault:
                self._note(kind="peer", peer=peer, fault=str(fault))
                continue
            self.methods[peer] = about["methods"]
            lines = user_lines(peer)
            self._note(kind="peer", peer=peer, versions=about["versions"], lines=lines)

    def task(self, name: str) -> None:
        """All records of a task."""
        path = tasks.write(name, FOLDER / "data")
        exact = _Lazy(path)
        rows = [
            {"task": name, "peer": peer, "method": method, "family": family}
            for peer, methods in self.methods.items()
            for method, family in methods.items()
        ]
        for row, session in _ahead([row for row in rows if not self._done(row)]):
            self._check(session, path, exact, row)  # first, for the memory
            self._curve(session, path, row)
            if name == "cleaning":
                self._goals(session, path, row)
        if name == "cleaning":
            for peer in self.methods:
                if not self.records.has(kind="script", peer=peer):
                    self._script(peer, path)
        self._times(name, path)

    def _done(self, row: dict[str, Any]) -> bool:
        errors = (INNER,) if _large(row["task"]) else (INNER, LONG)
        known = all(self.records.has(kind="error", inner=inner, **row) for inner in errors)
        known &= _flat(row["task"]) or self.records.has(kind="curve", **row)
        scales = SCALES if row["task"] == "cleaning" else ()
        return known and all(self.records.has(kind="goal", scale=s, **row) for s in scales)

    def _check(self, session: Session, path: Path, exact: _Lazy, row: dict[str, Any]) -> None:
        """The error of the hypergradient at x0 after a usual and a very long inner loop."""
        for inner, products in ((INNER, PRODUCTS), (LONG, MANY)):
            if self.records.has(kind="error", inner=inner, **row) or (
                _large(row["task"]) and inner == LONG
            ):
                continue
            found: dict[str, Any] = {}
            try:
                opened = session.ask(
                    "open", path=str(path), method=row["method"], inner=inner, products=products
                )
                stepped = session.ask("step", count=1)
                move = np.subtract(opened["x"], stepped["x"]) / exact.upper_lr
                found = _distance(move, exact.hypergradient) | {"seconds": stepped["wall"]}
                if inner == INNER:
                    found["memory"] = session.ask("memory")["bytes"]
            except Fault as fault:
                found = {"fault": str(fault)}
            self._note(kind="error", inner=inner, **row, **found)

    def _curve(self, session: Session, path: Path, row: dict[str, Any]) -> None:
        """Honest outer losses along a run; the seconds of the first step hold the compilation."""
        if _flat(row["task"]) or self.records.has(kind="curve", **row):
            return
        marks = (9, 60) if row["task"].endswith("-mlp") else (0, 3, 9, 24, 60, 100)
        try:
            given = {"path": str(path), "method": row["method"]}
            session.ask("open", **given, inner=INNER, products=PRODUCTS)
            run = session.ask("curve", **BUDGET)
            last = len(run["x"]) - 1
            kept = sorted({m for m in marks if m < last} | {last})
            upper = list(self.solvers.map(partial(_upper, path), [run["x"][k] for k in kept]))
            found = {"step": [k + 1 for k in kept], "upper": upper}
            found |= {k: [run[k][i] for i in kept] for k in ("cpu", "wall")}
            if row["task"] == "cleaning":
                found["goal"] = _seconds(run, _reached(path, run["x"]))
        except Fault as fault:
            found = {"fault": str(fault)}
        self._note(kind="curve", **row, **found)

    def _goals(self, session: Session, path: Path, row: dict[str, Any]) -> None:
        """Seconds to the goal with larger steps of x."""
        runs: dict[float, Any] = {}
        for scale in (s for s in SCALES if not self.records.has(kind="goal", scale=s, **row)):
            given = {"path": str(path), "method": row["method"], "scale": scale}
            try:
                session.ask("open", **given, inner=INNER, products=PRODUCTS)
                runs[scale] = session.ask("curve", steps=40, seconds=BUDGET["seconds"])
            except Fault as fault:
                self._note(kind="goal", scale=scale, **row, fault=str(fault))
        reached = self.solvers.map(partial(_reached, path), [run["x"] for run in runs.values()])
        for (scale, run), first in zip(runs.items(), reached, strict=True):
            self._note(kind="goal", scale=scale, **row, goal=_seconds(run, first))

    def _script(self, peer: str, path: Path) -> None:
        try:
            with Session(peer) as session:
                x = session.ask("script", path=str(path), steps=20)["x"]
            found: dict[str, Any] = {"upper": _upper(path, x)}
        except Fault as fault:
            found = {"fault": str(fault)}
        self._note(kind="script", peer=peer, **found)

    def _times(self, name: str, path: Path) -> None:
        """Seconds of an outer step, all libraries in turn; one after another where y is large.

        What was not timed whole is timed anew, since only repeats of one round belong together.
        """
        repeats = min(3, self.repeats) if _large(name) else self.repeats
        rows = [(p, m, f) for p, methods in self.methods.items() for m, f in methods.items()]
        rows = [(p, m, f) for p, m, f in rows if not self._faulty(name, p, m)]
        for part in [[row] for row in rows] if _large(name) else [rows]:  # memory is for one
            key = {"kind": "time", "task": name, "repeat": repeats - 1}
            if not all(self.records.has(**key, peer=p, method=m) for p, m, _ in part):
                own = {(p, m) for p, m, _ in part}
                self.records.drop(
                    lambda r, own=own: (
                        (r["kind"], r.get("task")) == ("time", name)
                        and (r["peer"], r["method"]) in own
                    )
                )
                self._interleaved(name, path, part, repeats)
                print(f"{name}: timed {len(part)} rows {repeats} times", flush=True)

    def _interleaved(
        self, name: str, path: Path, rows: list[tuple[str, str, str]], repeats: int
    ) -> None:
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(Session(peer)) for peer, _, _ in rows]
            sessions, counts = {}, {}
            for (peer, method, _), session in zip(rows, started, strict=True):
                session.ask("open", path=str(path), method=method, inner=INNER, products=PRODUCTS)
                session.ask("step", count=1)
                spent = session.ask("step", count=1)["wall"]
                sessions[peer, method] = session
                counts[peer, method] = max(1, min(20, round(0.4 / spent)))
            for repeat in range(repeats):
                for peer, method, family in rows:
                    own = {"kind": "time", "task": name, "peer": peer, "method": method}
                    spent = sessions[peer, method].ask("step", count=counts[peer, method])
                    each = {k: spent[k] / spent["count"] for k in ("cpu", "wall")}
                    self.records.add(**own, repeat=repeat, family=family, **each)

    def _faulty(self, name: str, peer: str, method: str) -> bool:
        return any(
            row.get("fault")
            and (row.get("task"), row["peer"], row.get("method")) == (name, peer, method)
            for row in self.records.rows
            if row["kind"] == "error" and row["inner"] == INNER
        )

    def _note(self, **row: Any) -> None:
        if self.records.has(**row):
            return
        self.records.add(**row)
        told = {k: v for k, v in row.items() if not isinstance(v, list)}
        print(
            " ".join(
                f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items()
            )
        )
        sys.stdout.flush()


def _ahead(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Session]]:
    """Every row with a session of its own, which starts while the one before it works."""
    following: Session | None = None
    for row, after in zip(rows, [*rows[1:], None], strict=False):  # of no rows, too
        session = following or Session(row["peer"])
        following = None if after is None else Session(after["peer"])
        with session:
            yield row, session


@cache
def _exact(path: Path) -> tasks.Exact:
    torch.set_num_threads(1)  # of small sums, which a second thread only slows
    return tasks.Exact(path)


def _upper(path: Path, x: list[float]) -> float:
    """The honest outer loss."""
    return _exact(path).upper(np.asarray(x))


def _reached(path: Path, xs: list[list[float]]) -> int | None:
    """The step from which on the honest loss is at the goal; None if it is not in the end."""
    return _first(lambda k: _upper(path, xs[k]) <= GOAL, len(xs) - 1)


def _seconds(run: dict[str, Any], step: int | None) -> dict[str, float] | None:
    return None if step is None else {k: run[k][step] for k in ("cpu", "wall")}


class _Lazy:
    """The exact hypergradient of a task, found when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.upper_lr = _exact(path).task.upper_lr
        self._known: np.ndarray | None = None

    @property
    def hypergradient(self) -> np.ndarray:
        if self._known is None:
            self._known = _exact(self._path).hypergradient()
        return self._known


def _large(task: str) -> bool:
    return task == "quadratic-1000000"


def _flat(task: str) -> bool:
    """Whether its outer loss is not worth a curve."""
    return task.startswith("quadratic")


def user_lines(peer: str) -> int:
    """Lines between the marks of a library's file that are neither empty nor a comment."""
    text = (Path(__file__).parent / f"{peer}.py").read_text()
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith("# user: begin"))
    last = next(i for i, line in enumerate(lines) if line.endswith("# user: end"))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") for line in lines[first : last + 1]
    )


def _distance(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    size, true = float(np.linalg.norm(found)), float(np.linalg.norm(exact))
    cosine = float(found @ exact) / max(size * true, 1e-300)
    return {"error": float(np.linalg.norm(found - exact)) / true, "cosine": cosine}


def _first(holds: Any, last: int) -> int | None:
    """The first of 0..last for which `holds`, where it holds ever after; None if for none."""
    if last < 0 or not holds(last):
        return None
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def machine() -> dict[str, Any]:
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": (models or [platform.machine()])[0],
        "cores": len(models),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=list(tasks.TASKS))
    parser.add_argument("--peers", nargs="+", default=["ours", *PEERS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers")
    options = parser.parse_args()
    sources = dict(source.split("=", 1) for source in options.source)
    faults = {name: prepare(name, sources) for name in options.peers}
    for name, fault in faults.items():
        print(f"{name}: {fault or 'installed'}", flush=True)
    if options.prepare:
        return
    path = FOLDER / f"{options.out.name}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    records = Records(path)
    if not records.has(kind="machine"):
        shutil.rmtree(COMPILED, ignore_errors=True)
        records.add(kind="machine", **machine())
    for name, fault in faults.items():
        if fault and not records.has(kind="peer", peer=name):
            records.add(kind="peer", peer=name, fault=f"cannot be installed: {fault}")
    usable = [name for name, fault in faults.items() if not fault]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as solvers:
        harness = Harness(records, usable, options.repeats, solvers)
        for name in options.tasks:
            harness.task(name)
    report.write(records.rows, options.out)
    shutil.move(path, options.out.with_suffix(".jsonl"))


if __name__ == "__main__":
    main()
