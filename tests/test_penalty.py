"""The penalty template against closed forms on the analytic families."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.penalty import Penalty, f2sa, scalebio
from bilevel.solvers.penalty.stencils import stencil

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)


def penalized(problem: Quadratic, x, nu):
    """y_nu in closed form: (A + nu C'C) y = Bx + b + nu (C'c - D'x)."""
    d = problem.data()
    right = d["B"] @ x + d["b"] + nu * (d["C"].T @ d["c"] - d["D"].T @ x)
    return torch.linalg.solve(d["A"] + nu * d["C"].T @ d["C"], right)


def estimate(problem, x, points, *, stencil, penalty, **options):
    """The gradient of x that one step of the solver gathers at given copies of y."""
    solver = Penalty(
        stencil=stencil, penalty=penalty, inner_steps=1, warmup=0, max_penalty=1e12, growth=1.0
    )
    solver = dataclasses.replace(solver, upper_optimizer="sgd", upper_lr=1.0, lower_lr=1e-30)
    solver = dataclasses.replace(solver, patience=0, **options)
    generator = torch.Generator().manual_seed(0)
    launcher = bilevel.Single()
    state = solver.init(problem, bilevel.Full(), launcher, generator)
    state.numbers["penalty"] = penalty
    with torch.no_grad():
        state.variables["x"].value.copy_(x)
        copies = [v for name, v in state.variables.items() if name != "x"]
        for copy, point in zip(copies, points, strict=True):
            copy.value.copy_(point)
    before = state.variables["x"].value.detach().clone()
    solver.step(problem, launcher, state)
    return before - state.variables["x"].value.detach()


@given(quadratics, st.sampled_from([10.0, 100.0, 1000.0]))
def test_forward_bias_is_within_its_bound(problem, penalty):
    """I1: |est - dF| <= nu (|D| + |B| |C'C| / mu) |r| / mu."""
    nu, d = 1 / penalty, problem.data()
    x = torch.ones(problem.dim_x, dtype=torch.float64)
    points = penalized(problem, x, nu), penalized(problem, x, 0.0)
    error = estimate(problem, x, points, stencil=1, penalty=penalty)
    error = error - problem.solution().hypergradient(x)
    norm = lambda m: torch.linalg.matrix_norm(m, 2)  # noqa: E731
    r = d["C"].T @ (d["C"] @ points[1] - d["c"]) + d["D"].T @ x
    mu = torch.linalg.eigvalsh(d["A"])[0]
    bound = nu * (norm(d["D"]) + norm(d["B"]) * norm(d["C"].T @ d["C"]) / mu) * r.norm() / mu
    # 1e-9: the difference of two gradients of size up to 1e3 is multiplied by the penalty
    assert error.norm() <= bound * (1 + 1e-9) + 1e-9


@given(quadratics, st.floats(0.01, 0.85))
def test_central_bias_is_within_its_bound(problem, share):
    """I2: nu^2 (|B| |C'C| / mu + |D|) |C'C| |r| / (mu (mu - nu |C'C|)), nu |C'C| < mu."""
    d, known = problem.data(), problem.solution()
    x = torch.ones(problem.dim_x, dtype=torch.float64)
    norm = lambda m: float(torch.linalg.matrix_norm(m, 2))  # noqa: E731
    mu, size = float(torch.linalg.eigvalsh(d["A"])[0]), norm(d["C"].T @ d["C"])
    nu = share * mu / size
    points = penalized(problem, x, nu), penalized(problem, x, -nu)
    error = estimate(problem, x, points, stencil=2, penalty=1 / nu) - known.hypergradient(x)
    r = d["C"].T @ (d["C"] @ known.lower(x) - d["c"]) + d["D"].T @ x
    bound = nu**2 * (norm(d["B"]) * size / mu + norm(d["D"])) * size * float(r.norm())
    # 1e-9: the difference of two gradients of size up to 1e3 is multiplied by the penalty
    assert float(error.norm()) <= bound / (mu * (mu - nu * size)) * (1 + 1e-9) + 1e-9


@given(quadratics, st.sampled_from([1, 2]))
def test_bias_halves_or_quarters_with_nu(problem, order):
    """I3: error(nu) / error(nu / 2) is 2 for order 1 and 4 for order 2."""
    x = torch.ones(problem.dim_x, dtype=torch.float64)
    true = problem.solution().hypergradient(x)
    errors = []
    curvature = torch.linalg.matrix_norm(problem.data()["C"], 2) ** 2
    base = max(100.0, 20 * float(curvature))
    for penalty in (base, 2 * base):
        other = 0.0 if order == 1 else -1 / penalty
        points = penalized(problem, x, 1 / penalty), penalized(problem, x, other)
        errors.append((estimate(problem, x, points, stencil=order, penalty=penalty) - true).norm())
    low, high = {1: (1.8, 2.2), 2: (3.6, 4.4)}[order]
    assert errors[1] < 1e-9 or low <= errors[0] / errors[1] <= high


@given(
    st.integers(2, 8), st.integers(1, 8), st.integers(0, 10_000), st.sampled_from([2.0, 10.0, 1e3])
)
def test_softmax_mixture_has_the_exact_factor(sources, dim, seed, penalty):
    """I6: dF / (1 + nu) forward and dF / (1 - nu^2) central."""
    problem = SoftmaxMixture(sources=sources, dim=dim, data_seed=seed)
    _, t = problem.centers()
    x = torch.linspace(-1, 1, sources, dtype=torch.float64)
    true = problem.solution().hypergradient(x)
    star, nu = problem.solution().lower(x), 1 / penalty
    for order, other, factor in ((1, 0.0, 1 + nu), (2, -nu, 1 - nu**2)):
        points = [(star + w * t) / (1 + w) for w in (nu, other)]
        got = estimate(problem, x, points, stencil=order, penalty=penalty)
        assert torch.allclose(got * factor, true, atol=1e-10, rtol=1e-9)
        assert abs(float(got.sum())) < 1e-10  # I20


@pytest.mark.parametrize("order", range(1, 8))
def test_stencils_are_exact_for_polynomials(order):
    """sum_j c_j j^k is 1 for k = 1 and 0 for all other k up to the order, not for the next."""
    offsets = stencil(order)
    assert len(offsets) == 2 * ((order + 1) // 2)
    moments = [sum(c * j**k for j, c in offsets.items()) for k in range(order + 2)]
    assert moments[: order + 1] == pytest.approx([float(k == 1) for k in range(order + 1)])
    assert abs(moments[order + 1]) > 1e-3


@pytest.mark.parametrize("inner", [1, 4])
@pytest.mark.parametrize(("order", "copies", "plain"), [(1, 2, 1), (2, 2, 0), (3, 4, 1), (4, 4, 0)])
def test_oracle_counts(order, copies, plain, inner):
    """Every copy takes a gradient of g, and of f unless it minimizes g alone."""
    solver = Penalty(stencil=order, inner_steps=inner)
    counts = bilevel.solve(Quadratic(), solver, steps=7).counts
    assert counts["lower_grad"] == 7 * copies * inner
    assert counts["upper_grad"] == 7 * (copies - plain) * inner
    assert counts["sweeps"] == 7 * copies * inner


def test_single_loop_step_is_two_sweeps():
    counts = bilevel.solve(Quadratic(), scalebio(warmup=0), steps=1).counts
    assert counts == {"upper_grad": 1, "lower_grad": 2, "sweeps": 2}


@pytest.mark.parametrize("seed", range(4))
def test_reaches_the_optimum_of_the_quadratic(seed):
    problem = Quadratic(condition=3.0, data_seed=seed)
    solver = Penalty(upper_optimizer="sgd", upper_lr=0.05, lower_lr=0.2)
    result = bilevel.solve(problem, solver, steps=400)
    optimum = problem.solution().x
    # 1e-6: the central bias at the last penalty, 1e6, and 400 linearly contracting steps
    assert (result.x - optimum).norm() <= 1e-6 * (1 + optimum.norm())
    assert result.success and result.status is bilevel.Status.STEPS


def test_weights_stay_while_copies_agree():
    """With equal copies the gradient of x is exactly zero, whatever the penalty."""
    problem = SoftmaxMixture()
    x = torch.linspace(-1, 1, problem.sources, dtype=torch.float64)
    y = torch.ones(problem.dim, dtype=torch.float64)
    assert torch.equal(estimate(problem, x, (y, y), stencil=1, penalty=1e3), torch.zeros_like(x))


def test_iterates_stay_in_the_feasible_sets():
    seen = []

    def callback(state, record):
        values = (state.variables[name].value.detach() for name in "xy")
        seen.append(tuple(float(value) for value in values))

    zero = torch.zeros((), dtype=torch.float64)
    result = bilevel.minimize(
        lambda x, y: (y - 3) ** 2,
        lambda x, y: (y - x) ** 2,
        zero,
        zero,
        solver=Penalty(upper_lr=0.1, growth=1.0),
        steps=100,
        project_upper=lambda x: x.clamp(-1, 0.5),
        project_lower=lambda y: y.clamp(-1, 0.75),
        callback=callback,
    )
    assert all(x <= 0.5 and y <= 0.75 for x, y in seen)
    assert float(result.x) == 0.5


def test_growth_stops_at_the_cap_of_the_dtype():
    zero = torch.zeros(())
    record = {}
    bilevel.minimize(
        lambda x, y: (y - 1) ** 2,
        lambda x, y: (y - x) ** 2,
        zero,
        zero,
        solver=Penalty(growth=10.0, warmup=0),
        steps=8,
        callback=lambda state, r: record.update(r),
    )
    assert record["penalty"] == 1e3


def test_a_loss_that_turns_nan_ends_with_a_status():
    zero = torch.zeros((), dtype=torch.float64)
    result = bilevel.minimize(
        lambda x, y: torch.log(2 - y),
        lambda x, y: (y - x) ** 2,
        zero + 1,
        zero + 1,
        solver=f2sa(upper_lr=1.0),
        steps=200,
    )
    assert not result.success
    assert result.status is bilevel.Status.NONFINITE
    assert bool(torch.isfinite(result.x)) and bool(torch.isfinite(result.y))


def test_wrong_options_are_reported_together():
    with pytest.raises(bilevel.InputError) as error:
        Penalty(penalty=-1, inner_steps=0, upper_optimizer="adamm")
    assert len(error.value.faults) == 3
    assert "did you mean 'adam'" in str(error.value)
