"""From weights to shares, counts and factors: the arithmetic that all exports use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.problems.llm_reweight.exports import finetuners
from bilevel.problems.llm_reweight.exports.shares import Shares, exact_fraction

positive = st.floats(1e-3, 1.0)
mixtures = st.lists(st.tuples(positive, st.integers(1, 10_000), st.floats(0.5, 2000)), min_size=1)


def shares_of(rows_, unit):
    weights, sizes, tokens = (tuple(column) for column in zip(*rows_, strict=True))
    return Shares(weights=weights, records=sizes, tokens=tokens, unit=unit)


@given(mixtures, st.integers(0, 10**7))
def test_counts_are_shares_to_the_nearest_record(rows_, total):
    for unit in ("examples", "tokens"):
        shares = shares_of(rows_, unit)
        counts = shares.counts(total)
        assert sum(counts) == total
        exact = [q * total for q in shares.examples]
        assert all(abs(c - e) < 1 + 1e-6 for c, e in zip(counts, exact, strict=True))
        within = shares.counts(shares.largest)
        assert all(c <= n for c, n in zip(within, shares.records, strict=True))
        more = shares.epochs(shares.largest + 1)
        assert max(more) > 1 - 1e-9


@given(mixtures, st.data())
def test_a_trainer_that_draws_so_minimizes_the_learned_loss(rows_, draws):
    """Averaged over tokens, sum q t l / sum q t; averaged over examples, sum q l: sum w l both."""
    losses = [draws.draw(st.floats(0.1, 10)) for _ in rows_]
    w = [weight / sum(r[0] for r in rows_) for weight, _, _ in rows_]
    wanted = sum(a * b for a, b in zip(w, losses, strict=True))
    q, t = shares_of(rows_, "tokens").examples, [row[2] for row in rows_]
    drawn = sum(a * b * c for a, b, c in zip(q, t, losses, strict=True))
    assert drawn / sum(a * b for a, b in zip(q, t, strict=True)) == pytest.approx(wanted)
    q = shares_of(rows_, "examples").examples
    assert sum(a * b for a, b in zip(q, losses, strict=True)) == pytest.approx(wanted)
    both = [shares_of(rows_, unit) for unit in ("examples", "tokens")]
    sizes = [row[1] / sum(r[1] for r in rows_) for row in rows_]
    for shares in both:
        by_size = [s * m for s, m in zip(sizes, shares.multipliers(), strict=True)]
        assert by_size == pytest.approx(shares.examples)
    assert both[1].trained_tokens == pytest.approx(w)


@given(st.integers(1, 10_000), st.integers(0, 50_000))
def test_a_fraction_is_read_back_as_its_count(size, count):
    fraction = exact_fraction(count, size)
    assert int(fraction * size) == count
    assert abs(fraction - count / size) < 1e-9


@given(st.integers(1, 10**8), st.integers(1, 10**9))
def test_a_factor_is_written_with_a_point_and_without_exponent(size, count):
    fraction = exact_fraction(count, size)
    text = finetuners._with_point(fraction)
    assert "." in text and "e" not in text and float(text) == fraction
