"""What a run with several targets leaves: every loss of each of them, and true sums of these."""

import csv
import html
import io
import json
import random
from pathlib import Path

import pytest
import torch
from scipy import stats

from bilevel.problems.llm_reweight import LLMReweight, output, report
from bilevel.problems.llm_reweight.baselines import drawing
from bilevel.problems.llm_reweight.model import example_losses
from bilevel.problems.llm_reweight.tokens import collate
from bilevel.run import main

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads(Path(output.__file__).with_name("weights.schema.json").read_text())
NAMES = ("math", "<i>a|b")
WEIGHTS = {"math": 0.75, "<i>a|b": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    letters = {"sea": "abcde", "law": "vwxyz", "math": "abc", "chat": "vwabc"}
    for name, own in letters.items():
        words = [["".join(draw.choices(own, k=4)) for _ in range(9)] for _ in range(24)]
        rows = "".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words)
        (place / f"{name}.jsonl").write_text(rows)
    return place


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    words = ["problem=llm_reweight", "steps=8", "width=16", "layers=1", "batch=4", f"out={out}"]
    words += ["max_length=24", "target_batch=4", "solver.warmup=2", "solver.upper_lr=0.3"]
    words += [f"sources={folder / 'sea.jsonl'} {folder / 'law.jsonl'}", "target_weight=math=3"]
    words += [f"target=math={folder / 'math.jsonl'} '{NAMES[1]}={folder / 'chat.jsonl'}'"]
    words += ["verdict_steps=3", "verdict_seeds=2", "compare=size"]
    assert main(words) == 0
    return out, words


def weighted(losses):
    return sum(WEIGHTS[name] * losses[name] for name in NAMES)


def test_weights_json_tells_each_target(run):
    found = json.loads((run[0] / "weights.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["objective"] == "sum of mean losses per example: 0.75 on math, 0.25 on <i>a|b"
    assert {t["name"]: t["weight"] for t in found["targets"]} == WEIGHTS
    assert found["target"]["records"] == 36 == sum(t["records"] for t in found["targets"])
    assert [t["test_records"] for t in found["targets"]] == [6, 6]
    judged = {t["name"]: t for t in found["verdict"]["targets"]}
    for target in found["targets"]:
        own = judged[target["name"]]
        for name in ("uniform", "learned"):
            assert target["loss"][name] == pytest.approx(sum(own["losses"][name]) / 2)
        pairs = zip(own["losses"]["uniform"], own["losses"]["learned"], strict=True)
        gains = [u - learned for u, learned in pairs]
        assert target["gain_over_uniform"] == pytest.approx(sum(gains) / 2, abs=1e-12)
        wanted = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
        assert target["interval"] == pytest.approx([wanted.low, wanted.high], abs=1e-9)
    for name, totals in found["verdict"]["losses"].items():
        for seed, total in enumerate(totals):
            each = {n: t["losses"][name][seed] for n, t in judged.items()}
            assert total == pytest.approx(weighted(each), rel=1e-12)
    for key in ("before", "uniform", "learned"):
        each = {t["name"]: t["loss"][key] for t in found["targets"]}
        assert found["target"]["loss"][key] == pytest.approx(weighted(each), rel=1e-12)
    gains = found["verdict"]["gain_over_uniform"]
    wanted = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert found["target"]["interval"] == pytest.approx([wanted.low, wanted.high], abs=1e-9)
    said = "\n".join(found["verdict"]["sentences"])
    assert "on target math, weight 0.75: " in said and "on target <i>a|b, weight 0.25: " in said


def test_before_is_the_loss_of_untrained_models(run, folder):
    found = json.loads((run[0] / "weights.json").read_text())
    problem = LLMReweight(
        sources=tuple(str(folder / f"{n}.jsonl") for n in ("sea", "law")),
        target=tuple(
            f"{n}={folder / f}.jsonl" for n, f in zip(NAMES, ("math", "chat"), strict=True)
        ),
        **{"width": 16, "layers": 1, "max_length": 24},
    )
    for target, own in zip(found["targets"], problem.targets, strict=True):
        picks = [(0, i) for i in range(len(own.test))]
        batch = collate([own.test], picks, [1.0] * len(picks))
        with torch.no_grad():
            losses = [example_losses(problem.fresh_model(1000 + s), batch).mean() for s in (0, 1)]
        assert target["loss"]["before"] == pytest.approx(float(sum(losses)) / 2, abs=1e-5)


def test_the_paths_of_a_search_have_every_target(run):
    rows = [json.loads(line) for line in (run[0] / "trajectory.jsonl").read_text().splitlines()]
    table = list(csv.DictReader(io.StringIO((run[0] / "trajectory.csv").read_text())))
    found = json.loads((run[0] / "weights.json").read_text())
    for row, cells in zip(rows, table, strict=True):
        assert row["upper"] == pytest.approx(weighted(row["targets"]), rel=1e-9)
        assert {n: float(cells[f"target {n}"]) for n in NAMES} == row["targets"]
    for target in found["targets"]:
        path = [row["targets"][target["name"]] for row in rows]
        ends = {"first": sum(path[:2]) / 2, "last": sum(path[-2:]) / 2}
        assert target["search"] == pytest.approx(ends)


def test_the_comparison_has_every_target(run):
    body = json.loads((run[0] / "comparison.json").read_text())
    rows = {row["method"]: row for row in body["rows"]}
    table = list(csv.DictReader(io.StringIO((run[0] / "comparison.csv").read_text())))
    for name, row in rows.items():
        each = {n: found["loss"] for n, found in row["targets"].items()}
        assert row["loss"] == pytest.approx(weighted(each), rel=1e-12)
        for target in NAMES:
            base = rows["uniform"]["targets"][target]["loss"]
            gain = row["targets"][target]["gain_over_uniform"]
            assert gain == pytest.approx(base - each[target], abs=1e-12)
        (cells,) = (c for c in table if c["method"] == name)
        assert {n: float(cells[f"loss on {n}"]) for n in NAMES} == each
    text = (run[0] / "comparison.md").read_text()
    assert "| method | math | &lt;i&gt;a\\|b |" in text


def test_the_report_shows_every_target_and_escapes_its_name(run):
    page = (run[0] / "report.html").read_text()
    assert html.escape(NAMES[1]) in page and NAMES[1] not in page
    part = page.partition('<table id="targets">')[2].partition("</table>")[0]
    found = json.loads((run[0] / "weights.json").read_text())
    for target in (*found["targets"], found["target"]):
        assert f"<td>{target['loss']['learned']:.3f}</td>" in part
        assert f"{target['interval'][0]:+.3f} to {target['interval'][1]:+.3f}" in part
    assert "by their weights" in part and 'id="comparison-targets"' in page


def test_nothing_is_trained_twice(run, capsys, monkeypatch):
    out, words = run
    monkeypatch.setattr(report, "write", lambda *a, **k: None)  # plots are slow
    monkeypatch.setattr(drawing, "draw", lambda *a: "")
    names = ("trainings.jsonl", "weights.json", "trajectory.jsonl")
    before = [(out / name).read_text() for name in names]
    assert main(words) == 0
    assert [(out / name).read_text() for name in names] == before
    assert (
        "target math, weight 0.75: 18 rows, 3 in each batch; test: 6 rows"
        in capsys.readouterr().out
    )
