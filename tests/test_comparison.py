"""The comparison: equal budgets, paired seeds, honest words, and going on after an interruption."""

import csv
import dataclasses
import json
import random

import pytest

from bilevel import InputError
from bilevel.problems.llm_reweight import verdict
from bilevel.problems.llm_reweight.baselines import METHODS, comparison
from bilevel.problems.llm_reweight.baselines.comparison import Row, chosen, conclusion
from bilevel.run import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison")
    draw = random.Random(0)
    right, wrong = (["".join(draw.choices(s, k=4)) for _ in range(12)] for s in ("abcde", "vwxyz"))
    for name, words, count in (("good", right, 40), ("bad", wrong, 60), ("target", right, 40)):
        rows = [{"text": " ".join(draw.choices(words, k=20))} for _ in range(count)]
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def run(folder, out, *more):
    words = ["problem=llm_reweight", f"out={out}", "width=16", "layers=1", "max_length=24"]
    words += [f"sources={folder / 'good.jsonl'} {folder / 'bad.jsonl'}", "steps=12", "batch=4"]
    words += [
        f"target={folder / 'target.jsonl'}",
        "verdict_steps=3",
        "target_batch=2",
        "solver.warmup=1",
        *more,
    ]
    return main(words)


def test_a_run_compares_at_equal_budgets_and_goes_on_where_it_was(
    folder, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "a"
    words = ("compare=size,mixmin,influence:sharpness=2", "verdict=false")
    train, done = verdict.train, []

    def interrupted(problem, mixture, **options):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(mixture)
        return train(problem, mixture, **options)

    monkeypatch.setattr(verdict, "train", interrupted)
    assert run(folder, out, *words) == 130
    assert len((out / "trainings.jsonl").read_text().splitlines()) == 4 + 4  # four searches
    monkeypatch.setattr(verdict, "train", train)
    assert run(folder, out, *words) == 0
    said = capsys.readouterr().out
    assert "compare: 5 methods, 3 paired seeds" in said
    assert "lowest mean test loss of 5 methods over 3 paired seeds: " in said
    body = json.loads((out / "comparison.json").read_text())
    rows = {row["method"]: row for row in body["rows"]}
    assert [*rows] == sorted(rows, key=lambda name: rows[name]["loss"])
    assert rows.keys() == {"learned", "uniform", "size", "mixmin", "influence:sharpness=2"}
    weights = json.loads((out / "weights.json").read_text())
    own = {s["name"]: s["weight"] for s in weights["sources"]}
    assert rows["learned"]["seeds"][0]["weights"] == own
    assert rows["learned"]["seeds"][0]["tokens"] == body["budget_tokens"]
    assert rows["size"]["share_of_budget"] == rows["uniform"]["share_of_budget"] == 0
    assert 0.5 < rows["mixmin"]["share_of_budget"] < 1.2  # few steps: whole ones are rounded
    sizes = rows["size"]["weights"]
    assert sizes == pytest.approx({"good": 0.4, "bad": 0.6})  # of 40 and 60 rows
    keys = [json.loads(line)["key"] for line in (out / "trainings.jsonl").read_text().splitlines()]
    searches = {(key["search"], key["seed"]) for key in keys if "search" in key}
    assert {("learned", 1), ("learned", 2), ("mixmin", 0), ("mixmin", 2)} <= searches
    assert ("learned", 0) not in searches  # that is the run itself
    for row in rows.values():
        assert len(row["seeds"]) == 3
        assert all(seed["loss"] > 0 for seed in row["seeds"])
    with (out / "comparison.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [*rows]
    assert float(table[0]["weight of good"]) == body["rows"][0]["weights"]["good"]
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    text = (out / "comparison.md").read_text()
    assert all(f"| {name} | {rows[name]['loss']:.3f} |" in text for name in rows)
    before = (out / "trainings.jsonl").read_text()
    assert run(folder, out, *words) == 0
    assert (out / "trainings.jsonl").read_text() == before


def row(method, *losses, tokens=1.0):
    return Row(method=method, losses=list(losses), tokens=[tokens] * len(losses))


def test_the_conclusion_names_the_winner_whoever_it_is():
    rows = [
        row("mixmin", 1.0, 1.1, 1.2),
        row("learned", 1.3, 1.4, 1.5001),
        row("uniform", 2.0, 2.0, 2.0, tokens=0.0),
    ]
    lines = conclusion(rows, 1.0)
    assert lines[0].endswith("mixmin, 1.100")
    assert lines[1].startswith("it beats the learned weights (1.400; +0.300 nats")
    assert lines[2] == "with less than nine tenths of the budget: uniform"
    rows[1] = row("learned", 1.0, 1.5, 1.1)
    lines = conclusion(rows, 1.0)
    assert lines[1].startswith("no evidence that it beats learned (1.200; +0.100 nats")
    assert lines[2] == "not told apart from mixmin by these seeds: learned"
    lines = conclusion([row("learned", 1.0, 1.0), row("uniform", 2.0, 2.1)], 1.0)
    assert lines == ["lowest mean test loss of 2 methods over 2 paired seeds: learned, 1.000"]


def test_gains_are_paired_with_uniform():
    """Gains 1, 1.2, 0.8: mean 1, t(0.975, 2) = 4.303, half = 4.303 * 0.2 / sqrt(3) = 0.497."""
    made = dataclasses.replace(
        row("x", 1.0, 2.0, 3.0, tokens=5.0),
        weights=[{"a": 0.2, "b": 0.8}, {"a": 0.4, "b": 0.6}, {"a": 0.6, "b": 0.4}],
        seconds=[None, 2.0, 4.0],
        notes=["", "", ""],
    )
    found = comparison.described(made, row("uniform", 2.0, 3.2, 3.8), 10.0)
    assert found["gain_over_uniform"] == pytest.approx(1.0)
    assert found["interval"] == pytest.approx([1 - 0.497, 1 + 0.497], abs=1e-3)
    assert found["better_than_uniform"] == "3 of 3"
    assert found["share_of_budget"] == 0.5
    assert found["search_seconds"] == 3.0
    assert found["weights"] == pytest.approx({"a": 0.4, "b": 0.6})


def test_all_means_every_method_that_can_run(monkeypatch):
    monkeypatch.setattr("bilevel.problems.llm_reweight.baselines.tpe.find_spec", lambda name: None)
    words, notes = chosen(["all"], ["a", "b"])
    assert set(words) == METHODS.keys() - {"given", "tpe"}
    assert len(notes) == 2
    assert "leaves out tpe: tpe needs optuna" in notes[1]
    with pytest.raises(InputError, match="pip install 'bilevel\\[search\\]'"):
        chosen(["tpe"], ["a", "b"])


def test_faults_are_told_together_before_anything_is_written(folder, tmp_path, capsys):
    words = "compare=mixmim,given,influence:warmup=2"
    assert run(folder, tmp_path / "a", words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "did you mean 'mixmin'" in said[0]
    assert "given:file=PATH" in said[1]
    assert "influence.warmup must be in (0, 1), got 2.0" in said[2]
    assert not (tmp_path / "a").exists()
