"""Projections against their optimality conditions and brute force, on random vectors."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel import projection

entries = st.floats(-3.0, 3.0)
vectors = st.lists(entries, min_size=1, max_size=8).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)
pairs = st.lists(st.tuples(entries, entries), min_size=1, max_size=8).map(
    lambda v: torch.tensor(v, dtype=torch.float64).T
)
shares = st.floats(0.0, 1.0)


@given(pairs, shares)
def test_simplex_is_a_projection(pair, share):
    """I21: feasible, idempotent, nonexpansive, and no point of the set is nearer."""
    a, b = projection.simplex(pair[0]), projection.simplex(pair[1])
    assert abs(float(a.sum()) - 1) <= 1e-12 and float(a.min()) >= 0
    assert torch.allclose(projection.simplex(a), a, atol=1e-14)
    assert (a - b).norm() <= (pair[0] - pair[1]).norm() + 1e-12
    corners = torch.eye(len(a), dtype=torch.float64)  # <v - p, q - p> <= 0 for all q in the set
    assert float(((corners - a) @ (pair[0] - a)).max()) <= 1e-12


@given(pairs, shares)
def test_capped_is_a_projection(pair, share):
    budget = share * pair.shape[1]
    a, b = projection.capped(pair[0], budget), projection.capped(pair[1], budget)
    assert float(a.sum()) <= budget + 1e-12 and float(a.min()) >= 0 and float(a.max()) <= 1
    assert torch.allclose(projection.capped(a, budget), a, atol=1e-12)
    assert (a - b).norm() <= (pair[0] - pair[1]).norm() + 1e-12
    # the largest <v - p, q> over the set is a knapsack: fill the best entries up to the budget
    slope = (pair[0] - a).sort(descending=True).values.clamp(min=0)
    room = (budget - torch.arange(len(a), dtype=torch.float64)).clamp(0, 1)
    assert float(slope @ room - (pair[0] - a) @ a) <= 1e-11


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_capped_equals_bisection_of_its_shift(size):
    generator = torch.Generator().manual_seed(size)
    met = set()
    for share in torch.linspace(0.01, 0.99, 25).tolist():
        v = 2 * torch.randn(size, generator=generator, dtype=torch.float64)
        low, high = 0.0, float(v.abs().max()) + 1
        for _ in range(100):
            middle = (low + high) / 2
            over = float((v - middle).clamp(0, 1).sum()) > share * size
            low, high = (middle, high) if over else (low, middle)
        inside = v.clamp(0, 1)
        expected = inside if float(inside.sum()) <= share * size else (v - high).clamp(0, 1)
        got = projection.capped(v, share * size)
        assert torch.allclose(got, expected, atol=1e-12)
        met |= {bool((got == 1).any()), "shifted" if expected is not inside else "inside"}
    assert size == 1 or met == {True, False, "shifted", "inside"}


@given(vectors, st.integers(1, 8))
def test_sparse_simplex_is_nearest_among_all_supports(v, keep):
    keep = min(keep, len(v))
    got = projection.sparse_simplex(v, keep)
    assert int((got > 0).sum()) <= keep and abs(float(got.sum()) - 1) <= 1e-12
    best = float("inf")
    for support in map(list, itertools.combinations(range(len(v)), keep)):
        other = torch.zeros_like(v)
        other[support] = projection.simplex(v[support])
        best = min(best, float((v - other).norm()))
    assert float((v - got).norm()) <= best + 1e-12
    assert torch.allclose(projection.sparse_simplex(got, keep), got, atol=1e-14)


def test_nothing_kept_is_refused():
    with pytest.raises(bilevel.InputError, match="keep must be at least 1"):
        projection.sparse_simplex(torch.zeros(3), 0)
