"""The analytic families against finite differences, optimality conditions and each other."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import bilevel
from bilevel.plugins import find
from bilevel.problems.box import Box
from bilevel.problems.many_minimisers import ManyMinimisers
from bilevel.problems.nonconvex_pl import NonconvexPL
from bilevel.problems.ridge import Ridge
from bilevel.problems.simplex import Simplex
from bilevel.problems.toy import Toy
from bilevel.solvers.implicit import AID
from bilevel.tree import leaves, with_leaves

sizes = st.integers(1, 8)
seeds = st.integers(0, 10_000)
between = {"dim_x": sizes, "dim_y": sizes, "data_seed": seeds}
ridges = st.builds(
    Ridge,
    features=sizes,
    rows=st.integers(8, 20),
    noise=st.floats(0.1, 2.0),
    strengths=st.sampled_from(["one", "each"]),
    data_seed=seeds,
)
boxes = st.builds(Box, bound=st.floats(0.3, 3.0), **between)
simplices = st.builds(Simplex, **between)
nonconvex = st.builds(NonconvexPL, **between, rho=st.floats(0.1, 3.0))
several = st.builds(
    ManyMinimisers,
    **{"dim_x": sizes, "dim_u": sizes, "dim_w": sizes, "data_seed": seeds},
    mu=st.floats(1.0, 10.0),
)
toys = st.builds(Toy, start=st.floats(0.0, 3.0))
families = st.one_of(ridges, boxes, simplices, nonconvex, several, toys)
MARGIN = 1e-3  # of every kink; the differences below look 1e-5 |B| to each side


def random_x(problem, seed):
    """A point near the start, not a special one."""
    x, _ = problem.init(torch.Generator())
    generator = torch.Generator().manual_seed(seed)
    moved = x + 0.7 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return problem.project_upper(moved)


def far_from_kinks(problem, x):
    """Whether strict complementarity holds with a margin."""
    if isinstance(problem, Box):
        distance = (problem.data()["B"] @ x).abs() - problem.bound
    elif isinstance(problem, Simplex):
        free = problem.data()["B"] @ x
        y = problem.solution().lower(x)
        distance = free - (free - y)[y.argmax()]  # y_i = max(free_i - shift, 0)
    else:
        return True
    return float(distance.abs().min()) > MARGIN


def gradient(loss, value, *rest):
    """The gradient of loss(value, *rest), flat."""
    inputs = [t.detach().clone().requires_grad_() for t in leaves(value)]
    found = torch.autograd.grad(
        with_leaves(loss, value, inputs, *rest), inputs, materialize_grads=True, allow_unused=True
    )
    return torch.cat([g.flatten() for g in found])


@given(families, seeds)
def test_hypergradient_is_the_slope_of_the_value(problem, seed):
    x, known, step = random_x(problem, seed), problem.solution(), 1e-5
    if isinstance(problem, Toy):
        assume(step < float(x) < 3 - step)
    assume(far_from_kinks(problem, x))

    def value(x):
        return float(problem.upper(x, known.lower(x), None))

    slopes = torch.zeros_like(x)
    for i in range(x.numel()):
        move = torch.zeros_like(x)
        move.view(-1)[i] = step
        slopes.view(-1)[i] = (value(x + move) - value(x - move)) / (2 * step)
    true = known.hypergradient(x)
    assert true.shape == x.shape and true.dtype == torch.float64
    # 1e-6: step^2 times a third derivative up to 1e3, and rounding 1e-16 |F| / step
    assert torch.allclose(slopes, true, rtol=1e-6, atol=1e-6 * (1 + abs(value(x))))


@given(families, seeds)
def test_lower_solution_is_feasible_and_stationary(problem, seed):
    x, known = random_x(problem, seed), problem.solution()
    y = known.lower(x)
    along = gradient(lambda y: problem.lower(x, y, None), y)
    if isinstance(problem, Box | Simplex):
        assert torch.allclose(problem.project_lower(y), y, atol=1e-14)
        moved = problem.project_lower(y - 0.5 * along)  # I21: y is a fixed point
        assert torch.allclose(moved, y, atol=1e-12)
    else:
        assert float(along.norm()) <= 1e-11 * (1 + float(x.exp().max()))


@given(ridges, boxes, simplices, nonconvex, seeds)
def test_lower_solution_is_the_least(ridge, box, simplex, pl, seed):
    """No random feasible point is lower; descent finds the point where g is not convex."""
    generator = torch.Generator().manual_seed(seed)
    for problem in (ridge, box, simplex, pl):
        x = random_x(problem, seed)
        y = problem.solution().lower(x)
        least = float(problem.lower(x, y, None))
        for size in (0.1, 1.0, 10.0):
            move = size * torch.randn(y.shape, generator=generator, dtype=torch.float64)
            other = problem.project_lower(y + move)
            assert float(problem.lower(x, other, None)) >= least - 1e-12 * (1 + least)


@given(st.one_of(boxes, simplices), seeds, st.sampled_from([10.0, 100.0, 1000.0]))
def test_penalized_solution_has_the_exact_factor(problem, seed, penalty):
    """I6: [grad_x g(y_nu) - grad_x g(y_0)]/nu = dF/(1 + nu) while the active set is the same."""
    x, nu, d = random_x(problem, seed), 1 / penalty, problem.data()
    y = problem.solution().lower(x)
    y_nu = problem.project_lower((d["B"] @ x + nu * d["c"]) / (1 + nu))
    low, high = (-problem.bound, problem.bound) if isinstance(problem, Box) else (0.0, math.inf)
    active = [((p <= low) | (p >= high)) for p in (y, y_nu)]
    assume(torch.equal(*active))
    grads = [gradient(problem.lower, x, point, None) for point in (y_nu, y)]
    estimate = (grads[0] - grads[1]) / nu
    true = problem.solution().hypergradient(x)
    assert torch.allclose(estimate * (1 + nu), true, atol=1e-10 * penalty)


@given(several, seeds, st.sampled_from([1e2, 1e3]))
def test_penalty_on_many_minimizers_tends_to_the_optimistic_gradient(problem, seed, penalty):
    """The error is C nu: ten times less at ten times the penalty, within the next order."""
    x, d, known = random_x(problem, seed), problem.data(), problem.solution()
    errors = []
    for nu in (1 / penalty, 0.1 / penalty):
        n = problem.dim_u
        eyes = [torch.eye(k, dtype=torch.float64) for k in (n, problem.dim_w)]
        top = torch.cat([(problem.mu + nu) * eyes[0], nu * d["K"]], 1)
        low = torch.cat([d["K"].T, eyes[1]], 1)
        right = torch.cat([problem.mu * d["B"] @ x + nu * d["a"], d["E"] @ x])
        y = torch.linalg.solve(torch.cat([top, low]), right)
        point = {"u": y[:n], "w": y[n:]}
        slopes = [gradient(problem.lower, x, p, None) for p in (point, known.lower(x))]
        estimate = (slopes[0] - slopes[1]) / nu + gradient(problem.upper, x, point, None)
        errors.append(float((estimate - known.hypergradient(x)).norm()))
    assert errors[0] <= 100 / penalty
    assert errors[1] < 1e-7 or 9 <= errors[0] / errors[1] <= 11


@pytest.mark.parametrize("family", [Ridge, NonconvexPL, ManyMinimisers])
def test_known_optimum_is_stationary_and_the_best_around(family):
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        problem = family(data_seed=seed)
        known = problem.solution()
        if known.x is None:
            continue
        assert float(known.hypergradient(known.x).norm()) <= 1e-6
        best = float(problem.upper(known.x, known.lower(known.x), None))
        for _ in range(20):
            x = known.x + torch.randn(known.x.shape, generator=generator, dtype=torch.float64)
            assert float(problem.upper(x, known.lower(x), None)) >= best


@given(nonconvex, seeds)
def test_nonconvex_family_has_the_curvature_it_names(problem, seed):
    """8 at y*, -4 at a quarter turn from it."""
    x = random_x(problem, seed)
    y, eye = problem.solution().lower(x), torch.eye(problem.dim_y, dtype=torch.float64)
    for turn, curvature in ((0.0, 8.0), (math.pi / 2, -4.0)):
        bend = torch.func.hessian(lambda y: problem.lower(x, y, None))(y + turn)
        assert torch.allclose(bend, curvature * eye, atol=1e-12)


@given(nonconvex, seeds)
def test_descent_finds_the_minimizer_of_the_nonconvex_family(problem, seed):
    x = random_x(problem, seed)
    _, y = problem.init(torch.Generator())
    for _ in range(500):
        along = gradient(lambda y: problem.lower(x, y, None), y)
        gap = float(problem.lower(x, y, None))
        assert 0.5 * float(along.square().sum()) >= 0.175 * gap * (1 - 1e-9)  # PL, min g = 0
        y = y - along / 8
    assert torch.allclose(y, problem.solution().lower(x), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "solver", "lr", "tolerance"),
    [
        ("ridge", "aid", 0.5, 1e-5),
        ("ridge", "f2ba", 0.5, 0.1),  # bias of nu = 1/100
        ("nonconvex_pl", "aid", 0.1, 1e-5),
        ("nonconvex_pl", "f2ba", 0.1, 0.05),
        ("many_minimisers", "f2ba", 0.1, 0.05),
    ],
)
def test_solvers_reach_the_known_optimum(name, solver, lr, tolerance):
    problem = find("problem", name)()
    made = find("solver", solver)(upper_optimizer="sgd", upper_lr=lr)
    result = bilevel.solve(problem, made, steps=200)
    assert (result.x - problem.solution().x).norm() <= tolerance


@pytest.mark.parametrize("name", ["box", "simplex"])
def test_constrained_families_run_and_are_refused_by_implicit_differentiation(name):
    problem = find("problem", name)()
    known, seen = problem.solution(), []

    def look(state, record):
        y = state.variables["y"].value.detach()
        seen.append(float((problem.project_lower(y) - y).abs().max()))

    result = bilevel.solve(problem, "penalty", steps=150, callbacks=[look])
    assert max(seen) <= 1e-12  # I21
    first = problem.init(torch.Generator())[0]
    values = [float(problem.upper(x, known.lower(x), None)) for x in (first, result.x)]
    assert values[1] < values[0]
    with pytest.raises(bilevel.InputError, match="penalty"):
        bilevel.solve(problem, "aid")


@pytest.mark.parametrize("start", [0.0, 1.7, 3.0])
@pytest.mark.parametrize("solver", ["penalty", "aid"])
def test_toy_ends_at_a_local_minimum(start, solver):
    problem = Toy(start=start)
    result = bilevel.solve(problem, solver, steps=200)
    slope = float(problem.solution().hypergradient(result.x))
    assert abs(float(problem.project_upper(result.x - slope) - result.x)) <= 0.05


def test_many_minimizers_are_reported_by_implicit_differentiation():
    result = bilevel.solve(ManyMinimisers(), "aid", steps=3)
    assert result.evidence["curvature"] == 1.0
    assert any("not strongly convex" in words for words in result.warnings)


def test_the_identity_in_place_of_the_hessian_can_point_uphill():
    """Family H: H = diag(1, 10), J = (1, 1)', r = (1, -2) give dF = -0.8, the identity +1."""
    H, r = torch.tensor([1.0, 10.0]).double(), torch.tensor([1.0, -2.0]).double()
    found = {}
    for linear in ("cg", "identity"):
        result = bilevel.minimize(
            lambda x, y: r @ y,
            lambda x, y: 0.5 * (H * y * y).sum() + x * y.sum(),
            torch.zeros((), dtype=torch.float64),
            torch.zeros(2, dtype=torch.float64),
            solver=AID(linear=linear, lower_lr=1.0, upper_optimizer="sgd", upper_lr=1.0),
            steps=1,
        )
        found[linear] = -float(result.x)
    assert found["cg"] == pytest.approx(-0.8) and found["identity"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        (Ridge, {"rows": 0, "noise": -1.0}, r"rows must be at least 1.*\n.*noise"),
        (Box, {"bound": 0.0}, "bound must be positive"),
        (Simplex, {"dim_y": 0}, "dim_y must be at least 1"),
        (NonconvexPL, {"rho": 0.0}, "rho must be positive"),
        (ManyMinimisers, {"dim_w": 0}, "dim_w must be at least 1"),
        (Toy, {"start": 4.0}, "start must be between 0 and 3"),
    ],
)
def test_options_out_of_range_are_refused(family, options, words):
    with pytest.raises(bilevel.InputError, match=words):
        family(**options)
