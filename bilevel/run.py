"""The command line: python -m bilevel.run problem=NAME solver=NAME key=value ... config=FILE."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from bilevel import checkpoint, forecast, plan, plugins, processes
from bilevel.audit import audited
from bilevel.check import probe
from bilevel.errors import InputError
from bilevel.folder import claim, fingerprint, folders, options_of, place, write_result
from bilevel.launch import Launcher
from bilevel.lora import Adapter
from bilevel.options import CHOICES, KINDS, Options, help_text, parse
from bilevel.piped import recorded, unbroken
from bilevel.problem import Problem
from bilevel.result import Result, Status, together
from bilevel.solve import solve, start
from bilevel.solver import State
from bilevel.tracking import Watch

STOPS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what schedulers send before they take a machine away."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""A full or failing disk, as the system says it."""

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables, the old one last, that set up a GPU's allocator. With segments that grow, what was
freed also serves larger tensors, and little more is reserved than a plan counts."""

TIME = "%Y-%m-%d %H:%M:%S"
"""Of a line of the log."""

USAGE = """usage: python -m bilevel.run problem=NAME [solver=NAME] [memory=NAME] [KEY=VALUE ...]

  python -m bilevel.run problem=llm_reweight           the embedded demonstration
  python -m bilevel.run problem=llm_reweight --help    every key with default and meaning
  python -m bilevel.run --list                         the problems and solvers installed here
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _quiet(), unbroken():
            return _main(arguments)
    except InputError as error:
        if isinstance(error, processes.ProcessError) or processes.rank() == 0:
            print("\n".join(f"error: {fault}" for fault in error.faults), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if processes.rank() == 0:
            print("interrupted; nothing was saved since the last checkpoint.", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    if "--list" in arguments:
        for kind in KINDS:
            print(f"{kind}: {' '.join(CHOICES.get(kind) or plugins.names(kind))}")
        return 0
    words = [a for a in arguments if a not in ("--help", "-h")]
    if not words:
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if words != arguments:
        print(help_text(words))
        return 0
    if not any(name in os.environ for name in ALLOCATOR):  # read when a GPU is first used
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    options = parse(words)
    with _together(options.launcher):
        return _run(options, words)


def _run(options: Options, words: list[str]) -> int:
    settings, launcher = options.settings, options.launcher
    if launcher.world_size == 1 < processes.expected():
        raise InputError(
            f"launcher={options.names['launcher']} runs in one process, but {processes.expected()} "
            "were started; use launcher=fsdp2 or launcher=ddp, or start without torchrun."
        )
    out = Path(processes.on_main(lambda: str(place(options)), launcher.told))
    if options.problem.probed and (faults := probe(options.problem, options.solver.order)):
        raise InputError(faults)
    notes = options.problem.prepare() + options.solver.notes(options.problem)
    planned = forecast.here(options) if launcher.is_main else None
    state: State | None = start(
        options.problem,
        options.solver,
        seed=settings.seed,
        memory=options.memory,
        launcher=launcher,
    )
    out = Path(processes.on_main(lambda: str(claim(_free(out), options, words)), launcher.told))
    if planned:
        checkpoint.replace_text(out / "plan.json", json.dumps(plan.as_dict(planned), indent=1))
    with _logged(out / "log.txt") if launcher.is_main else nullcontext():
        if notes and launcher.is_main:
            print("\n".join(notes), flush=True)
        return _searches(options, out, state, words)


def _searches(options: Options, out: Path, state: State | None, words: list[str]) -> int:
    """The search of every seed, and what the problem makes of them; returns the exit code."""
    settings, launcher = options.settings, options.launcher
    results: list[Result] = []
    folder = out
    try:
        for seed, folder in folders(out, settings).items():
            results = [replace(earlier, y=None) for earlier in results]  # makes room
            own = replace(options, settings=replace(settings, seed=seed))
            results.append(_search(own, folder, state, results, out))
            state = None  # the next is made in its turn
            if not results[-1].success:
                break
        result = together(results)
        if not launcher.is_main:
            return 0 if result.success else 1
        if settings.seeds > 1:
            write_result(out, result)
        if not result.success:
            options.problem.interim(result, out)
            kept = checkpoint.latest(folder / "checkpoints")
            print(f"failed: {result.message} Last finite checkpoint: {kept}", file=sys.stderr)
            return 1
        print("\n".join(options.problem.finish(result, out)))
    except KeyboardInterrupt:
        if launcher.is_main:
            at, again = _kept(launcher, out, folder, words)
            print(f"interrupted; saved at {at}. Go on with:\n  {again}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        at, again = _kept(launcher, out, folder, words)
        print(
            f"failed: out={out} cannot be written: {error.strerror}. The last checkpoint is of "
            f"{at}; make room, and go on with:\n  {again}",
            file=sys.stderr,
        )
        return 1
    print(f"written to {out}")
    return 0


def _kept(launcher: Launcher, out: Path, folder: Path, words: list[str]) -> tuple[str, str]:
    """Which step was saved of a run that ends early, and the command to go on with."""
    step = checkpoint.step_of(checkpoint.latest(folder / "checkpoints"))
    at = f"step {step}" + (f" of {folder.name}" if folder != out else "")
    same = [w for w in words if not w.removeprefix("--").startswith("out=")]
    count = launcher.world_size
    starter = ["python"] if count == 1 else ["torchrun", f"--nproc-per-node={count}"]
    return at, shlex.join([*starter, "-m", "bilevel.run", *same, f"out={out}"])


def _search(
    options: Options, folder: Path, state: State | None, earlier: list[Result], out: Path
) -> Result:
    """One search with its own seed, checkpoints and files; `earlier` are those of seeds before.

    Raises:
        KeyboardInterrupt: If it was stopped; what it found is written.
    """
    problem, settings, launcher = options.problem, options.settings, options.launcher
    done = checkpoint.latest(folder / "checkpoints")
    if launcher.is_main:
        folder.mkdir(exist_ok=True)
        _announce(options, done, several=folder != out)
    progress = _Progress(problem, settings.steps, checkpoint.step_of(done), launcher.is_main)
    written = options_of(out) if launcher.is_main else {}
    watch = Watch(folder, done=checkpoint.step_of(done), track=settings.track, options=written)

    def saved(result: Result) -> None:
        if launcher.is_main:
            problem.interim(together([*earlier, result]), out)

    with watch if launcher.is_main else nullcontext(), progress:
        result = solve(
            problem,
            options.solver,
            steps=settings.steps,
            seed=settings.seed,
            memory=options.memory,
            launcher=launcher,
            callbacks=[watch, progress],
            checkpoints=folder / "checkpoints",
            checkpoint_every=settings.checkpoint_every,
            fingerprint=fingerprint(options),
            resume=True,
            state=state,
            on_save=saved,
        )
    if result.success and isinstance(result.y, Adapter):
        result.y.save_pretrained(folder / "adapter", main=launcher.is_main)
    stopped = result.status is Status.STOPPED
    if launcher.is_main:
        write_result(folder, result)
    if stopped:
        saved(result)
    if stopped or (progress.interrupted and launcher.world_size == 1):
        raise KeyboardInterrupt
    plain = type(problem).finish is Problem.finish
    if plain and launcher.world_size == 1 and result.success:
        result = audited(problem, result)
    return result


def _announce(options: Options, done: Path | None, *, several: bool) -> None:
    """Say which of several seeds this is, and the checkpoint that it goes on from."""
    lines = [f"seed {options.settings.seed}"] if several else []
    lines += [f"going on from {done}"] if done else []
    print("\n".join([*lines, ""]), end="", flush=True)


@contextmanager
def _together(launcher: Launcher) -> Iterator[None]:
    """Within the block the processes are joined; the loss of one of them is an error in words."""
    launcher.open()
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if launcher.world_size == 1 or not lost:
            raise
        raise processes.ProcessError(
            f"process {processes.rank()} of {launcher.world_size} lost the others, of which one "
            f"failed or did not answer within launcher.timeout ({str(error).splitlines()[0]}); see "
            "its own message. The last checkpoint is whole: the same command with out=FOLDER goes "
            "on from there."
        ) from None
    finally:
        launcher.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of libraries go to the log alone: the user has no use for them here."""
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What is printed, what bilevel notes, what libraries warn of and how it failed go to a file.

    They are appended, each line with the time; one run may hold the file.
    """
    loggers = [logging.getLogger("bilevel"), logging.getLogger("py.warnings")]
    loggers[0].setLevel(logging.INFO)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        _lock(file)
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME))

        def record(line: str) -> None:
            with contextlib.suppress(OSError):  # a full disk ends no run
                file.write(f"{time.strftime(TIME)} {line}\n")
                file.flush()

        for logger in loggers:
            logger.addHandler(handler)
        try:
            with recorded(record):
                yield
        except InputError as error:
            for fault in error.faults:
                record(f"error: {fault}")
            raise
        except Exception:
            record(traceback.format_exc())
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


def _free(out: Path) -> Path:
    """The folder, if no other run is at work in it, whose files would be written over."""
    log = out / "log.txt"
    if log.exists():
        with log.open("a", encoding="utf-8") as file:
            _lock(file)
    return out


def _lock(file: TextIO) -> None:
    """Hold a file of the run's folder until it is closed, or the process is gone."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such locks; there two runs in one folder are not refused
        pass
    except BlockingIOError:
        folder = Path(file.name).parent
        raise InputError(f"out={folder} is in use by another run; choose another.") from None


class _Progress:
    """A bar on a terminal, a line every tenth of the run elsewhere; Ctrl-C ends a run in order."""

    def __init__(self, problem: Problem, steps: int, done: int, shown: bool) -> None:
        self.problem, self.steps, self.done, self.shown = problem, steps, done, shown
        self.interrupted = False
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.steps, initial=self.done, unit="step", dynamic_ncols=True)
        try:
            self.before = {s: signal.signal(s, self._interrupt) for s in STOPS}
        except ValueError:  # not in the main thread, where Ctrl-C does not arrive
            self.before = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for stop, handler in self.before.items():
            signal.signal(stop, handler)
        if self.bar is not None:
            self.bar.close()

    def __call__(self, state: State, record: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(self.problem.headline(record), refresh=False)
            self.bar.update(state.step - self.bar.n)
        elif self.shown and state.step % max(1, self.steps // 10) == 0:
            print(f"step {state.step}/{self.steps}: {self.problem.headline(record)}", flush=True)
        if self.interrupted:
            raise StopIteration

    def _interrupt(self, *signal_and_frame: object) -> None:
        """The first Ctrl-C lets the step end and be saved, the second ends it at once."""
        self.interrupted = True
        for stop in STOPS:
            signal.signal(stop, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
