"""The command line, the checkpoints and resuming, on a small problem."""

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import bilevel.run
from bilevel import Single, checkpoint
from bilevel.errors import InputError
from bilevel.folder import claim, options_of
from bilevel.options import parse
from bilevel.piped import recorded
from bilevel.run import main
from bilevel.solvers.penalty import Penalty
from bilevel.zero import DeepSpeed

GROWING = "expandable_segments:True"


def run(*arguments):
    return main(["problem=quadratic", "solver=scalebio", *map(str, arguments)])


def test_run_writes_its_folder(tmp_path):
    assert run("steps=12", f"out={tmp_path / 'a'}") == 0
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names >= {"config.yaml", "result.json", "trajectory.jsonl", "log.txt", "checkpoints"}
    rows = (tmp_path / "a" / "trajectory.jsonl").read_text().splitlines()
    assert [json.loads(r)["step"] for r in rows] == list(range(1, 13))


def test_runs_without_a_folder_get_one_each(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    for _ in range(3):
        assert run("steps=1") == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    first = "20260101-000000-quadratic"
    assert names == [first, f"{first}-2", f"{first}-3"]
    assert not capsys.readouterr().out.startswith("\n")


def test_a_tree_cannot_train_by_lisa(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("memory=lisa") == 2
    assert "needs a lower variable that is an nn.Module" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["a\0b", "x" * 300, "/proc/nowhere"])
def test_a_folder_that_cannot_be_made_is_told(capsys, out):
    assert run("steps=1", f"out={out}") == 2
    assert "choose another" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_of_a_gpu_is_set_up_unless_the_user_has(tmp_path, monkeypatch, name):
    for own in bilevel.run.ALLOCATOR:
        monkeypatch.setenv(own, "")  # so that it is put back
        monkeypatch.delenv(own)
    if name:
        monkeypatch.setenv(name, "backend:native")
    assert main(["problem=quadratic", "steps=1", f"out={tmp_path / 'out'}"]) == 0
    found = {own: os.environ[own] for own in bilevel.run.ALLOCATOR if own in os.environ}
    assert found == ({name: "backend:native"} if name else {"PYTORCH_ALLOC_CONF": GROWING})


def test_the_written_config_runs_again(tmp_path):
    assert run("steps=5", "solver.penalty=7", f"out={tmp_path / 'a'}") == 0
    config = tmp_path / "a" / "config.yaml"
    assert main([f"config={config}", f"out={tmp_path / 'b'}"]) == 0
    same = [(tmp_path / n / "result.json").read_text() for n in "ab"]
    assert same[0] == same[1]


@pytest.mark.parametrize("stop", [1, 7, 10])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop):
    assert run("steps=20", "checkpoint_every=3", f"out={tmp_path / 'whole'}") == 0
    assert run(f"steps={stop}", "checkpoint_every=3", f"out={tmp_path / 'parts'}") == 0
    assert run("steps=20", "checkpoint_every=3", f"out={tmp_path / 'parts'}") == 0
    files = [tmp_path / n / "trajectory.jsonl" for n in ("whole", "parts")]
    assert files[0].read_text() == files[1].read_text()
    ends = [checkpoint.latest(tmp_path / n / "checkpoints") for n in ("whole", "parts")]
    tensors = [load_file(end / "tensors.safetensors") for end in ends]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


def test_killed_run_goes_on(tmp_path):
    """SIGKILL from inside a step, then the same command again."""
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
    arguments = [
        "problem=quadratic",
        "steps=20",
        "checkpoint_every=4",
        f"out={tmp_path / 'killed'}",
    ]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    assert ended.returncode == -9
    assert main(arguments) == 0
    assert main([*arguments[:-1], f"out={tmp_path / 'whole'}"]) == 0
    files = [tmp_path / n / "trajectory.jsonl" for n in ("whole", "killed")]
    assert files[0].read_text() == files[1].read_text()


