"""Each library in a virtual environment of its own, so that nothing of it becomes a dependency."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peers"
PATIENCE = 900  # seconds for one installation


@dataclass(frozen=True)
class Peer:
    """What pip is told, line by line; `shown` are the packages whose versions are told."""

    installs: tuple[str, ...]
    shown: tuple[str, ...]
    note: str = ""


def _torch() -> str:
    lines = (ROOT / "constraints.txt").read_text().split()
    return next(line for line in lines if line.startswith("torch=="))


PEERS = {
    "betty": Peer(
        (
            "{torch}",
            "--no-deps --ignore-requires-python betty-ml==0.2.1",
            "numpy",
        ),
        ("betty-ml", "torch"),
        "declares Python below 3.11, which is overruled",
    ),
    "torchopt": Peer(
        ("{torch}", "--no-deps torchopt==0.7.3", "numpy optree graphviz"), ("torchopt", "torch")
    ),
    "higher": Peer(("{torch}", "--no-deps higher==0.2.1", "numpy"), ("higher", "torch")),
    "hypertorch": Peer(
        ("{torch}", "--no-deps {source}", "numpy"),
        ("hypergrad", "torch"),
        "not on PyPI: from its repository",
    ),
    "boat": Peer(
        (
            "{torch}",
            "--no-deps boat-torch==1.1.1 higher==0.2.1",
            "numpy matplotlib",
        ),
        ("boat-torch", "torch"),
        "pins numpy 1, which is overruled",
    ),
    "jaxopt": Peer(("jax jaxlib jaxopt==0.8.5",), ("jaxopt", "jax")),
}
SOURCES = {"hypertorch": "git+https://github.com/prolearner/hypertorch@6241dfa"}


def interpreter(name: str) -> Path:
    """The Python of a library's environment; that of this process for ours."""
    return Path(sys.executable) if name == "ours" else FOLDER / name / "bin" / "python"


def prepare(name: str, sources: dict[str, str]) -> str:
    """Make a library's environment if it is not there; the reason if it cannot be made.

    Args:
        name: The library.
        sources: Where to install a library from instead, by its name: a folder or an address.
    """
    ready = FOLDER / name / "ready.json"
    if name == "ours" or ready.exists():
        return ""
    peer, source = PEERS[name], sources.get(name, SOURCES.get(name, ""))
    FOLDER.mkdir(parents=True, exist_ok=True)
    fault = _run([sys.executable, "-m", "venv", "--clear", str(FOLDER / name)])
    for line in peer.installs:
        words = line.format(torch=_torch(), source=source).split()
        pip = [str(interpreter(name)), "-m", "pip", "--disable-pip-version-check"]
        fault = fault or _run([*pip, "install", "--quiet", *words])
    if not fault:
        ready.write_text(json.dumps({"installs": peer.installs, "source": source}))
    return fault


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"took longer than {PATIENCE} s: {' '.join(command[-3:])}"
    if done.returncode == 0:
        return ""
    told = done.stderr.splitlines()
    lines = [line for mark in ("fatal:", "ERROR:") for line in told if mark in line]
    return (lines or told or [f"exit {done.returncode}"])[0].strip()[:300]
