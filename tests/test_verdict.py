"""The verdict: fair sampling, paired seeds, and words that follow the numbers."""

import dataclasses
import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.problems.llm_reweight import LLMReweight, training, verdict
from bilevel.problems.llm_reweight.journal import Journal


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 40), st.integers(0, 99))
def test_counts_are_within_one_of_the_shares(values, total, seed):
    shares = torch.tensor([v + 1e-3 for v in values], dtype=torch.float64)
    counts = training.counts(shares, total, torch.Generator().manual_seed(seed))
    assert sum(counts) == total
    wanted = (shares / shares.sum() * total).tolist()
    assert all(abs(c - w) < 1 + 1e-9 for c, w in zip(counts, wanted, strict=True))


def test_counts_are_right_on_average():
    shares = torch.tensor([0.05, 0.25, 0.7], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([training.counts(shares, 6, generator) for _ in range(2000)])
    assert torch.allclose(counts.double().mean(0), 6 * shares, atol=0.05)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    draw = random.Random(0)
    for name, letters in (("right", "abcde"), ("wrong", "vwxyz"), ("target", "abcde")):
        words = ["".join(draw.choices(letters, k=4)) for _ in range(12)]
        rows = [{"text": " ".join(draw.choices(words, k=20))} for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = tuple(str(folder / f"{n}.jsonl") for n in ("right", "wrong"))
    target = str(folder / "target.jsonl")
    options = {"width": 32, "max_length": 24, "batch": 8, "verdict_steps": 40, "verdict_seeds": 2}
    return LLMReweight(sources=sources, target=target, **options)


def test_a_better_mixture_is_found_better(problem):
    mixtures = {
        "learned": {"right": 1.0, "wrong": 0.0},
        "uniform": {"right": 0.5, "wrong": 0.5},
        "oracle": {"right": 1.0, "wrong": 0.0},
    }
    judged = verdict.compare(problem, mixtures)
    assert all(gain > 0 for gain in judged["gain_over_uniform"])
    assert judged["losses"]["learned"] == judged["losses"]["oracle"]
    assert judged["gap_closed"] == pytest.approx(1.0)
    assert verdict.compare(problem, mixtures) == judged


def test_the_uniform_mixture_is_not_called_better(problem):
    even = {"right": 0.5, "wrong": 0.5}
    judged = verdict.compare(problem, verdict.mixtures(problem, even))
    assert judged["gain_over_uniform"] == [0.0, 0.0]
    assert "no evidence against uniform" in judged["sentences"][1]
    same = len(set(map(len, problem.rows))) == 1  # then size is uniform, and said once
    assert len(judged["sentences"]) == (2 if same else 3)


def test_mixtures_of_the_verdict_are_those_of_their_names(problem, monkeypatch):
    right, wrong = problem.rows
    few = dataclasses.replace(wrong, ids=wrong.ids[:10])
    monkeypatch.setattr(type(problem), "rows", property(lambda self: [right, few]))
    found = verdict.mixtures(problem, {"right": 0.9, "wrong": 0.1})
    share = 10 / (10 + len(right))
    assert found["size"] == pytest.approx({"right": 1 - share, "wrong": share})
    assert [*found["uniform"].values()] == [0.5, 0.5]
    assert "oracle" not in found  # nobody knows the right source


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([0.30, 0.32, 0.31], "beats uniform in 3 of 3 seeds (+0.310 nats, 95 % interval +0.285 to"),
        ([0.30, -0.2, 0.1], "no evidence against uniform"),
        ([-0.30, -0.32, -0.31], "worse than uniform"),
        ([0.5], "no evidence against uniform"),
    ],
)
def test_words_follow_the_interval(gains, words):
    """t(0.975, 2) = 4.303, sd = 0.01: half = 4.303 * 0.01 / sqrt(3) = 0.0248."""
    means = {"learned": 1.0, "uniform": 2.0}
    assert words in verdict._sentences(means, {"uniform": gains}, 0.0)[1]
    both = verdict._sentences(means, {"uniform": [0.5, 0.5], "size": gains}, 0.0)
    assert words.replace("uniform", "size-proportional") in both[2]


