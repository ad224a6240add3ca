"""The search repeated with several seeds: each is a run of its own, and the whole resumes."""

import dataclasses
import json
import os
import shlex
import signal

import pytest
import torch

import bilevel.run
from bilevel.problems.quadratic import Quadratic
from bilevel.result import together
from bilevel.run import main

SEEN: list = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noted(Quadratic):
    """A quadratic that notes what it is told between and after searches."""

    def interim(self, result, out):
        seeds = [r.nit for r in result.repeats] or [result.nit]
        SEEN.append((result.status.name, seeds, out.name))

    def finish(self, result, out):
        SEEN.append(result)
        return ["done"]


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def run(*words):
    """zo draws its directions, so that every seed takes a path of its own."""
    return main(["problem=quadratic", "solver=zo", "steps=12", *map(str, words)])


def rows(folder):
    return (folder / "trajectory.jsonl").read_text()


def test_seeds_are_runs_of_their_own(tmp_path, capsys):
    assert run("seed=5", "seeds=2", f"out={tmp_path / 'both'}") == 0
    said = capsys.readouterr().out
    for seed in (5, 6):
        assert run(f"seed={seed}", f"out={tmp_path / str(seed)}") == 0
        assert rows(tmp_path / "both" / f"seed-{seed}") == rows(tmp_path / str(seed))
        assert f"seed {seed}" in said
    assert rows(tmp_path / "5") != rows(tmp_path / "6")
    body = json.loads((tmp_path / "both" / "result.json").read_text())
    assert [r["nit"] for r in body["repeats"]] == [12, 12]
    alone = [json.loads((tmp_path / s / "result.json").read_text())["upper"] for s in "56"]
    assert [r["upper"] for r in body["repeats"]] == alone and body["upper"] == alone[1]


def test_more_seeds_go_on_from_fewer_but_not_from_one(tmp_path, capsys):
    out = tmp_path / "a"
    assert run("seeds=2", f"out={out}") == 0
    before = rows(out / "seed-0")
    assert run("seeds=3", f"out={out}") == 0
    assert f"going on from {out / 'seed-1'}" in capsys.readouterr().out
    assert rows(out / "seed-0") == before and len(list(out.glob("seed-*"))) == 3
    assert run(f"out={out}") == 2
    assert "holds a run with other settings or data (seeds:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("seeds=0",), ("seeds=2", f"seed={2**63 - 1}")])
def test_impossible_seeds_are_told(tmp_path, capsys, words):
    assert run(*words, f"out={tmp_path / 'a'}") == 2
    assert words[0] in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_interrupted_in_the_second_seed_it_goes_on(tmp_path, monkeypatch, capsys):
    call = bilevel.run._Progress.__call__
    steps = iter(range(1, 100))

    def interrupted(self, state, record):
        if next(steps) == 17:  # step 5 of the second seed
            os.kill(os.getpid(), signal.SIGINT)
        call(self, state, record)

    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(bilevel.run._Progress, "__call__", interrupted)
        assert run("seeds=3", f"out={out}") == 130
    said = capsys.readouterr().err
    assert "interrupted; saved at step 5 of seed-1." in said
    assert not (out / "seed-2").exists()
    assert main(shlex.split(said.splitlines()[-1])[3:]) == 0
    assert run("seeds=3", f"out={tmp_path / 'whole'}") == 0
    for seed in range(3):
        name = f"seed-{seed}"
        assert rows(out / name) == rows(tmp_path / "whole" / name)


def test_a_problem_hears_of_every_checkpoint_and_of_all_seeds(tmp_path):
    words = ["problem=test_seeds:Noted", "solver=zo", "steps=4", "checkpoint_every=2"]
    assert main([*words, "seeds=2", f"out={tmp_path / 'a'}"]) == 0
    *told, result = SEEN
    assert told == [("RUNNING", n, "a") for n in ([2], [4], [4, 2], [4, 4])]
    assert [r.nit for r in result.repeats] == [4, 4]
    assert [r.y is None for r in result.repeats] == [True, False]
    assert torch.equal(result.x, result.repeats[1].x)
    SEEN.clear()
    assert main([*words, f"out={tmp_path / 'b'}"]) == 0
    assert SEEN[-1].repeats == () and SEEN[0] == ("RUNNING", [2], "b")


def test_a_seed_that_fails_ends_the_run(tmp_path, capsys):
    words = ["problem=test_seeds:Noted", "solver=scalebio", "steps=40", "warmup=0", "seeds=2"]
    words += ["lower_lr=1e200", "lower_optimizer=sgd"]
    assert main([*words, f"out={tmp_path / 'a'}"]) == 1
    assert "failed: " in capsys.readouterr().err
    assert SEEN[-1][0] in ("NONFINITE", "DIVERGED")
    assert not (tmp_path / "a" / "seed-1").exists()


def test_one_result_stays_as_it_is():
    one = bilevel.solve(Quadratic(), "f2ba", steps=2)
    assert together([one]) is one
    both = together([one, one])
    assert both.repeats[0].y is None and both.y is one.y
    assert "seeds: upper" in repr(both) and "seeds" not in repr(one)
