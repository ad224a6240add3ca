"""The folder of a run: where it lies, whose it is, and the results in it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bilevel import checkpoint, fields
from bilevel.errors import InputError
from bilevel.options import KINDS, Options, Settings
from bilevel.result import Result

MOVES = ("offload", "stepping")
"""Options of a memory strategy that say where or in what order, not what; they may change."""


def place(options: Options) -> Path:
    """The folder to write into; nothing is written yet.

    Raises:
        InputError: If it cannot be written, or holds anything but this run or its beginning.
    """
    label, settings = options.names["problem"].replace(":", "-"), options.settings
    out = Path(settings.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{label}")
    try:
        parent = next(p for p in [out, *out.absolute().parents] if p.exists())
        if not parent.is_dir():
            raise InputError(f"out={out}: {parent} is a file, expected a folder; choose another.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"out={out} cannot be written: no permission on {parent}.")
        if not out.is_dir() or all(path.name.startswith(".") for path in out.iterdir()):
            return out
        identity = out / "fingerprint.json"
        if settings.resume == "never" or not identity.exists():
            auto = settings.resume == "auto"
            more = "." if auto else ", or resume=auto to go on with it."
            raise InputError(f"out={out} already holds files; choose another folder{more}")
        saved = json.loads(identity.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"out={out} cannot be used: {error}; choose another.") from None
    other = checkpoint.differences(saved, fingerprint(options))
    if other:
        raise InputError(
            f"out={out} holds a run with other settings or data ({'; '.join(other)}); choose "
            "another folder, or give what that run was given."
        )
    newest = (checkpoint.latest(own / "checkpoints") for own in folders(out, settings).values())
    done = max(map(checkpoint.step_of, newest))
    if done > settings.steps:
        raise InputError(
            f"out={out} holds a run of {done} steps already, more than steps={settings.steps}; "
            f"give steps={done} or more, or another folder."
        )
    return out


def claim(out: Path, options: Options, words: Sequence[str] = ()) -> Path:
    """Make the folder, one of its own for a run without out=, and write what identifies the run.

    In its config.yaml paths hold from any folder; a comment has the `words` as they were given.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        label = out.name
        free = (out.with_name(f"{label}-{i}") for i in range(2, 1000))
        while not options.settings.out and _taken(out):
            out = next(free)
        out.mkdir(exist_ok=True)
        identity = json.dumps(fingerprint(options), indent=1)
        checkpoint.replace_text(out / "fingerprint.json", identity)
        body: dict[str, Any] = dataclasses.asdict(options.settings)
        body["out"] = body["out"] and os.path.abspath(body["out"])
        parts = {kind: getattr(options, kind) for kind in KINDS}
        parts |= {"problem": options.problem.rooted(), "launcher": options.launcher.rooted()}
        for kind, part in parts.items():
            own = dataclasses.asdict(part)
            body[kind] = {"name": options.names[kind]} | {k: _plain(v) for k, v in own.items()}
        text = _as_given(words) + yaml.safe_dump(body, sort_keys=False)
        checkpoint.replace_text(out / "config.yaml", text)
    except (OSError, ValueError) as error:  # a ValueError for a name with a null byte
        raise InputError(f"out={out} cannot be written: {error}; choose another.") from None
    return out


def _as_given(words: Sequence[str]) -> str:
    """The words of a command line and the folder they were given in, as comments."""
    if not words:
        return ""
    said = f"Given in {os.getcwd()}:\n{shlex.join(words)}"
    plain = said.encode("utf-8", "backslashreplace").decode()  # no half of a surrogate pair
    return "".join(f"# {line}\n" for line in plain.splitlines())


def options_of(out: Path) -> dict[str, Any]:
    """The options that `claim` wrote."""
    return yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))


def _taken(out: Path) -> bool:
    try:
        out.mkdir()
    except FileExistsError:
        return True
    return False


def fingerprint(options: Options) -> dict[str, Any]:
    """What another run must share with this one to go on from it."""
    flat: dict[str, Any] = {k: v for k, v in options.names.items() if k != "launcher"}
    for kind in ("solver", "memory"):
        part = getattr(options, kind)
        names = [f.name for f in dataclasses.fields(part) if f.name not in MOVES]
        flat |= {f"{kind}.{name}": getattr(part, name) for name in names}
    flat |= {f"problem.{k}": v for k, v in options.problem.fingerprint().items()}
    flat |= {"seed": options.settings.seed}
    flat |= {"seeds": "several" if options.settings.seeds > 1 else "one"}  # how many may change
    return json.loads(json.dumps(flat, default=str))


def _plain(value: Any) -> Any:
    """A field's value as YAML can hold it and `fields.read` reads it."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else fields.written(value)


def folders(out: Path, settings: Settings) -> dict[int, Path]:
    """The folder of each seed: that of the run for one alone."""
    if settings.seeds == 1:
        return {settings.seed: out}
    seeds = range(settings.seed, settings.seed + settings.seeds)
    return {seed: out / f"seed-{seed}" for seed in seeds}


def write_result(out: Path, result: Result) -> None:
    """The summary of one search, or of several, and the rows of one."""
    body = _summary(result)
    if result.repeats:
        body["repeats"] = [_summary(repeat) for repeat in result.repeats]
    else:
        rows = "".join(json.dumps(row) + "\n" for row in result.history)
        checkpoint.replace_text(out / "trajectory.jsonl", rows)
    checkpoint.replace_text(out / "result.json", json.dumps(body, indent=1))


def _summary(result: Result) -> dict[str, Any]:
    body = {"status": result.status.name, "message": result.message, "nit": result.nit}
    losses = {"upper": result.upper, "lower": result.lower}
    body |= {k: v if math.isfinite(v) else None for k, v in losses.items()}
    return body | {"counts": result.counts}
