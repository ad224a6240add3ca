"""Several processes give what one gives, and hold no more than their share."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes_case import CASES, LAUNCHERS, STEPS, Tied, llm, run, switches
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import bilevel
from bilevel import Single, checkpoint
from bilevel.fsdp import DDP, FSDP2
from bilevel.problems.quadratic import Quadratic
from bilevel.run import main
from bilevel.tree import leaves

HERE = Path(__file__).parent


def torchrun(count, *words, timeout=600, cwd=None):
    """Run a script or `-m module` in so many processes."""
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *starter, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target of counted numbers, and sources that are more and less like it."""
    folder = tmp_path_factory.mktemp("processes")
    words = {
        "good": "one two three",
        "fair": "one red blue",
        "bad": "qx zv kw",
        "target": "one two",
        "other": "red one",
    }
    for name, text in words.items():
        rows = [{"text": f"{text} {i} " * (1 + i % 3)} for i in range(16 + len(name))]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = torchrun(2, HERE / "processes_case.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def single(folder):
    """What one process gives, by memory and solver."""
    wanted = {case[1:3] for case in CASES}
    return {key: run(folder, Single(), *key, 0) for key in sorted(wanted)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_two_processes_give_what_one_gives(folder, single, case):
    name = "-".join(map(str, case))
    found, expected = load_file(folder / f"{name}.safetensors"), single[case[1:3]]
    assert expected["x"].abs().max() > 0.01  # something has been learned
    assert len(found["losses"]) == STEPS
    for part in ("x", "y", "losses"):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["full", "lora"])
@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_a_process_holds_its_share(folder, single, launcher, memory):
    held = int(load_file(folder / f"{launcher}-{memory}-scalebio-0.safetensors")["held"])
    everything = int(single[memory, "scalebio"]["held"])  # with lora, the base and both adapters
    least = everything if launcher == "ddp" else everything / 2
    assert least <= held <= 1.01 * least  # odd rows go to the first process


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_an_adapter_is_gathered_when_it_is_saved(folder, single, launcher):
    found, expected = (
        load_file(folder / f"{name}-adapter" / "adapter_model.safetensors")
        for name in (launcher, "single")
    )
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-5)


def test_a_process_holds_what_was_planned(folder):
    for memory, (held, planned) in json.loads((folder / "bytes.json").read_text()).items():
        assert held == pytest.approx(planned, rel=0.02), memory


def test_optimizer_states_stay_flat_over_ten_switches(folder):
    single = switches(folder, Single())
    held = [json.loads((folder / f"switches-{rank}.json").read_text()) for rank in range(2)]
    for name, runs in [("single", [single]), *((n, [h[n] for h in held]) for n in LAUNCHERS)]:
        for sizes in runs:
            assert len(sizes) == 11 and len(set(sizes)) == 1, name
    assert [h["ddp"] for h in held] == [single, single]
    both = sum(h["fsdp2"][0] for h in held)
    assert single[0] <= both <= 1.001 * single[0]  # every process counts the steps of Adam


@pytest.mark.parametrize("kind", [FSDP2, DDP])
def test_what_is_sharded_is_on_one_mesh_until_the_processes_part(kind, monkeypatch):
    """Each mesh of two dimensions has process groups of its own, which take memory on a GPU."""
    made, own = [], kind.mesh
    monkeypatch.setattr(kind, "mesh", lambda self, device: made.append(device) or own(self, device))
    launcher = kind()
    for count in (1, 2):
        try:
            memory = bilevel.LISA(gamma=1, period=1)
            bilevel.solve(Tied(), "scalebio", steps=2, memory=memory, launcher=launcher)
        finally:
            launcher.close()
        assert made == ["cpu"] * count


@pytest.mark.parametrize("kind", [FSDP2, DDP])
def test_all_groups_communicate_on_the_same_streams(kind):
    """What a GPU's allocator frees on one stream it does not use for another."""
    launcher, contexts, streams = kind(), set(), {}

    def look(state, record):
        for group in launcher._sharded:
            context = group._get_fsdp_state()._comm_ctx
            contexts.add(id(context))
            for name, stream in vars(context).items():
                if name.endswith("_stream"):
                    streams.setdefault(name, []).append(stream)

    try:
        memory = bilevel.LISA(gamma=1, period=1)  # copies of units that are not inside one module
        bilevel.solve(
            Tied(), "scalebio", steps=3, memory=memory, launcher=launcher, callbacks=[look]
        )
    finally:
        launcher.close()
    assert len(contexts) > 1  # else there is nothing to share
    assert {"all_gather_stream", "reduce_scatter_stream"} <= set(streams)
    for name, own in streams.items():
        assert len({id(stream) for stream in own}) == 1, name


@pytest.mark.parametrize("launcher", [FSDP2(), DDP()], ids=["fsdp2", "ddp"])
def test_one_process_under_an_engine_is_one_process(folder, single, launcher):
    try:
        found = run(folder, launcher, "lisa", "scalebio", 0)
    finally:
        launcher.close()
    torch.testing.assert_close(found["x"], single["lisa", "scalebio"]["x"], rtol=1e-6, atol=1e-6)


def test_what_cannot_run_on_an_engine_is_told_together(folder):
    faults = bilevel.check(Quadratic(), "aid", launcher=FSDP2(processes=2))
    assert len(faults) == 2
    assert "launcher.processes=2, but 1 were started" in faults[0]
    assert "second derivatives" in faults[1]
    (fault,) = bilevel.check(llm(folder), "zo", launcher=DDP())
    assert "gathers all gradients through its launcher" in fault


