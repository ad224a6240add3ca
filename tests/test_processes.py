"""Several processes give what one gives, and hold no more than their share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes_case import CASES, LAUNCHERS, STEPS, llm, run
from safetensors.torch import load_file

import bilevel
from bilevel import Single
from bilevel.fsdp import DDP, FSDP2
from bilevel.problems.quadratic import Quadratic
from bilevel.tree import leaves

HERE = Path(__file__).parent


def torchrun(count, *words, timeout=300, cwd=None):
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


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_a_process_holds_its_share(folder, single, launcher):
    held = int(load_file(folder / f"{launcher}-full-scalebio-0.safetensors")["held"])
    everything = int(single["full", "scalebio"]["held"])
    least = everything if launcher == "ddp" else everything / 2
    assert least <= held <= 1.01 * least  # odd rows go to the first process


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
