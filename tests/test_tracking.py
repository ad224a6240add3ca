"""What a run tells while it runs: rows as they come, trackers, and pipes that break."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bilevel import tracking
from bilevel.run import main
from bilevel.tracking import RESOURCES, ROWS, TRACKERS, Watch

ROOT = Path(__file__).parent.parent


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*words):
    return main(["problem=quadratic", "solver=scalebio", *map(str, words)])


def step(watch, number, **more):
    watch(None, {"step": number, "upper": 1.0 / number, **more})


def test_rows_are_there_after_every_step(tmp_path):
    with Watch(tmp_path) as watch:
        for number in (1, 2):
            step(watch, number, weights={"a": 0.5})
            assert rows(tmp_path / ROWS)[-1] == {
                "step": number,
                "upper": 1.0 / number,
                "weights": {"a": 0.5},
            }
    resources = rows(tmp_path / RESOURCES)
    assert [r["step"] for r in resources] == [1, 2]
    held = int((Path("/proc/self/statm").read_text()).split()[1]) * os.sysconf("SC_PAGESIZE")
    assert resources[-1]["resident"] == pytest.approx(held, rel=0.2)
    assert resources[-1]["peak"] >= 0.99 * resources[-1]["resident"]


def test_a_run_that_goes_on_drops_what_it_does_again(tmp_path):
    with Watch(tmp_path) as watch:
        for number in range(1, 6):
            step(watch, number)
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"step": 6, "up')  # a process killed while it wrote
    before = rows(tmp_path / RESOURCES)[2]["seconds"]
    with Watch(tmp_path, done=3) as watch:
        step(watch, 4, again=True)
    assert [r["step"] for r in rows(tmp_path / ROWS)] == [1, 2, 3, 4]
    assert rows(tmp_path / ROWS)[-1]["again"]
    assert rows(tmp_path / RESOURCES)[-1]["seconds"] >= before


def test_rows_while_running_are_those_at_the_end(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from bilevel import run\n"
        "call = run._Progress.__call__\n"
        "def killed(self, state, record):\n"
        "    call(self, state, record)\n"
        "    if state.step == 11: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run._Progress.__call__ = killed\n"
        "run.main(sys.argv[1:])\n"
    )
    out = tmp_path / "killed"
    words = ["problem=quadratic", "solver=scalebio", "checkpoint_every=4", f"out={out}"]
    assert subprocess.run([sys.executable, "-c", code, *words], check=False).returncode == -9
    live = (out / ROWS).read_text()
    assert len(live.splitlines()) == 11
    assert run("steps=11", f"out={tmp_path / 'whole'}") == 0
    assert live == (tmp_path / "whole" / ROWS).read_text()
    assert main([*words, "steps=12"]) == 0  # goes on from step 8
    assert [r["step"] for r in rows(out / RESOURCES)] == list(range(1, 13))


class Broken:
    """A tracker that fails at its third step, and does not like to be closed."""

    def __init__(self, out, done, options):
        self.seen = 0
        self.options = options

    def log(self, row, step):
        self.seen += 1
        if self.seen == 3:
            raise ConnectionError("no\nroute")

    def close(self):
        raise OSError("closed already")


def test_a_tracker_that_fails_never_ends_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TRACKERS, "wandb", Broken)
    monkeypatch.setattr(tracking, "find_spec", lambda name: find_spec("json"))
    assert run("steps=6", "track=wandb", f"out={tmp_path / 'a'}") == 0
    said = "wandb failed and is left out from now on: no route"
    assert capsys.readouterr().err.count(said) == 1
    assert said in (tmp_path / "a" / "log.txt").read_text()
    assert len(rows(tmp_path / "a" / ROWS)) == 6


def test_a_tracker_that_cannot_start_never_ends_a_run(tmp_path, monkeypatch, capsys):
    def refused(out, done, options):
        raise ValueError("not today")

    monkeypatch.setitem(TRACKERS, "trackio", refused)
    with Watch(tmp_path, track=["trackio"]) as watch:
        step(watch, 1)
    assert "trackio failed and is left out from now on: not today" in capsys.readouterr().err


def test_trackers_get_numbers_alone_and_the_options(tmp_path, monkeypatch):
    seen = []

    class Kept(Broken):
        def log(self, row, step):
            seen.append((step, row, self.options))

        def close(self):
            pass

    monkeypatch.setitem(TRACKERS, "wandb", Kept)
    with Watch(tmp_path, track=["wandb", "wandb"], options={"steps": 3}) as watch:
        step(watch, 1, weights={"a": 0.5}, note="x", bad=float("inf"))
    (number, row, options), *none = seen
    assert not none and number == 1 and options == {"steps": 3}
    resources = {k: row.pop(k) for k in list(row) if k.startswith("resources/")}
    assert row == {"step": 1.0, "upper": 1.0, "weights/a": 0.5}
    assert resources["resources/seconds"] >= 0 and resources["resources/resident"] > 1e7


def test_a_tracker_that_is_not_there_is_told_with_the_other_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb").mkdir()  # as its own runs leave it, which Python takes for a package
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(
        tracking, "find_spec", lambda name: None if name == "trackio" else find_spec(name)
    )
    wanted = "trackio" if find_spec("wandb") and find_spec("wandb").origin else "trackio,wandb"
    assert run(f"track={wanted}", "steps=0") == 2
    said = capsys.readouterr().err
    for name in wanted.split(","):
        assert f"track={name} needs the package {name}; install it with: pip install" in said
    assert "steps must be at least 1" in said
    assert run("track=tensorbored") == 2
    assert "track must be some of tensorboard, wandb, trackio" in capsys.readouterr().err


@pytest.mark.skipif(not find_spec("tensorboard"), reason="needs tensorboard")
def test_tensorboard_shows_every_step_once_after_going_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["checkpoint_every=3", f"out={tmp_path / 'a'}", "track=tensorboard"]
    assert run("steps=4", *words) == 0
    with Watch(tmp_path / "a", done=4, track=["tensorboard"]) as watch:
        step(watch, 5)  # lost: the next run goes on from step 4
    assert run("steps=7", *words) == 0
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    kept = events.Scalars("upper")
    assert [e.step for e in kept] == list(range(1, 8))
    want = [r["upper"] for r in rows(tmp_path / "a" / ROWS)]
    assert [e.value for e in kept] == pytest.approx(want)


@pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb")
@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb_is_offline_and_asks_nothing(tmp_path, mode):
    own = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR")
    place = {k: v for k, v in os.environ.items() if k not in own}
    place |= {"HOME": str(tmp_path), "WANDB_MODE": mode} if mode else {"HOME": str(tmp_path)}
    out = tmp_path / "a"
    command = [sys.executable, "-m", "bilevel.run", "problem=quadratic", "solver=scalebio"]
    command += ["steps=3", "track=wandb", f"out={out}"]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, env=place, cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert ("WANDB_MODE=online does not work" in done.stderr) == (mode == "online")


@pytest.mark.skipif(not find_spec("trackio"), reason="needs trackio")
def test_trackio_stays_in_the_folder(tmp_path):
    place = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO")}
    out = tmp_path / "a"
    command = [sys.executable, "-m", "bilevel.run", "problem=quadratic", "solver=scalebio"]
    command += ["steps=3", "track=trackio", f"out={out}"]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, env=place | {"HOME": str(tmp_path)}, cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr
    assert list(out.glob("trackio/*.db")) and "Trackio" not in done.stdout
    assert {p.name for p in tmp_path.iterdir()} <= {"a", ".config", ".cache"}


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    command = [sys.executable, "-m", "bilevel.run", "problem=quadratic", "solver=scalebio"]
    command += ["steps=20", f"out={tmp_path / 'a'}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert len(rows(tmp_path / "a" / ROWS)) == 20
