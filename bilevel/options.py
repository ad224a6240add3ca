"""Options: key=value words and YAML files made into the chosen plugins, all faults at once."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
import textwrap
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from bilevel import fields, plugins
from bilevel.check import fit
from bilevel.errors import InputError
from bilevel.fsdp import DDP, FSDP2
from bilevel.launch import Launcher, Single
from bilevel.lora import LoRA
from bilevel.memory import LISA, Full, Memory
from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.tracking import Tracker, missing
from bilevel.zero import DeepSpeed

KINDS = {"problem": Problem, "solver": Solver, "memory": Memory, "launcher": Launcher}
CHOICES: dict[str, dict[str, Any]] = {
    "memory": {"full": Full, "lisa": LISA, "lora": LoRA},
    "launcher": {"single": Single, "ddp": DDP, "fsdp2": FSDP2, "deepspeed": DeepSpeed},
}

Pairs: TypeAlias = list[tuple[str, Any]]
"""Keys with their values, as written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of every run."""

    steps: int = 200
    """Upper steps."""
    seed: int = 0
    """Of start values, batches and drawn blocks."""
    seeds: int = 1
    """How often to repeat the search, with seed, seed + 1, ..., for the spread of the answer."""
    out: str = ""
    """Folder to write into; runs/<time>-<problem> when empty."""
    resume: Literal["auto", "never"] = "auto"
    """Whether to go on from the newest checkpoint in `out`."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    track: tuple[Tracker, ...] = ()
    """Trackers that get every step too, offline unless their own settings say otherwise."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be at least 1, got {name}={getattr(self, name)}."
            for name in ("steps", "seeds", "checkpoint_every")
            if getattr(self, name) < 1
        ]
        if not 0 <= self.seed <= 2**63 - max(1, self.seeds):
            more = f" and seeds={self.seeds}" if self.seeds > 1 else ""
            faults.append(f"seed must be from 0 to 2**63 - 1, got seed={self.seed}{more}.")
        faults += missing(self.track)
        if faults:
            raise InputError(faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The chosen parts of a run, their options filled in; `names` are those of the plugins."""

    names: dict[str, str]
    problem: Problem
    solver: Solver
    memory: Memory
    launcher: Launcher
    settings: Settings


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line; config files come first, its own keys win.

    A key may leave out its part, as `verdict` for `problem.verdict`, where no other part has it.

    Raises:
        InputError: With every fault of keys and values, and what `check` of problem and solver say.
    """
    names, parts, broken, faults = _filled(arguments)
    if "problem" in parts and "problem" not in broken:
        faults += parts["problem"].check()
        if "solver" in parts and "solver" not in broken:
            faults += parts["solver"].check(parts["problem"])
            if not broken and all(kind in parts for kind in KINDS):
                faults += fit(*(parts[kind] for kind in KINDS))
    if faults:
        raise InputError(faults)
    return Options(names=names, **parts)


def read(arguments: Sequence[str]) -> tuple[Options | None, list[str]]:
    """The options of a command line and every fault of keys and values; nothing else is looked at.

    Returns:
        None for the options if a part is unknown; where a value is at fault, the default stands.
    """
    names, parts, _, faults = _filled(arguments)
    whole = all(kind in parts for kind in KINDS)
    return Options(names=names, **parts) if whole else None, faults


def _filled(
    arguments: Sequence[str],
) -> tuple[dict[str, str], dict[str, Any], set[str], list[str]]:
    """The names of the parts, the parts with their options, the broken ones, and all faults."""
    faults: list[str] = []
    given = _given(arguments, faults)
    names, parts = _parts(given, faults)
    table = _table(parts)
    values: dict[str, dict[str, Any]] = {kind: {} for kind in parts}
    broken: set[str] = set()
    for pairs in given:
        seen: dict[str, str] = {}
        for word, value in pairs:
            key = word if word in KINDS else _key(word, table, parts, faults)
            if key in seen:
                more = f" ({seen[key]}= and {word}=)" if seen[key] != word else ""
                faults.append(f"{key} is given twice{more}; keep one.")
            if key is None or key in KINDS or value is None:
                seen |= {key: word} if key else {}
                continue
            seen[key] = word
            kind, name, hint = table[key]
            try:
                values[kind][name] = fields.read(hint, value)
            except ValueError:
                faults.append(f"{key} must be {fields.describe(hint)}, got {value!r}.")
                broken.add(kind)
    for kind, part in parts.items():  # the problem before the solver
        wishes = _wishes(parts["problem"], part) if kind == "solver" and "problem" in parts else {}
        try:
            parts[kind] = dataclasses.replace(part, **(wishes | values[kind]))
        except ValueError as error:
            faults += error.faults if isinstance(error, InputError) else [f"{kind}: {error}"]
            broken.add(kind)
    if {"problem", "solver"} <= parts.keys() and not parts["solver"].parallel:
        parts["problem"] = parts["problem"].precise()
    return names, parts, broken, faults


def help_text(arguments: Sequence[str]) -> str:
    """Every key of the chosen plugins as `key=default`, with its meaning."""
    faults: list[str] = []
    names, parts = _parts(_given(arguments, faults), faults)
    if faults:
        raise InputError(faults)
    indent = 36
    width = max(40, min(100, shutil.get_terminal_size().columns) - indent)
    lines = ["usage: python -m bilevel.run problem=NAME [KEY=VALUE ...] [config=FILE]"]
    docs = {kind: fields.documentation(type(part)) for kind, part in parts.items()}
    for kind in ("settings", *KINDS):
        chosen = (
            parts[kind] if kind in CHOICES or kind not in names else plugins.find(kind, names[kind])
        )
        about = (inspect.getdoc(chosen) or "").partition("\n\n")[0]
        head = f"{kind}={names[kind]}: " if kind in names else ""
        lines += ["", textwrap.fill(head + about, indent + width)]
        for key, (owner, name, hint) in _table(parts).items():
            if owner != kind:
                continue
            text = docs[kind].get(name, "")
            if typing.get_origin(hint) in (Literal, bool):
                text += f" ({fields.describe(hint)})"
            left = f"  {key}={fields.written(getattr(parts[kind], name))}"
            right = textwrap.indent(textwrap.fill(text, width), " " * indent)
            short = len(left) < indent - 1
            lines.append(left + right[len(left) :] if short else f"{left}\n{right}")
    return "\n".join(lines)


def _given(arguments: Sequence[str], faults: list[str]) -> list[Pairs]:
    """The pairs of each config file, then those of the command line."""
    command: Pairs = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if equals and key:
            command.append((key, value))
        else:
            known = argument in plugins.names("problem")
            hint = f"did you mean problem={argument}?" if known else "see --help."
            faults.append(f"expected key=value without spaces around =, got {argument!r}; {hint}")
    files = [value for key, value in command if key == "config"]
    return [*(_config(Path(f), faults) for f in files), [p for p in command if p[0] != "config"]]


def _config(path: Path, faults: list[str]) -> Pairs:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        faults.append(f"config={path} cannot be read: {' '.join(str(error).split())}")
        return []
    if not isinstance(body, dict):
        faults.append(f"config={path} must be a mapping of keys, got {type(body).__name__}.")
        return []
    if body.get("out") and (path.parent / "fingerprint.json").exists():
        body["out"] = os.path.abspath(path.parent)  # of a run, wherever that was moved to
    pairs: Pairs = []
    for key, value in body.items():
        if key in KINDS and isinstance(value, dict):
            pairs += [(key if k == "name" else f"{key}.{k}", v) for k, v in value.items()]
        else:
            pairs.append((str(key), value))
    return pairs


def _parts(given: list[Pairs], faults: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The names of the chosen plugins, and those found, with their own defaults."""
    names = {"memory": "full", "launcher": "single"}
    names |= {key: str(value) for pairs in given for key, value in pairs if key in KINDS}
    if "problem" not in names:
        choices = ", ".join(plugins.names("problem"))
        faults.append(f"problem=NAME is missing; choices: {choices}, or module:Class.")
        return names, {"settings": Settings()}
    parts: dict[str, Any] = {}
    for kind in KINDS:
        if kind not in names:
            names[kind] = getattr(parts.get("problem"), "default_solver", "penalty")
        try:
            parts[kind] = _make(kind, names[kind])
        except InputError as error:
            faults += error.faults
    if "solver" in parts and "problem" in parts:
        wishes = _wishes(parts["problem"], parts["solver"])
        parts["solver"] = dataclasses.replace(parts["solver"], **wishes)
    steps = getattr(parts.get("problem"), "default_steps", Settings.steps)
    return names, parts | {"settings": Settings(steps=steps)}


