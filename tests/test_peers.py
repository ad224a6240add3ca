"""The benchmark beside other libraries: its losses, its exact answers, its records, its own row."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks" / "peers"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("run", "report", "session", "environments", "tasks", "losses", "worker")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_exact_answer_is_a_difference_quotient(tmp_path, monkeypatch):
    import tasks

    monkeypatch.setitem(tasks.TASKS, "quadratic-40", {**tasks.TASKS["quadratic-100"]})
    for name in ("quadratic-40", "strengths"):
        exact = tasks.Exact(tasks.write(name, tmp_path))
        x, slope = exact.task.x0.numpy(), exact.hypergradient()
        u, step = np.cos(np.arange(len(x))), 1e-3
        ends = []
        for sign in (1, -1):
            there = torch.tensor(x + sign * step * u)
            y = exact._solved(there)  # to rounding, by Newton
            ends.append(float(exact.task.upper(there, exact._split(y))))
        # The quotient is off by step^2 / 6 of the third derivative.
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope @ u, rel=1e-5)


@pytest.mark.slow
def test_a_run_is_written_continued_and_shown(tmp_path, monkeypatch, capsys):
    import environments
    import run
    import tasks

    monkeypatch.setitem(tasks.TASKS, "quadratic-100", {**tasks.TASKS["quadratic-100"]})
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "COMPILED", tmp_path / "none")
    monkeypatch.setitem(environments.PEERS, "absent", environments.Peer(("no-such==1",), ()))
    monkeypatch.setattr(run, "prepare", lambda n, s: "no such package" if n == "absent" else "")
    words = ["run.py", "--peers", "ours", "absent", "--tasks", "quadratic-100", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "peers")])
    run.main()
    rows = [json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines()]
    error = {(r["method"], r["inner"]): r["error"] for r in rows if r["kind"] == "error"}
    engines = [f"{m}{e}" for m in ("aid", "itd") for e in ("", " traced", " compiled")]
    assert {error[m, 2000] < 1e-9 for m in engines} == {True}
    assert error["aid", 100] == pytest.approx(error["aid traced", 100], rel=1e-6)
    assert error["aid", 100] == pytest.approx(error["aid compiled", 100], rel=1e-6)
    table = (tmp_path / "peers.md").read_text()
    assert "cannot be installed: no such package" in table and "| ours | itd traced |" in table
    run.main()  # all is known: nothing is done again
    assert len((tmp_path / "peers.jsonl").read_text().splitlines()) == len(rows)


def test_a_users_script_is_short():
    import run

    assert run.user_lines("ours") <= 15
    assert all(run.user_lines(peer) > run.user_lines("ours") for peer in run.PEERS)


def test_all_libraries_are_asked_for_the_same(tmp_path):
    """Losses in jax are those in PyTorch, by the text of their formulas' results here: numpy."""
    import losses
    import tasks

    task = losses.load(tasks.write("cleaning", tmp_path))
    x, y = torch.linspace(-1, 1, 1000).double(), [torch.sin(torch.arange(650.0)).view(65, 10)]
    y = [p.double() for p in y]
    z = task.data["train"].numpy() @ y[0].numpy()
    picked = z[np.arange(1000), task.data["labels"].numpy()]
    each = np.log(np.exp(z).sum(1)) - picked
    weights = 1 / (1 + np.exp(-x.numpy()))
    expected = (weights * each).mean() + 0.0025 * (y[0].numpy() ** 2).sum()
    assert float(task.lower(x, y)) == pytest.approx(expected, rel=1e-12)