def test_a_training_is_done_once(problem, tmp_path, monkeypatch):
    done = []

    def train(problem, mixture, *, seed, like=None):
        done.append((tuple(mixture.values()), seed))
        return float(seed)

    monkeypatch.setattr(verdict, "train", train)
    mixtures = verdict.mixtures(problem, {"right": 0.75, "wrong": 0.25})
    mixtures["size"] = mixtures["uniform"]
    first = verdict.compare(problem, mixtures, journal=Journal(tmp_path / "l.jsonl"))
    assert done == [((0.75, 0.25), 0), ((0.75, 0.25), 1), ((0.5, 0.5), 0), ((0.5, 0.5), 1)]
    assert verdict.compare(problem, mixtures, journal=Journal(tmp_path / "l.jsonl")) == first
    assert len(done) == 4
    longer = dataclasses.replace(problem, verdict_steps=41)
    verdict.compare(longer, mixtures, journal=Journal(tmp_path / "l.jsonl"))
    assert len(done) == 8


def test_a_torn_line_of_the_journal_is_computed_again(tmp_path):
    path = tmp_path / "l.jsonl"
    journal = Journal(path)
    journal.keep({"a": 1}, lambda: {"b": 0.1})
    journal.keep({"a": 2}, lambda: 2.0)
    path.write_bytes(path.read_bytes()[:-9])
    again = Journal(path)
    assert {"a": 1} in again and {"a": 2} not in again
    assert again.keep({"a": 1}, lambda: "new") == {"b": 0.1}
    assert again.keep({"a": 2}, lambda: 3.0) == 3.0
    last = Journal(path)
    assert last.keep({"a": 2}, lambda: 4.0) == 3.0
    path.write_text('5\n["x"]\n{"key": 1}\n' + path.read_text())
    assert Journal(path).keep({"a": 1}, lambda: "new") == {"b": 0.1}


def test_another_model_is_judged_on_the_same_rows(problem, tmp_path, monkeypatch):
    """The larger model shares tokens with the first; its trainings are kept apart from that's."""
    seen = []

    def train(problem, mixture, *, seed, like=None):
        layers = problem.fresh_model(0).config.num_hidden_layers
        seen.append((layers, problem.width, problem.rows[0] is rows[0]))
        return float(seed) + mixture["wrong"] * layers

    rows = problem.rows
    monkeypatch.setattr(verdict, "train", train)
    mixtures = {"learned": {"right": 1.0, "wrong": 0.0}, "uniform": {"right": 0.5, "wrong": 0.5}}
    larger = dataclasses.replace(problem, transfer="3x48")
    vars(larger).update(vars(problem) | {"transfer": "3x48"})
    journal = Journal(tmp_path / "t.jsonl")
    own = verdict.compare(larger, mixtures, journal=journal)
    other = verdict.transferred(larger, mixtures, journal=journal)
    assert set(seen) == {(2, 32, True), (3, 48, True)}
    assert own["gain_over_uniform"] == [1.0, 1.0]
    assert other["gain_over_uniform"] == [1.5, 1.5]
    assert other["model"] == "3x48"
    assert all(line.startswith("on 3x48: ") for line in other["sentences"])


def test_a_folder_to_transfer_to_brings_its_own_tokenizer(problem, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model = problem.fresh_model(3)
    model.save_pretrained(folder)
    problem.tokenizer.save_pretrained(folder)
    other = verdict.another(problem, str(folder))
    assert (other.model, other.transfer) == (str(folder), "")
    assert not other.check()
    larger = dataclasses.replace(problem, transfer=str(folder), verdict_steps=1, verdict_seeds=1)
    judged = verdict.transferred(larger, verdict.mixtures(problem, {"right": 1.0, "wrong": 0.0}))
    assert judged["losses"]["learned"][0] > 0


@pytest.mark.parametrize(
    ("transfer", "words"),
    [
        ("4x100", "of problem.transfer=4x100: problem.width must be a multiple of 16, got 100."),
        ("0x64", "problem.layers must be at least 1, got 0"),
        ("no/such/folder", "found no such folder"),
    ],
)
def test_a_model_to_transfer_to_is_checked_first(problem, transfer, words):
    faults = dataclasses.replace(problem, transfer=transfer).check()
    assert len(faults) == 1
    assert words in faults[0]
