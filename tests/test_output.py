"""weights.json and its companions: true to their schema and to every seed, there from the start."""

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import bilevel.run
from bilevel import export
from bilevel.problems.llm_reweight import LLMReweight, output, paths, spread
from bilevel.problems.llm_reweight.records import name_paths
from bilevel.run import main

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads(Path(output.__file__).with_name("weights.schema.json").read_text())
SIZES = {"sea": 30, "law": 45, "food": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for (name, size), letters in zip(SIZES.items(), ("abcde", "vwxyz", "klmno"), strict=True):
        words = [["".join(draw.choices(letters, k=4)) for _ in range(12)] for _ in range(size)]
        rows = [{"prompt": " ".join(w[:4]), "completion": " ".join(w[4:])} for w in words]
        rows += rows[:3] if name == "law" else []
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [
        {"text": " ".join("".join(draw.choices("abcde", k=4)) for _ in range(9))} for _ in "8" * 8
    ]
    (folder / "target.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def words(data, out, *more):
    given = ["problem=llm_reweight", "steps=12", "width=16", "batch=6", "target_batch=2"]
    given += ["max_length=32", "solver.warmup=2", "solver.upper_lr=0.2", "verdict_steps=3"]
    given += ["verdict_seeds=2", "checkpoint_every=4", f"out={out}", *more]
    sources = " ".join(str(data / f"{name}.jsonl") for name in SIZES)
    return [*given, f"sources={sources}", f"target={data / 'target.jsonl'}"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two single runs with seeds 3 and 4, and one with both seeds."""
    out = tmp_path_factory.mktemp("runs")
    for seed in (3, 4):
        assert main(words(data, out / str(seed), f"seed={seed}", "verdict=false")) == 0
    assert main(words(data, out / "both", "seed=3", "seeds=2")) == 0
    return out


def body(folder):
    found = json.loads((folder / "weights.json").read_text())
    jsonschema.validate(found, SCHEMA)
    return found


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_the_schema_is_a_schema_and_refuses(runs):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for key, wrong in (("schema", "bilevel.llm_reweight/2"), ("seeds", []), ("converged", None)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(body(runs / "3") | {key: wrong}, SCHEMA)


def test_two_seeds_are_two_runs(runs):
    single, both = [body(runs / s) for s in "34"], body(runs / "both")
    assert both["seeds"] == [3, 4] and single[0]["seeds"] == [3]
    for a, b, source in zip(*(x["sources"] for x in (*single, both)), strict=True):
        assert source["weight_by_seed"] == [a["weight"], b["weight"]]
        assert source["weight"] == pytest.approx((a["weight"] + b["weight"]) / 2, rel=1e-12)
        spread_ = abs(a["weight"] - b["weight"]) / 2**0.5  # of two values
        assert source["weight_std"] == pytest.approx(spread_, rel=1e-9) and spread_ > 0
        assert a["weight_std"] is None
    assert sum(s["weight"] for s in both["sources"]) == pytest.approx(1, abs=1e-12)


def test_shares_follow_their_definitions(runs):
    sources = {s["name"]: s for s in body(runs / "both")["sources"]}
    total = sum(SIZES.values()) + 3
    per_record = {n: s["trained_tokens"] / SIZES[n] for n, s in sources.items()}
    whole = sum(s["weight"] * per_record[n] for n, s in sources.items())
    for name, s in sources.items():
        records = SIZES[name] + 3 * (name == "law")  # the copies are records, but train once
        assert s["records"] == records and s["tokens_per_record"] == per_record[name]
        assert s["share_examples"] == s["weight"]
        assert s["share_tokens"] == pytest.approx(s["weight"] * per_record[name] / whole)
        assert s["repeat_at_size_preserving_total"] == pytest.approx(s["weight"] * total / records)
        assert s["epochs_at"]["10000"] == pytest.approx(s["weight"] * 10_000 / records)
        assert Path(s["path"]).is_absolute() and Path(s["path"]).exists()


def test_tables_hold_the_same_numbers(runs):
    found = body(runs / "both")
    rows = table(runs / "both" / "weights.csv")
    mapping = yaml.safe_load((runs / "both" / "weights.yaml").read_text())
    for row, source in zip(rows, found["sources"], strict=True):
        for key in ("weight", "weight_std", "share_tokens", "records"):
            assert float(row[key]) == source[key]
        assert float(row["repeat"]) == source["repeat_at_size_preserving_total"]
        assert mapping[row["name"]] == source["weight"]
    path = table(runs / "both" / "trajectory.csv")
    assert [(r["seed"], r["step"]) for r in path] == [
        (s, str(i + 1)) for s in "34" for i in range(12)
    ]
    last = json.loads((runs / "4" / "trajectory.jsonl").read_text().splitlines()[-1])
    assert float(path[-1]["weight sea"]) == last["weights"]["sea"]
    assert float(path[-1]["upper"]) == last["upper"]


def test_the_verdict_and_the_method_are_in_it(runs):
    found = body(runs / "both")
    losses = found["verdict"]["losses"]
    for name in ("uniform", "learned"):
        assert found["target"]["loss"][name] == pytest.approx(sum(losses[name]) / 2)
    assert body(runs / "3")["target"]["loss"] == {"uniform": None, "learned": None}
    assert found["method"]["solver"]["name"] == "scalebio_votes" and found["method"]["seeds"] == 2
    assert {"python", "torch", "transformers", "bilevel"} <= found["environment"].keys()
    assert any("still move" in line for line in found["warnings"]) != found["converged"]


def test_one_seed_says_that_its_spread_is_unknown(runs):
    assert "was not measured; seeds=3" in body(runs / "3")["spread"]["sentences"][0]
    assert "over 2 seeds" in body(runs / "both")["spread"]["sentences"][-1]


def test_a_crashed_run_has_left_weights(data, tmp_path, monkeypatch):
    call = bilevel.run._Progress.__call__

    def crashing(self, state, record):
        if state.step == 11:
            raise MemoryError
        call(self, state, record)

    monkeypatch.setattr(bilevel.run._Progress, "__call__", crashing)
    with pytest.raises(MemoryError):
        main(words(data, tmp_path / "a", "seeds=2"))
    found = body(tmp_path / "a")
    assert (found["status"], found["steps"], found["seeds"]) == ("RUNNING", 8, [0])
    assert not found["converged"]
    rows = table(tmp_path / "a" / "trajectory.csv")
    assert [row["step"] for row in rows] == [str(i + 1) for i in range(8)]


def test_a_stopped_run_says_so(data, tmp_path, monkeypatch):
    call = bilevel.run._Progress.__call__

    def stopping(self, state, record):
        call(self, state, record)
        if state.step == 6:
            raise StopIteration

    monkeypatch.setattr(bilevel.run._Progress, "__call__", stopping)
    assert main(words(data, tmp_path / "a")) == 130
    found = body(tmp_path / "a")
    assert (found["status"], found["steps"], found["converged"]) == ("STOPPED", 6, False)


def path_of(*weights):
    return [{"weights": dict(zip("abc", w, strict=False))} for w in weights]


def test_the_last_quarter_is_averaged_and_its_drift_measured():
    path = path_of(*([(0.5, 0.5)] * 4), (0.2, 0.8), (0.4, 0.6), (0.7, 0.3), (0.9, 0.1))
    assert spread.averaged_weights(path) == pytest.approx({"a": 0.8, "b": 0.2})
    assert spread.drift(path) == pytest.approx(0.5)  # from 0.3 to 0.8
    assert spread.drift(path[:1]) == 1.0
    assert spread.drift(path[:4]) == 0.0


@pytest.mark.parametrize(
    ("seeds", "groups"),
    [
        ([(0.5, 0.3, 0.2)], []),  # one seed tells nothing
        ([(0.4, 0.4, 0.2)] * 3, [["a", "b"]]),
        ([(0.45, 0.35, 0.2), (0.35, 0.45, 0.2), (0.42, 0.38, 0.2)], [["a", "b"]]),
        # always 0.02 apart: small, but no noise
        ([(0.41, 0.39, 0.2), (0.411, 0.391, 0.198), (0.409, 0.389, 0.202)], []),
        # noise holds zero, but the mean difference is large
        ([(0.7, 0.1, 0.2), (0.2, 0.6, 0.2), (0.7, 0.1, 0.2)], []),
        ([(0.33, 0.34, 0.33), (0.34, 0.32, 0.34), (0.33, 0.34, 0.33)], [["a", "b", "c"]]),
    ],
)
def test_interchangeable_is_what_noise_cannot_tell_apart(seeds, groups):
    found = spread.interchangeable([dict(zip("abc", w, strict=True)) for w in seeds])
    assert [sorted(group) for group in found] == groups


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=6))
def test_the_rule_for_a_pair_is_the_stated_one(pairs):
    seeds = [{"a": a, "b": b} for a, b in pairs]
    d = [a - b for a, b in pairs]
    mean = sum(d) / len(d)
    small = abs(mean) <= 0.25 * sum(a + b for a, b in pairs) / 2 / len(d)
    apart = len({round(x, 12) for x in d}) > 1  # else there is no deviation to test by
    margin = abs(mean) - 0.25 * sum(a + b for a, b in pairs) / 2 / len(d)
    p = stats.ttest_1samp(d, 0).pvalue if apart else 0.05
    if abs(p - 0.05) > 1e-6 and abs(margin) > 1e-9:
        assert bool(spread.interchangeable(seeds)) == (small and p > 0.05)


def test_a_run_goes_on_and_is_exported_from_another_folder(data, tmp_path, monkeypatch):
    """Its config.yaml has whole paths, of sources under the names that they had."""
    monkeypatch.chdir(data)
    mine = ["sources=sea.jsonl law.jsonl tasty=food.jsonl", "target=target.jsonl"]
    own = {word.partition("=")[0] for word in mine}
    given = [w for w in words(data, tmp_path / "out") if w.partition("=")[0] not in own]
    assert main([*given, *mine, "verdict=false"]) == 0
    first = body(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "out" / "config.yaml"
    assert "'sources=sea.jsonl law.jsonl tasty=food.jsonl'" in config.read_text().splitlines()[1]
    assert main([f"config={config}", "steps=14"]) == 0
    again = body(tmp_path / "out")
    assert (first["steps"], again["steps"]) == (12, 14)
    assert [s["name"] for s in again["sources"]] == ["sea", "law", "tasty"]
    assert [s["path"] for s in again["sources"]] == [s["path"] for s in first["sources"]]
    assert export.main([str(tmp_path / "out"), "--to", "mixed"]) == 0


def test_paths_of_a_config_keep_names_and_what_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ["a=b.jsonl", "x/same.jsonl", "y/same.jsonl", " c.jsonl", "d e.jsonl", "tiny"]
    for name in [*odd, "model/config.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    entries = ("a=b.jsonl", "x/same.jsonl", "y/same.jsonl", " c.jsonl", "named=d e.jsonl")
    problem = LLMReweight(
        sources=entries,
        target="d e.jsonl",
        test="gone.jsonl",
        model="tiny",
        transfer="model",
        compare=("size", "given:file=tiny", "given:file=gone.json"),
    )
    whole = paths.rooted(problem)
    before, after = name_paths(problem.sources), name_paths(whole.sources)
    assert {n: str(tmp_path / path) for n, path in before.items()} == after
    assert whole.target == str(tmp_path / "d e.jsonl") and whole.test == "gone.jsonl"
    assert whole.model == "tiny" and whole.transfer == str(tmp_path / "model")
    assert whole.compare == ("size", f"given:file={tmp_path / 'tiny'}", "given:file=gone.json")
    assert paths.rooted(whole) == whole
    assert paths.rooted(replace(problem, model="model")).model == str(tmp_path / "model")
    records = [{"text": "a"}]
    own = LLMReweight(sources={"a": records}, target=records)
    assert paths.rooted(own) == own
