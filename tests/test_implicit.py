"""Implicit differentiation against closed forms on the analytic families."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.implicit import AID

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)


def estimate(problem, x, y, **options):
    """The hypergradient that one step of AID takes at (x, y), and the state after it."""
    solver = AID(inner_steps=0, upper_optimizer="sgd", upper_lr=1.0, **options)
    launcher = bilevel.Single()
    state = solver.init(problem, bilevel.Full(), launcher, torch.Generator().manual_seed(0))
    state.variables["x"].assign([x])
    state.variables["y"].assign([y])
    solver.step(problem, launcher, state)
    return x - state.variables["x"].value.detach(), state


@given(quadratics, st.sampled_from(["cg", "minres"]), st.sampled_from(["graph", "finite"]))
def test_equals_the_closed_form_at_the_lower_solution(problem, linear, products):
    x = torch.ones(problem.dim_x, dtype=torch.float64)
    known = problem.solution()
    options = {"linear": linear, "linear_steps": 100, "linear_tolerance": 1e-13}
    got, _ = estimate(problem, x, known.lower(x), products=products, **options)
    true = known.hypergradient(x)
    tolerance = 1e-10 if products == "graph" else 1e-6  # rounding of a difference of gradients
    assert (got - true).norm() <= tolerance * problem.condition * (1 + true.norm())


@given(quadratics, st.integers(0, 10), st.floats(0.0, 1.0))
def test_inexactness_is_within_its_bound(problem, steps, offset):
    """I11: |est - dF| <= (|D| + |C'C| |B| / mu) |y - y*| + |B| / mu |H v - r|."""
    d, known = problem.data(), problem.solution()
    x = torch.ones(problem.dim_x, dtype=torch.float64)
    star = known.lower(x)
    y = star + offset * torch.randn(problem.dim_y, generator=torch.Generator().manual_seed(1))
    got, state = estimate(problem, x, y, linear_steps=max(1, steps), linear_tolerance=0.0)
    v = state.vectors["v"][0]
    r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
    norm = lambda m: torch.linalg.matrix_norm(m, 2)  # noqa: E731
    bound = (norm(d["D"]) + norm(d["C"].T @ d["C"]) * norm(d["B"])) * (y - star).norm()
    bound = bound + norm(d["B"]) * (d["A"] @ v - r).norm()  # mu is 1
    error = (got - known.hypergradient(x)).norm()
    assert error <= bound * (1 + 1e-9) + 1e-9
    residual = float((d["A"] @ v - r).norm() / r.norm())
    assert state.numbers["linear_residual"] == pytest.approx(residual, abs=1e-9)


@pytest.mark.parametrize("linear", ["cg", "minres", "neumann"])
def test_reaches_the_optimum_of_the_quadratic(linear):
    problem = Quadratic(condition=3.0)
    solver = AID(linear=linear, upper_optimizer="sgd", upper_lr=0.05, lower_lr=0.3)
    result = bilevel.solve(problem, solver, steps=400)
    assert (result.x - problem.solution().x).norm() <= 1e-5  # CG's own tolerance
    assert not result.warnings


def test_is_exact_on_the_softmax_mixture():
    problem = SoftmaxMixture()
    x = torch.linspace(-1, 1, problem.sources, dtype=torch.float64)
    got, _ = estimate(problem, x, problem.solution().lower(x))
    assert torch.allclose(got, problem.solution().hypergradient(x), atol=1e-12)


def test_oracle_counts():
    solver = AID(linear="neumann", linear_steps=5, inner_steps=3, warm=False)
    counts = bilevel.solve(Quadratic(), solver, steps=7).counts
    assert counts == {"upper_grad": 7, "lower_grad": 7 * 4, "hvp": 7 * 4, "cross": 7}


def test_constraints_of_the_lower_level_are_refused():
    zero = torch.zeros(())
    with pytest.raises(bilevel.InputError, match="project_lower"):
        bilevel.minimize(
            lambda x, y: y**2,
            lambda x, y: (y - x) ** 2,
            zero,
            zero,
            solver="aid",
            project_lower=lambda y: y.clamp(0, 1),
        )


def test_a_singular_lower_level_is_reported():
    """Family M in one line: w is free, so H is singular."""
    result = bilevel.minimize(
        lambda x, y: ((y - 1) ** 2).sum(),
        lambda x, y: (y[0] - x) ** 2,
        torch.zeros((), dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        solver=AID(),
        steps=3,
    )
    assert result.evidence["curvature"] == 1.0
    assert any("not strongly convex" in words for words in result.warnings)


def test_what_never_moves_is_said():
    result = bilevel.minimize(
        lambda x, y: (y - 1) ** 2,
        lambda x, y: (y - 2) ** 2 + 0 * x,
        torch.zeros((), dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
        solver=AID(),
        steps=3,
    )
    assert any("x never moved" in words for words in result.warnings)