def test_ctrl_c_saves_the_step_and_tells_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call = bilevel.run._Progress.__call__

    def interrupted(self, state, record):
        if state.step == 11:
            os.kill(os.getpid(), signal.SIGINT)
        call(self, state, record)

    with monkeypatch.context() as patch:
        patch.setattr(bilevel.run._Progress, "__call__", interrupted)
        assert run("steps=20", "solver.penalty=7") == 130
    said = capsys.readouterr().err
    assert "interrupted; saved at step 11. Go on with:" in said
    command = shlex.split(said.splitlines()[-1])
    assert command[:3] == ["python", "-m", "bilevel.run"]
    assert main(command[3:]) == 0
    assert main([*command[3:-1], "out=whole"]) == 0
    folder = command[-1].removeprefix("out=")
    files = [tmp_path / name / "trajectory.jsonl" for name in (folder, "whole")]
    assert files[0].read_text() == files[1].read_text()


def read(terminal):
    try:
        return os.read(terminal, 4096).decode(errors="replace")
    except OSError:  # what Linux says at the end
        return ""


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(tmp_path):
    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
    command = [sys.executable, "-m", "bilevel.run", "problem=quadratic", "steps=20"]
    ours, theirs = pty.openpty()
    pytest.importorskip("termios").tcsetwinsize(theirs, (24, 120))
    wide = {"args": [*command, f"out={tmp_path / 'a'}"], "stderr": theirs, "check": True}
    done = subprocess.run(**wide, stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    bar = "".join(iter(lambda: read(ours), ""))
    os.close(ours)
    assert "20/20 [" in bar and "step/s" in bar and "<" in bar  # elapsed < remaining
    assert "upper" in bar and "step 20/20:" not in done.stdout
    done = subprocess.run(
        [*command, f"out={tmp_path / 'b'}"], capture_output=True, check=True, text=True
    )
    assert done.stderr == ""
    assert [f"step {i}/20:" in done.stdout for i in (1, 2, 20)] == [False, True, True]


class Count(bilevel.Stream):
    """0, 1, 2, ..."""

    def __init__(self):
        self.position = -1

    def __next__(self):
        self.position += 1
        return self.position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Breaks(bilevel.Problem):
    """A quadratic that fails at draw 7, in a way of one's choice."""

    def __init__(self, kind):
        self.kind = kind

    def init(self, generator):
        return torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def batches(self, generator):
        return Count(), Count()

    def explain(self, x, y, batch):
        return f"draw {batch} is bad"

    def upper(self, x, y, batch):
        loss = (y - 1).square().sum()
        return loss + self.fault("upper", y) if batch == 7 else loss

    def lower(self, x, y, batch):
        loss = (y - x).square().sum()
        return loss + self.fault("lower", y) if batch == 7 else loss

    def fault(self, name, y):
        faults = {
            f"{name} nan": torch.tensor(torch.nan),
            f"{name} inf": torch.tensor(torch.inf),
            f"{name} gradient": (y * 0).sqrt().sum(),  # 0, with a gradient of 0 / 0
            f"{name} overflow": 1e300 * y.sum(),
        }
        return faults.get(self.kind, 0.0)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("upper nan", "Step 8: the upper loss at y is nan; draw 7 is bad"),
        ("lower inf", "Step 8: the lower loss at y is inf; draw 7 is bad"),
        ("upper gradient", "Step 8: the gradient of y has norm nan; draw 7 is bad"),
        ("lower gradient", "Step 8: the gradient of y has norm nan; draw 7 is bad"),
        ("lower overflow", "Step 8: the gradient of y has norm inf; draw 7 is bad"),
    ],
)
def test_a_step_that_is_not_finite_is_named_and_never_saved(tmp_path, kind, words, clip):
    options = {"checkpoints": tmp_path, "checkpoint_every": 1, "resume": True}
    solver = Penalty(inner_steps=1, warmup=2, clip=clip)
    result = bilevel.solve(Breaks(kind), solver, steps=20, **options)
    assert result.status is bilevel.Status.NONFINITE and not result.success
    assert words in result.message
    assert [row["step"] for row in result.history] == list(range(1, 8))
    assert checkpoint.latest(tmp_path).name == "step-00000007"
    assert all_finite(tmp_path) and bool(result.y.isfinite().all())
    whole = bilevel.solve(Breaks(""), solver, steps=12)
    parts = bilevel.solve(Breaks(""), solver, steps=12, **options)
    assert torch.equal(whole.x, parts.x) and torch.equal(whole.y, parts.y)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e308), ("adam", 1e308)])
