"""The verdict: fair sampling, paired seeds, and words that follow the numbers."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.problems.llm_reweight import LLMReweight, training, verdict


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
    assert words in verdict._sentences({"learned": 1.0, "uniform": 2.0}, gains, 0.0)[1]