def test_batches_that_cannot_be_shared_out_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    faults = bilevel.check(llm(folder), "scalebio", launcher=FSDP2())
    assert len(faults) == 2
    assert "problem.batch=12 gives 12 rows, which 5 processes cannot share out" in faults[0]
    assert "problem.target_batch=8" in faults[1]
    (fault,) = bilevel.check(Quadratic(), "penalty", launcher=FSDP2())
    assert "Quadratic does not say how to share its batches out" in fault


def test_shares_of_a_batch_add_up(folder):
    problem = llm(folder)
    x, y = problem.init(torch.Generator().manual_seed(0))
    upper, lower = problem.batches(torch.Generator().manual_seed(0))
    for loss, batch in ((problem.upper, next(upper)), (problem.lower, next(lower))):
        whole = loss(x, y, batch)
        for count in (2, 4):
            shares = [loss(x, y, problem.share(batch, i, count)) for i in range(count)]
            torch.testing.assert_close(sum(shares), whole, rtol=1e-6, atol=0)
    assert all(p.grad is None for p in leaves(y))


def words(folder, out, *more):
    """A run of LISA with two switches, as the command line takes it."""
    sources = " ".join(str(folder / f"{name}.jsonl") for name in ("good", "fair", "bad"))
    fixed = "layers=3 width=32 batch=12 target_batch=8 max_length=24 verdict=false memory=lisa"
    fixed += " gamma=1 period=4 solver=scalebio warmup=2 checkpoint_every=2"
    return [
        *("-m", "bilevel.run", "problem=llm_reweight", f"sources={sources}", f"out={out}"),
        *(f"target={folder / 'target.jsonl'}", *fixed.split(), *more),
    ]


def path_of(out):
    rows = (out / "trajectory.jsonl").read_text().splitlines()
    keys = ("weights", "losses")
    return [
        [row["upper"], row["lower"], *(v for key in keys for v in row[key].values())]
        for row in map(json.loads, rows)
    ]


def start(count, arguments):
    """The processes of a run, started without torchrun, which would stop them by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    command = [sys.executable, *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    return [subprocess.Popen(command, env=os.environ | place | own, **pipe) for own in ranks]


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(folder, tmp_path):
    short = words(folder, tmp_path / "short", "launcher=fsdp2", "steps=6")
    assert torchrun(2, *short).returncode == 0
    assert (
        torchrun(2, *words(folder, tmp_path / "long", "launcher=fsdp2", "steps=12")).returncode == 0
    )
    whole = torch.tensor(path_of(tmp_path / "long"))
    for count, launcher in ((1, "single"), (2, "fsdp2"), (4, "ddp")):
        out = tmp_path / f"{count}"
        shutil.copytree(tmp_path / "short", out)
        again = words(folder, out, f"launcher={launcher}", "steps=12")
        done = torchrun(count, *again) if count > 1 else None
        if done is None:
            done = subprocess.run([sys.executable, *again], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "going on from" in done.stdout
        found = torch.tensor(path_of(out))
        if count == 2:
            assert torch.equal(found, whole)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_run_and_it_goes_on(folder, tmp_path, lost):
    out, more = tmp_path / "killed", ("launcher=fsdp2", "steps=40")
    team = start(2, words(folder, out, *more))
    wait_for(out / "checkpoints" / "step-00000006", team)
    team[lost].kill()
    _, told = team[1 - lost].communicate(timeout=120)
    team[lost].communicate()
    assert team[1 - lost].returncode == 2
    assert f"process {1 - lost} of 2 lost the others" in told
    assert "Traceback" not in told
    calm = tmp_path / "calm"
    for place in (out, calm):
        done = torchrun(2, *words(folder, place, *more))
        assert done.returncode == 0, done.stderr[-3000:]
    assert path_of(out) == path_of(calm)


def wait_for(path, team):
    for _ in range(1200):
        if path.exists():
            return
        assert all(process.poll() is None for process in team), team[0].stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


@pytest.mark.slow
def test_a_hanging_process_ends_the_run_in_words(folder, tmp_path):
    team = start(2, words(folder, tmp_path / "hang", "launcher=ddp", "launcher.timeout=20"))
    wait_for(tmp_path / "hang" / "checkpoints" / "step-00000004", team)
    team[1].send_signal(signal.SIGSTOP)
    _, told = team[0].communicate(timeout=120)
    team[1].kill()
    team[1].communicate()
    assert team[0].returncode == 2
    assert "process 0 of 2 lost the others" in told


@pytest.mark.slow
def test_a_wrong_start_is_told_once_and_ends_all(folder, tmp_path):
    done = torchrun(2, *words(folder, tmp_path / "no", "launcher=fsdp2", "solver.warmup=-1"))
    assert done.returncode != 0
    assert done.stderr.count("error: solver.warmup must be non-negative") == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    done = torchrun(2, *words(folder, tmp_path / "full", "launcher=fsdp2"))
    assert done.returncode != 0
    assert done.stderr.count("already holds files") == 1


def test_a_forgotten_launcher_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["problem=quadratic", f"out={tmp_path / 'out'}"]) == 2
    assert "launcher=single runs in one process, but 2 were started" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launcher", ["single", "ddp"])
def test_a_damaged_environment_is_told(monkeypatch, tmp_path, capsys, launcher):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    monkeypatch.setenv("RANK", "abc")
    assert main(["problem=quadratic", f"launcher={launcher}", f"out={tmp_path / 'out'}"]) == 2
    assert "the environment has WORLD_SIZE='abc'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [AssertionError("header"), CheckpointException("no", {})])
def test_what_distributed_readers_raise_is_damage(monkeypatch, tmp_path, error):
    path = checkpoint.save(tmp_path, {"step": 1}, fingerprint={})

    def broken(*arguments):
        raise error

    monkeypatch.setattr(checkpoint, "_load_tensors", broken)
    with pytest.raises(bilevel.InputError, match="is damaged"):
        checkpoint.load(path, fingerprint={})