def test_an_update_that_overflows_is_never_saved(tmp_path, optimizer, lr):
    solver = Penalty(inner_steps=1, lower_optimizer=optimizer, lower_lr=lr)
    result = bilevel.solve(Breaks(""), solver, steps=9, checkpoints=tmp_path, checkpoint_every=1)
    assert result.status is bilevel.Status.NONFINITE
    assert all_finite(tmp_path)


def all_finite(folder):
    found = [load_file(path / "tensors.safetensors") for path in folder.glob("step-*")]
    return bool(found) and all(t.isfinite().all() for tensors in found for t in tensors.values())


@contextlib.contextmanager
def files_up_to(size):
    """Within the block the system refuses larger files, as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_way_on(tmp_path, capsys):
    words = "steps=150", "checkpoint_every=10"
    with files_up_to(16_000):
        assert run(*words, f"out={tmp_path / 'a'}") == 1
    told = capsys.readouterr().err
    assert "cannot be written: File too large. The last checkpoint is of step" in told
    again = shlex.split(told.splitlines()[-1])
    assert again[:3] == ["python", "-m", "bilevel.run"] and main(again[3:]) == 0
    assert run(*words, f"out={tmp_path / 'b'}") == 0
    ends = [(tmp_path / name / "trajectory.jsonl").read_text() for name in "ab"]
    assert ends[0] == ends[1]


def test_tensors_that_cannot_be_written_are_an_error_of_the_system(tmp_path):
    with files_up_to(100), pytest.raises(OSError, match="File too large"):
        checkpoint.save(tmp_path, {"step": 1, "x": torch.zeros(500)}, fingerprint={})


def test_a_used_folder_is_not_written_over(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert run(f"out={tmp_path}") == 2
    assert run("steps=3", f"out={tmp_path / 'a'}") == 0
    assert run("steps=3", f"out={tmp_path / 'a'}", "resume=never") == 2
    assert run("steps=3", f"out={tmp_path / 'a'}", "solver.penalty=3") == 2
    assert "solver.penalty: 10.0 there, 3.0 now" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_folder_in_use_stays_as_it_is(tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "a"
    assert run("steps=4", f"out={out}") == 0
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with (out / "log.txt").open("a") as held:  # as by the run that is at work there
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run("steps=6", f"out={out}") == 2
    assert f"out={out} is in use by another run; choose another." in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in out.iterdir() if p.is_file()}


def test_damaged_checkpoints_are_refused(tmp_path, capsys):
    out = tmp_path / "a"
    assert run("steps=5", f"out={out}") == 0
    newest = checkpoint.latest(out / "checkpoints")
    tensors = newest / "tensors.safetensors"
    good = tensors.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for bad in (good[:-8], flipped, b""):
        tensors.write_bytes(bad)
        assert run("steps=9", f"out={out}") == 2
        assert "tensors.safetensors is missing or not as it was written" in capsys.readouterr().err
    tensors.unlink()
    assert run("steps=9", f"out={out}") == 2
    assert "tensors.safetensors is missing" in capsys.readouterr().err
    (newest / "state.json").write_text("{}")
    assert run("steps=9", f"out={out}") == 2
    assert "is damaged ('schema')" in capsys.readouterr().err
    with pytest.raises(InputError):
        checkpoint.load(newest, fingerprint={})


def test_single_launcher_is_the_main_process():
    assert Single().is_main


def test_fewer_steps_than_are_done_are_refused(tmp_path, capsys):
    out = tmp_path / "a"
    assert run("steps=7", f"out={out}") == 0 == run("steps=7", f"out={out}")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    capsys.readouterr()
    assert run("steps=5", f"out={out}") == 2
    said = capsys.readouterr().err
    assert f"out={out} holds a run of 7 steps already, more than steps=5; give steps=7" in said
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert run("steps=4", "seeds=2", f"out={tmp_path / 'b'}") == 0
    assert run("steps=3", "seeds=3", f"out={tmp_path / 'b'}") == 2
    assert "holds a run of 4 steps already, more than steps=3" in capsys.readouterr().err
    options = {"checkpoints": tmp_path / "c", "resume": True}
    solver = Penalty(inner_steps=1)
    assert bilevel.solve(Breaks(""), solver, steps=9, **options).nit == 9
    with pytest.raises(InputError, match=r"is of 9 steps, more than steps=5; give steps=9 or more"):
        bilevel.solve(Breaks(""), solver, steps=5, **options)


def test_the_log_has_what_the_console_said(tmp_path, capsys):
    """Every line of both streams, with the time in front, of a run, its failure and its return."""
    out = tmp_path / "a"
    assert run("steps=10", f"out={out}") == 0
    printed = capsys.readouterr()
    logged = (out / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in logged] == printed.out.splitlines() != []
    assert all(line.startswith("20") and line[10] == " " for line in logged)
    checkpoint_ = checkpoint.latest(out / "checkpoints")
    (checkpoint_ / "state.json").write_text("{}")
    assert run("steps=12", f"out={out}") == 2
    (told,) = capsys.readouterr().err.splitlines()
    again = (out / "log.txt").read_text().splitlines()
    assert again[: len(logged)] == logged and again[-1].endswith(told)
    assert told.startswith("error: ")


def test_of_a_bar_the_log_has_its_end(tmp_path):
    lines = []
    with contextlib.redirect_stderr(io.StringIO()) as shown, recorded(lines.append):
        sys.stderr.write("\r  0%| | 0/2")
        sys.stderr.write("\r 50%| | 1/2\r100%|#| 2/2\n")
        print("a\n\nb\r", file=sys.stderr)
        sys.stderr.write("no end")
        assert not sys.stderr.isatty()
    assert lines == ["100%|#| 2/2", "a", "b"]
    assert shown.getvalue().endswith("a\n\nb\r\nno end")


def test_a_crash_is_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(bilevel.run._Progress, "__call__", lambda *a: [][1])
    with pytest.raises(IndexError):
        run("steps=3", f"out={tmp_path / 'a'}")
    assert "IndexError: list index out of range" in (tmp_path / "a" / "log.txt").read_text()


def test_the_config_holds_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("steps=4", "out=a b") == 0
    config = tmp_path / "a b" / "config.yaml"
    given, words = config.read_text().splitlines()[:2]
    assert given == f"# Given in {tmp_path}:"
    assert words == "# problem=quadratic solver=scalebio steps=4 'out=a b'"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main([f"config={config}", "steps=6"]) == 0
    assert "step 6/6" in capsys.readouterr().out and not list(elsewhere.iterdir())
    assert len((tmp_path / "a b" / "trajectory.jsonl").read_text().splitlines()) == 6


def test_a_folder_that_was_moved_goes_on_where_it_is(tmp_path, capsys):
    assert run("steps=4", f"out={tmp_path / 'a'}") == 0
    (tmp_path / "a").rename(tmp_path / "b")
    assert main([f"config={tmp_path / 'b' / 'config.yaml'}", "steps=6"]) == 0
    assert "going on from" in capsys.readouterr().out and not (tmp_path / "a").exists()
    assert main([f"config={tmp_path / 'b' / 'config.yaml'}", f"out={tmp_path / 'c'}"]) == 0
    assert (tmp_path / "c" / "result.json").exists()


def test_the_config_of_an_engine_is_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse(["problem=quadratic", "out=a"])
    for given, whole in (("zero.json", str(tmp_path / "zero.json")), ("", "")):
        claim(tmp_path / "a", replace(options, launcher=DeepSpeed(config=given)))
        assert options_of(tmp_path / "a")["launcher"]["config"] == whole
