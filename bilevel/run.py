"""The command line: python -m bilevel.run problem=NAME solver=NAME key=value ... config=FILE."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from bilevel import plugins
from bilevel.errors import InputError
from bilevel.launch import Single
from bilevel.memory import LISA, Full
from bilevel.result import Result
from bilevel.solve import solve
from bilevel.solver import State

MEMORIES = {"full": Full, "lisa": LISA}
LAUNCHERS = {"single": Single}
CHOICES = ("problem", "solver", "memory", "launcher")
USAGE = """usage: python -m bilevel.run problem=NAME [solver=NAME] [memory=full|lisa] [KEY=VALUE]

  python -m bilevel.run problem=llm_reweight           the embedded demonstration
  python -m bilevel.run problem=llm_reweight --help    every key with default and meaning
  python -m bilevel.run --list                         the problems and solvers installed here
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys of every run."""

    steps: int = 200
    """Upper steps."""
    seed: int = 0
    """Of start values, batches and drawn blocks."""
    out: str = ""
    """Folder to write into; runs/<time>-<problem> when empty."""
    resume: Literal["auto", "never"] = "auto"
    """Whether to go on from the newest checkpoint in `out`."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(arguments)
    except InputError as error:
        print("\n".join(f"error: {fault}" for fault in error.faults), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with the same out= goes on.", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    if "--list" in arguments:
        for kind in ("problem", "solver"):
            print(f"{kind}: {' '.join(plugins.names(kind))}")
        print(f"memory: {' '.join(MEMORIES)}\nlauncher: {' '.join(LAUNCHERS)}")
        return 0
    wants_help = bool({"--help", "-h"} & set(arguments))
    values = _values([a for a in arguments if a not in ("--help", "-h")])
    if "problem" not in values:
        print(USAGE, file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    names, options = _options(values, wants_help)
    problem, solver = options.problem, options.solver
    prepare = getattr(problem, "prepare", None)
    out, fingerprint = _open(names, options)
    notes = prepare() if prepare else []
    out.mkdir(parents=True, exist_ok=True)
    _write_config(out, names, options)
    _log_to(out / "log.txt")
    for note in notes:
        print(note)
    memory, settings = options.memory, options.settings
    progress = _Progress(problem, settings.steps, out)
    with progress:
        result = solve(
            problem,
            solver,
            steps=settings.steps,
            seed=settings.seed,
            memory=memory,
            launcher=options.launcher,
            callbacks=[progress],
            checkpoints=out / "checkpoints",
            checkpoint_every=settings.checkpoint_every,
            fingerprint=fingerprint,
            resume=settings.resume == "auto",
        )
    _write_result(out, result)
    if not result.success:
        where = f"step {result.nit}; the last finite checkpoint is in {out / 'checkpoints'}"
        print(f"failed: {result.message} ({where})", file=sys.stderr)
        return 1
    lines = problem.finish(result, out) or [repr(result)]
    print("\n".join(lines))
    print(f"written to {out}")
    return 0


def _values(arguments: Sequence[str]) -> dict[str, Any]:
    """The keys and values given, config files first, later ones winning."""
    given: dict[str, Any] = {}
    faults = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            faults.append(f"expected key=value, got {argument!r}; see --help.")
        given[key] = value
    if faults:
        raise InputError(faults)
    config = given.pop("config", None)
    return (_read_config(Path(config)) if config else {}) | given


def _read_config(path: Path) -> dict[str, Any]:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config={path} cannot be read: {error}") from None
    if not isinstance(body, dict):
        raise InputError(f"config={path} must be a mapping of keys, got {type(body).__name__}.")
    flat: dict[str, Any] = {}
    for key, value in body.items():
        if key in CHOICES and isinstance(value, dict):
            flat |= {k if k == "name" else f"{key}.{k}": v for k, v in value.items() if k != "name"}
            flat |= {key: value["name"]} if "name" in value else {}
        else:
            flat[str(key)] = value
    return flat


def _options(values: dict[str, Any], wants_help: bool) -> tuple[dict[str, str], Any]:
    """The chosen plugins with their fields filled in from the given values, by tyro."""
    import tyro

    names = {"problem": str(values.pop("problem"))}
    problem = plugins.find("problem", names["problem"])()
    names["solver"] = str(values.pop("solver", getattr(problem, "default_solver", "penalty")))
    names["memory"] = str(values.pop("memory", "full"))
    names["launcher"] = str(values.pop("launcher", "single"))
    if "verdict" in values:
        values["problem.verdict"] = values.pop("verdict")
    parts = {
        "problem": problem,
        "solver": plugins.find("solver", names["solver"])(),
        "memory": _choose("memory", names["memory"], MEMORIES)(),
        "launcher": _choose("launcher", names["launcher"], LAUNCHERS)(),
        "settings": Settings(steps=getattr(problem, "default_steps", 200)),
    }
    fields = [
        (k, tyro.conf.OmitArgPrefixes[type(v)] if k == "settings" else type(v), v)
        for k, v in parts.items()
    ]
    kind = dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)
    tokens = [t for key, value in values.items() for t in _tokens(key, value)]
    options = tyro.cli(
        kind,
        args=tokens + (["--help"] if wants_help else []),
        prog="python -m bilevel.run " + " ".join(f"{k}={v}" for k, v in names.items()),
        description="Write keys as key=value, without the dashes shown here.",
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    return names, options


def _choose(kind: str, name: str, choices: Mapping[str, Any]) -> Any:
    if name not in choices:
        raise InputError(f"unknown {kind} {name!r}; choices: {', '.join(choices)}.")
    return choices[name]


def _tokens(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"--{key}", *(f"{k}={v}" for k, v in value.items())]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, bool):
        return [f"--{key}", str(value)]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return [f"--{key}", value.capitalize()]
    if key == "problem.sources":
        return [f"--{key}", *shlex.split(str(value))]
    return [f"--{key}", str(value)]


def _open(names: dict[str, str], options: Any) -> tuple[Path, dict[str, Any]]:
    """The run's folder and what identifies the run; refuses a folder that holds another run."""
    settings = options.settings
    stamp = time.strftime("%Y%m%d-%H%M%S")
    label = names["problem"].replace(":", "-")
    out = Path(settings.out or f"runs/{stamp}-{label}")
    fingerprint = _fingerprint(names, options)
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file, expected a folder; choose another.")
    parent = next(p for p in [out, *out.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"out={out} cannot be written: no permission on {parent}.")
    if out.is_dir() and any(out.iterdir()):
        identity = out / "fingerprint.json"
        if settings.resume == "never" or not identity.exists():
            raise InputError(
                f"out={out} already holds files; choose another folder"
                + ("." if settings.resume == "auto" else ", or resume=auto to go on with it.")
            )
        saved = json.loads(identity.read_text(encoding="utf-8"))
        other = [k for k in sorted({*saved, *fingerprint}) if saved.get(k) != fingerprint.get(k)]
        if other:
            rows = "; ".join(
                f"{k}: {saved.get(k)!r} there, {fingerprint.get(k)!r} now" for k in other
            )
            raise InputError(f"out={out} holds a run with other settings ({rows}); choose another.")
    return out, fingerprint


def _fingerprint(names: dict[str, str], options: Any) -> dict[str, Any]:
    flat: dict[str, Any] = dict(names)
    for part in ("problem", "solver", "memory"):
        for field in dataclasses.fields(getattr(options, part)):
            flat[f"{part}.{field.name}"] = getattr(getattr(options, part), field.name)
    flat = {k: v for k, v in flat.items() if not k.startswith("problem.verdict")}
    return json.loads(json.dumps(flat | {"seed": options.settings.seed}, default=str))


def _write_config(out: Path, names: dict[str, str], options: Any) -> None:
    body: dict[str, Any] = dataclasses.asdict(options.settings)
    for part in CHOICES:
        own = dataclasses.asdict(getattr(options, part))
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
        body[part] = {"name": names[part], **own}
    (out / "config.yaml").write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    identity = json.dumps(_fingerprint(names, options), indent=1)
    (out / "fingerprint.json").write_text(identity, encoding="utf-8")


def _write_result(out: Path, result: Result) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in result.history)
    (out / "trajectory.jsonl").write_text(rows, encoding="utf-8")
    body = {"status": result.status.name, "message": result.message, "nit": result.nit}
    body |= {"upper": result.upper, "lower": result.lower, "counts": result.counts}
    (out / "result.json").write_text(json.dumps(body, indent=1), encoding="utf-8")


def _log_to(path: Path) -> None:
    logger = logging.getLogger("bilevel")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)


class _Progress:
    """A bar on a terminal, a line every tenth of the run elsewhere."""

    def __init__(self, problem: Any, steps: int, out: Path) -> None:
        self.steps = steps
        self.headline = getattr(problem, "headline", lambda r: f"upper {r['upper']:.4g}")
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.steps, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, state: State, record: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.n = state.step
            self.bar.set_postfix_str(self.headline(record))
        elif state.step % max(1, self.steps // 10) == 0:
            print(f"step {state.step}/{self.steps}: {self.headline(record)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
