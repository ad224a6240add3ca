"""A run's answer for other tools: python -m bilevel.export RUN --to TOOL [--KEY VALUE ...]."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from bilevel import fields, plugins
from bilevel.errors import InputError
from bilevel.problem import Exporter, Problem

USAGE = """usage: python -m bilevel.export RUN --to TOOL[,TOOL...] [--KEY VALUE ...]

  python -m bilevel.export runs/mine --to trl --total 50000
  python -m bilevel.export runs/mine --help       the options, which depend on the run's problem
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 done, 2 wrong input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    asked = "--help" in words or "-h" in words
    words = [word for word in words if word not in ("--help", "-h")]
    if not words:
        print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        run = Path(words[0])
        exporter = find(run)
        if asked:
            print("\n".join(_help(exporter)))
            return 0
        print("\n".join(_filled(exporter, words[1:]).write(run)))
    except InputError as error:
        print("\n".join(f"error: {fault}" for fault in error.faults), file=sys.stderr)
        return 2
    return 0


def find(run: Path) -> Exporter:
    """The exporter of the problem that a folder's run was about.

    Raises:
        InputError: If the folder holds no run, or one of a problem that exports nothing.
    """
    name = _problem_name(run)
    problem = plugins.find("problem", name)()
    exporter = problem.exporter() if isinstance(problem, Problem) else None
    if exporter is None:
        raise InputError(f"problem={name} has nothing to export; llm_reweight has.")
    return exporter


def _problem_name(run: Path) -> str:
    """As config.yaml has it, or the schema of weights.json where that alone was kept."""
    if not run.is_dir():
        raise InputError(f"{run} is no folder; give that of a run, such as runs/mine.")
    try:
        if (run / "config.yaml").exists():
            return str(yaml.safe_load((run / "config.yaml").read_text("utf-8"))["problem"]["name"])
        schema = json.loads((run / "weights.json").read_text("utf-8"))["schema"]
        return str(schema).removeprefix("bilevel.").partition("/")[0]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise InputError(
            f"{run} holds no run: it has neither a config.yaml nor a weights.json that says which "
            "problem it was about."
        ) from None


def _filled(exporter: Exporter, words: Sequence[str]) -> Exporter:
    """The exporter with the options of the words `--key value`, `--key=value` or `key=value`."""
    hints = typing.get_type_hints(type(exporter))
    known = [field.name for field in dataclasses.fields(_dataclass(exporter))]
    faults: list[str] = []
    values: dict[str, Any] = {}
    for key, value in _pairs(words, hints, faults):
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help."
            faults.append(f"unknown option --{key}; {hint}")
        elif key in values:
            faults.append(f"--{key} is given twice; keep one.")
        else:
            try:
                values[key] = fields.read(hints[key], value)
            except ValueError:
                faults.append(f"--{key} must be {fields.describe(hints[key])}, got {value!r}.")
    if faults:
        raise InputError(faults)
    return dataclasses.replace(_dataclass(exporter), **values)


def _pairs(words: Sequence[str], hints: dict[str, Any], faults: list[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    left = list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals and not word.startswith("--"):
            faults.append(f"expected --key value, got {word!r}; see --help.")
            continue
        if not equals and hints.get(key) is bool:
            value = left.pop(0) if left and left[0].lower() in fields.BOOLEANS else "true"
        elif not equals:
            taken = []
            while left and not left[0].startswith("--"):
                taken.append(left.pop(0))
            value = shlex.join(taken) if typing.get_origin(hints.get(key)) else " ".join(taken)
            if not taken:
                faults.append(f"--{key} has no value.")
                continue
        found.append((key, value))
    return found


def _help(exporter: Exporter) -> list[str]:
    docs = fields.documentation(type(exporter))
    lines = [USAGE]
    for field in dataclasses.fields(_dataclass(exporter)):
        hint = typing.get_type_hints(type(exporter))[field.name]
        value = fields.written(getattr(exporter, field.name)) or "none"
        lines.append(f"  --{field.name}  {docs.get(field.name, '')}")
        lines.append(f"      {fields.describe(hint)}; default {value}")
    return lines


def _dataclass(exporter: Exporter) -> Any:
    if not dataclasses.is_dataclass(exporter) or isinstance(exporter, type):
        raise InputError(f"{type(exporter).__name__} must be a dataclass made by a call.")
    return exporter


if __name__ == "__main__":
    sys.exit(main())
