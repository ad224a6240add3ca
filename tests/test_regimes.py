"""The regimes benchmark: its worlds hold what they promise, its intervals are Student's."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
from scipy import stats

HERE = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def worlds():
    sys.path.insert(0, str(HERE))
    try:
        yield importlib.import_module("regimes_data")
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def regimes(worlds):
    return importlib.import_module("regimes")


def answers(records):
    """Counts of answers by what was asked: the question without its two words of filling."""
    found = {}
    for question, answer in records:
        found.setdefault(" ".join(question.split()[2:]), Counter())[answer] += 1
    return found


@pytest.mark.parametrize("name", ["ways", "styles"])
def test_target_mixes_both_ways_in_the_shares_given_by_hand(worlds, name):
    world = getattr(worlds, name)(3)
    exact = world.by_hand["exact shares"]
    for k in range(len(exact) // 2):
        first, second = (answers(world.sources[f"{way} {k}"]) for way in ("first", "second"))
        assert first.keys() == second.keys()
        assert all(len(c) == 1 for c in (*first.values(), *second.values()))
        assert all(first[q] != second[q] for q in first)
        seen = [a for q, c in answers(world.target).items() if q in first for a in c.elements()]
        told = [q for q, c in answers(world.target).items() if q in first for _ in c.elements()]
        hits = sum(a in first[q] for q, a in zip(told, seen, strict=True))
        assert hits + sum(a in second[q] for q, a in zip(told, seen, strict=True)) == len(seen)
        share = exact[f"first {k}"]
        assert exact[f"second {k}"] == pytest.approx(1 - share)
        error = (share * (1 - share) / len(seen)) ** 0.5
        assert abs(hits / len(seen) - share) < 4 * error  # four standard errors


def test_hollow_answers_say_nothing_about_the_question(worlds):
    world = worlds.ways(3)
    records = [r for n, rows in world.sources.items() if n.startswith("hollow") for r in rows]
    table = answers(records)
    assert table.keys() == answers(world.target).keys()  # the target's questions, all of them
    said = sorted({a for c in table.values() for a in c})
    counts = [[c[a] for a in said] for c in table.values()]
    assert stats.chi2_contingency(counts).pvalue > 1e-4


@pytest.mark.parametrize("name", ["ways", "styles", "skills", "crowd"])
def test_worlds_are_drawn_by_their_seed(worlds, name):
    make = getattr(worlds, name)
    assert make(1) == make(1)
    assert make(1).target != make(2).target
    for mixture in make(1).by_hand.values():
        assert mixture.keys() <= make(1).sources.keys()


def test_difference_is_students_interval_of_paired_gaps(regimes):
    own, base = [1.3, 1.5, 1.1, 1.9], [1.0, 1.1, 1.2, 1.3]
    found = {s: {"loss": v} for s, v in enumerate(own)}
    text = regimes.difference(found, {s: {"loss": v} for s, v in enumerate(base)})
    gaps = [a - b for a, b in zip(own, base, strict=True)]
    low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert text == f"{sum(gaps) / 4:+.3f} ({low:+.3f} to {high:+.3f}), 3 of 4"


@pytest.mark.slow  # trains a model a few steps on 28 sources
def test_budget_is_what_the_search_uses_and_nothing_runs_twice(regimes, tmp_path, monkeypatch):
    monkeypatch.setattr(regimes, "STEPS", 6)
    monkeypatch.setattr(regimes, "GRADIENT", 2)
    bench = regimes.Bench(regime="ways", seed=0, folder=tmp_path)
    first = regimes.bilevel_weights(bench, 6)
    assert first["cost"] == pytest.approx(1)
    found = bench.searched("influence", regimes.checkpoints)
    assert len(found["found"]) == len(regimes.MARKS)
    assert 0.8 < found["cost"] <= 1.05  # whole steps and rows
    assert all(len(row) == len(bench.problem().names) for row in found["found"])
    regimes._store.cache_clear()
    monkeypatch.setattr(regimes.bilevel, "solve", None)  # not to be called again
    assert regimes.bilevel_weights(bench, 6) == first