def _wishes(problem: Problem, solver: Solver) -> dict[str, Any]:
    """What the problem, as it stands, wants of the solver's options."""
    own = {field.name for field in dataclasses.fields(solver)}  # type: ignore[arg-type]
    return {k: v for k, v in problem.solver_wishes().items() if k in own}


def _make(kind: str, name: str) -> Any:
    if kind in CHOICES:
        if name not in CHOICES[kind]:
            choices = ", ".join(CHOICES[kind])
            raise InputError(f"unknown {kind} {name!r}; choices: {choices}.")
        return CHOICES[kind][name]()
    find = plugins.find(kind, name)
    try:
        made = find()
    except TypeError as error:
        raise InputError(f"{kind}={name} must have a default for every field: {error}.") from None
    if not isinstance(made, KINDS[kind]) or not dataclasses.is_dataclass(made):
        raise InputError(
            f"{kind}={name} must be a dataclass that extends bilevel.{KINDS[kind].__name__}, "
            f"got {type(made).__name__}."
        )
    return made


def _table(parts: dict[str, Any]) -> dict[str, tuple[str, str, Any]]:
    """Every key with its part, its field and the annotation of that."""
    table = {}
    for kind, part in parts.items():
        hints = typing.get_type_hints(type(part))
        for field in dataclasses.fields(part):
            key = field.name if kind == "settings" else f"{kind}.{field.name}"
            table[key] = (kind, field.name, hints[field.name])
    return table


def _key(word: str, table: dict[str, Any], parts: dict[str, Any], faults: list[str]) -> str | None:
    """The full key of a written one, None with a fault if there is none."""
    ends = [k for k in table if word in (k, k.partition(".")[2])]
    if word in table or len(ends) == 1:
        return word if word in table else ends[0]
    kind = word.partition(".")[0]
    if ends:
        faults.append(f"{word} may be {' or '.join(ends)}; write it in full.")
    elif kind not in KINDS or kind in parts:  # else the plugin is unknown, and its keys with it
        known = {end: key for key in table for end in (key.partition(".")[2] or key, key)}
        for other, choices in CHOICES.items():
            for name, choice in choices.items():
                own = [f"{other}.{field.name}" for field in dataclasses.fields(choice)]
                known = {key: f"{key} (of {other}={name})" for key in own} | known
        near = get_close_matches(word, known, n=1)
        hint = f"the nearest is {known[near[0]]}" if near else "see --help"
        faults.append(f"unknown key {word}; {hint}.")
    return None
