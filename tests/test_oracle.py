"""Derivatives, counted, against closed forms and finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bilevel import Functions, Problem
from bilevel.oracle import Oracle
from bilevel.problems.quadratic import Quadratic

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)


def point(problem):
    generator = torch.Generator().manual_seed(problem.data_seed)
    x = torch.randn(problem.dim_x, generator=generator, dtype=torch.float64)
    y = torch.randn(problem.dim_y, generator=generator, dtype=torch.float64)
    return x, y, torch.randn(problem.dim_y, generator=generator, dtype=torch.float64)


@given(quadratics)
def test_gradients_of_the_quadratic(problem):
    d, (x, y, _) = problem.data(), point(problem)
    oracle = Oracle(problem, {})
    upper, lower = oracle.upper(x, y, None), oracle.lower(x, y, None)
    r = d["C"].T @ (d["C"] @ y - d["c"])
    assert torch.allclose(upper.y[0], r + d["D"].T @ x)
    assert torch.allclose(upper.x[0], d["D"] @ y + problem.rho * (x - d["s"]))
    assert torch.allclose(lower.y[0], d["A"] @ y - d["B"] @ x - d["b"])
    assert torch.allclose(lower.x[0], x - d["B"].T @ y)
    assert lower.value == pytest.approx(float(problem.lower(x, y, None)))
    assert oracle.counts == {"upper_grad": 1, "lower_grad": 1}


@given(quadratics)
def test_products_of_the_quadratic(problem):
    """By one reused graph, exact; by finite differences, to their rounding; y stays as it was."""
    d, (x, y, v) = problem.data(), point(problem)
    was = y.clone()
    for make, tolerance in (("curvature", 1e-12), ("finite_curvature", 1e-7)):
        oracle = Oracle(problem, {})
        bend = getattr(oracle, make)(x, y, None)
        hvp, cross = d["A"] @ v, -d["B"].T @ v
        for h, j in ((bend.hvp([v]), bend.cross([v])), bend.both([v])):
            assert (h[0] - hvp).norm() <= tolerance * (1 + hvp.norm())
            assert (j[0] - cross).norm() <= tolerance * (1 + cross.norm())
        pushed = bend.push([x.clone()])[0]
        assert (pushed + d["B"] @ x).norm() <= tolerance * (1 + pushed.norm())
        assert torch.allclose(bend.gradient[0], d["A"] @ y - d["B"] @ x - d["b"])
        assert torch.equal(y, was)
        if make == "curvature":
            assert oracle.counts == {"lower_grad": 1, "hvp": 2, "cross": 3}
        else:
            assert oracle.counts == {"lower_grad": 1 + 4 * 2}


@given(quadratics)
def test_products_of_the_upper_loss(problem):
    d, (x, y, v) = problem.data(), point(problem)
    oracle = Oracle(problem, {})
    bend = oracle.upper_curvature(x, y, None)
    assert torch.allclose(bend.hvp([v])[0], d["C"].T @ (d["C"] @ v))
    assert torch.allclose(bend.cross([v])[0], d["D"] @ v)
    assert torch.allclose(bend.push([x])[0], d["D"].T @ x)
    assert oracle.counts == {"upper_grad": 1, "upper_hvp": 1, "upper_cross": 2}


class Attention(Problem):
    """A module with fused attention as y, a tree of two weights as x, and two micro-batches."""

    def init(self, generator):
        torch.manual_seed(0)
        y = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        return {"a": torch.ones(2, dtype=torch.float64), "unused": torch.ones(1).double()}, y

    def lower(self, x, y, batch):
        rows = y(batch, batch, batch, need_weights=False)[0].square().mean((1, 2))
        penalty = sum(p.square().sum() for p in y.parameters())
        return x["a"][0].exp() * rows.sum() + 0.1 * x["a"][1].exp() * len(batch) * penalty

    def upper(self, x, y, batch):
        return self.lower(x, y, batch)

    def split(self, batch):
        return batch.split(2)


def test_module_with_attention_has_second_derivatives():
    """Against a central difference of gradients, which needs none; the parts add up."""
    problem = Attention()
    x, y = problem.init(torch.Generator())
    batch = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = [torch.randn_like(p) for p in y.parameters()]
    oracle = Oracle(problem, {})
    exact, finite = oracle.curvature(x, y, batch), oracle.finite_curvature(x, y, batch)
    u = [torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    both = [(*bend.both(v), bend.push(u)) for bend in (exact, finite)]
    for a, b in zip(*both, strict=True):
        for p, q in zip(a, b, strict=True):
            assert torch.allclose(p, q, atol=1e-7, rtol=1e-6)
    whole = problem.lower(x, y, batch).item()
    assert exact.value == pytest.approx(whole) and finite.value == pytest.approx(whole)
    assert not x["a"].requires_grad and x["a"].grad is None


def test_a_linear_lower_loss_has_zero_curvature():
    problem = Functions(
        lambda x, y: (x * y).sum(), lambda x, y: y.sum(), torch.ones(2), torch.ones(2)
    )
    x, y = problem.init(torch.Generator())
    bend = Oracle(problem, {}).curvature(x, y, None)
    h, j = bend.both([torch.ones(2)])
    assert not h[0].any() and not j[0].any() and not bend.push([torch.ones(2)])[0].any()
