"""Implicit differentiation against closed forms on the analytic families."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.descent import descend
from bilevel.linear import norm
from bilevel.options import parse
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solve import start
from bilevel.solvers.implicit import AID, amigo, stocbio, t1t2

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)


def estimate(problem, x, y, **options):
    """The hypergradient that one step of AID takes at (x, y), and the state after it."""
    solver = AID(**{"inner_steps": 0, "upper_optimizer": "sgd", "upper_lr": 1.0, **options})
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


def test_warm_starts_do_not_grow_where_h_is_indefinite():
    """Each solve meets negative curvature; started from each other they grew to 1e14."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    values = torch.randn(12, generator=generator.manual_seed(2), dtype=torch.float64) + 0.4
    matrix = vectors @ torch.diag(values) @ vectors.T
    problem = bilevel.Functions(
        lambda x, y: (y - 1).square().sum() / 2 + y.sum(),
        lambda x, y: y @ matrix @ y / 2 - x * y.sum(),
        torch.ones((), dtype=torch.float64),
        torch.zeros(12, dtype=torch.float64),
    )
    solver = AID(lower_lr=1e-3, linear_steps=6, linear_tolerance=0.0, upper_lr=1e-3)
    state = start(problem, solver)
    for _ in range(40):
        state = solver.step(problem, bilevel.Single(), state)
        assert norm(state.vectors["v"]) < 10


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


@given(quadratics, st.integers(1, 12), st.floats(0.0, 0.9))
def test_truncated_series_are_truncated_unrolls(problem, steps, momentum):
    """I10: from the lower solution, Neumann is the derivative through `steps` inner steps."""
    start = torch.ones(problem.dim_x, dtype=torch.float64)
    star = problem.solution().lower(start)
    lr = 1 / problem.condition
    options = {"linear": "neumann", "linear_steps": steps, "linear_lr": lr}
    got, _ = estimate(problem, start, star, linear_momentum=momentum, warm=False, **options)
    expected = unrolled(problem, start, star, steps, lr, momentum)
    assert torch.allclose(got, expected, atol=1e-10, rtol=1e-10)


def unrolled(problem, x, star, steps, lr, momentum):
    """d/dx f(x, y_T(x)), y_T by plain autograd through momentum descent that starts at rest."""
    x = x.clone().requires_grad_()
    d, y, before = problem.data(), star, star
    for _ in range(steps):
        step = d["A"] @ y - d["B"] @ x - d["b"]
        y, before = y - lr * step + momentum * (y - before), y
    return torch.autograd.grad(problem.upper(x, y, None), x)[0]


class Cubic(bilevel.Problem):
    """A lower loss whose H and J change with y, with micro-batches and batches of its own."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(12, 3, generator=generator, dtype=torch.float64)

    def init(self, generator):
        return torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def lower(self, x, y, batch):
        fit = torch.nn.functional.softplus(self.rows[batch] @ (y - x.sin())).sum()
        return fit / 12 + len(batch) / 12 * (0.5 * y @ y + 0.1 * (y**4).sum())

    def upper(self, x, y, batch):
        return 0.5 * (y - 1).square().sum() + 0.05 * x @ x + 0.1 * (x * y).sum()

    def whole(self):
        return None, torch.arange(12)

    def pieces(self):
        return (None,), torch.arange(12).split(1)

    def split(self, batch):
        return (None,) if batch is None else batch.split(5)

    def batches(self, generator):
        upper, lower = self.whole()
        return bilevel.Always(upper), bilevel.Always(lower)


def test_truncated_series_on_a_loss_that_is_not_quadratic():
    """I10 where H and J change with y: at the lower solution their changes do not matter."""
    problem, lr, batch = Cubic(), 0.3, torch.arange(12)
    x, y = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def step(x, y):
        y = y if y.requires_grad else y.requires_grad_()
        loss = problem.lower(x, y, batch)
        return y - lr * torch.autograd.grad(loss, y, create_graph=True)[0]

    for _ in range(300):
        y = step(x, y).detach()
    z, free = y, x.clone().requires_grad_()
    for _ in range(4):
        z = step(free, z)
    (expected,) = torch.autograd.grad(problem.upper(free, z, None), free)
    options = {"linear": "neumann", "linear_steps": 4, "linear_lr": lr, "warm": False}
    got, _ = estimate(problem, x, y.detach(), **options)
    assert torch.allclose(got, expected, atol=1e-12)


@given(quadratics, st.integers(1, 12))
def test_neumann_has_its_error(problem, steps):
    """I8: |v_K - v| <= (1 - lr mu)^K |H^-1 r| at lr = 1 / L."""
    d, x = problem.data(), torch.ones(problem.dim_x, dtype=torch.float64)
    y = problem.solution().lower(x)
    options = {"linear": "neumann", "linear_lr": 1 / problem.condition, "warm": False}
    _, state = estimate(problem, x, y, linear_steps=steps, **options)
    exact = torch.linalg.solve(d["A"], d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x)
    error = (state.vectors["v"][0] - exact).norm()
    assert error <= (1 - 1 / problem.condition) ** steps * exact.norm() + 1e-12


@given(quadratics, st.floats(0.1, 1.0))
def test_fisher_solves_with_the_gradients_of_the_pieces(problem, damping):
    """One piece, hence rank one: (damping I + q q')^-1 r with q = grad_y g."""
    d, x = problem.data(), torch.ones(problem.dim_x, dtype=torch.float64)
    y = torch.ones(problem.dim_y, dtype=torch.float64)
    _, state = estimate(problem, x, y, linear="fisher", damping=damping)
    q = d["A"] @ y - d["B"] @ x - d["b"]
    r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
    exact = torch.linalg.solve(damping * torch.eye(len(y)).double() + torch.outer(q, q), r)
    assert torch.allclose(state.vectors["v"][0], exact, atol=1e-9, rtol=1e-9)
    assert state.counts == {"upper_grad": 1, "lower_grad": 2, "hvp": 0, "cross": 1}


def test_fisher_takes_the_pieces_in_turn():
    problem, seen = Cubic(), []
    solver = AID(linear="fisher", linear_steps=5, inner_steps=1)
    whole = problem.lower
    problem.lower = lambda x, y, batch: seen.append(tuple(batch.tolist())) or whole(x, y, batch)
    bilevel.solve(problem, solver, steps=3)
    single = [batch[0] for batch in seen if len(batch) == 1]
    assert single == [*range(12), 0, 1, 2]


def test_identity_can_point_uphill():
    """Family H: H = diag(1, 10), J = (1, 1)', r = (1, -2): dF = -0.8, the estimate is 1."""
    h = torch.tensor([1.0, 10.0], dtype=torch.float64)
    r = torch.tensor([1.0, -2.0], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    problem = bilevel.Functions(
        lambda x, y: y @ r, lambda x, y: 0.5 * y @ (h * y) + x.sum() * y.sum(), zero, 0 * h
    )
    for linear, expected in (("cg", -0.8), ("identity", 1.0)):
        got, _ = estimate(problem, zero, 0 * h, linear=linear, lower_lr=1.0)
        assert float(got) == pytest.approx(expected, abs=1e-12)


def test_identity_stops_at_its_own_fixed_point():
    """The bias of T1-T2 on the quadratic: it solves rho (x - s) + D y* + lr B' r = 0 instead."""
    problem, lr = Quadratic(condition=3.0), 0.3
    d, lower = problem.data(), problem.solution().lower

    def estimated(x):
        y = lower(x)
        r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
        return x - d["s"] + d["D"] @ y + lr * d["B"].T @ r

    constant = estimated(torch.zeros(3).double())
    columns = [estimated(e) - constant for e in torch.eye(3, dtype=torch.float64)]
    expected = torch.linalg.solve(torch.stack(columns, dim=1), -constant)
    solver = t1t2(upper_optimizer="sgd", upper_lr=0.05, lower_lr=lr)
    result = bilevel.solve(problem, solver, steps=400)
    assert (result.x - expected).norm() <= 1e-6
    assert (result.x - problem.solution().x).norm() > 1e-2  # it is another point


@pytest.mark.parametrize("make", [stocbio, amigo])
def test_presets_reach_the_optimum_of_the_quadratic(make):
    problem, steps, lr = Quadratic(condition=3.0), 11, 1 / 3
    solver = make(upper_optimizer="sgd", upper_lr=0.1, lower_lr=lr)
    result = bilevel.solve(problem, solver, steps=150)
    # cold series: |dF| at its fixed point is at most |B| (1 - lr mu)^K |H^-1 r|, and dF is strongly
    # monotone in x here, with the modulus below; warm steps leave no bias
    d, x = problem.data(), result.x
    y = problem.solution().lower(x)
    v = torch.linalg.solve(d["A"], d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x)
    bias = torch.linalg.matrix_norm(d["B"], 2) * (1 - lr) ** steps * v.norm()
    dF = problem.solution().hypergradient
    slope = torch.stack([dF(e) - dF(0 * e) for e in torch.eye(3, dtype=torch.float64)])
    modulus = torch.linalg.eigvalsh((slope + slope.T) / 2)[0]
    bound = 1e-6 + (bias / modulus if make is stocbio else 0.0)
    assert modulus > 0 and (x - problem.solution().x).norm() <= bound


@pytest.mark.parametrize(
    ("make", "options"),
    [(stocbio, {"inner_steps": 1, "linear_steps": 2}), (amigo, {"linear_steps": 2}), (t1t2, {})],
)
def test_presets_are_stationary_on_the_mixture(make, options):
    """H = I: one Neumann term of step size one is exact, and so is the identity."""
    problem = SoftmaxMixture(sources=3)
    solver = make(upper_optimizer="sgd", upper_lr=5.0, lower_lr=1.0, **options)
    result = bilevel.solve(problem, solver, steps=120)
    start = problem.solution().hypergradient(torch.zeros(3).double()).norm()
    assert problem.solution().hypergradient(result.x).norm() <= 1e-2 * start


def test_fresh_batches_equal_shared_ones_where_there_is_one():
    """I22, bitwise; each draws its own otherwise."""
    options = {"linear_steps": 6, "lower_lr": 0.05}
    runs = [
        bilevel.solve(Cubic(), stocbio(batches=b, **options), steps=6) for b in ("fresh", "shared")
    ]
    assert torch.equal(runs[0].x, runs[1].x) and torch.equal(runs[0].y, runs[1].y)
    drawn = []

    class Counting(bilevel.Always):
        def __next__(self):
            drawn.append(self.batch)
            return self.batch

    problem = Cubic()
    problem.batches = lambda generator: (Counting(None), Counting(torch.arange(12)))
    bilevel.solve(problem, stocbio(inner_steps=3, **options), steps=1)
    lower = [batch for batch in drawn if batch is not None]
    assert len(lower) == 3 + 1 + 5 and len(drawn) == len(lower) + 1


def test_counts_of_the_presets():
    """T gradients and N products, one J' and one gradient of f, and the gradient graphs."""
    steps, once = 7, {"upper_grad": 7, "cross": 7}
    counts = bilevel.solve(Quadratic(), stocbio(lower_lr=0.05), steps=steps).counts
    assert counts == {**once, "lower_grad": steps * (10 + 1 + 10), "hvp": steps * 10}
    shared = bilevel.solve(Quadratic(), stocbio(lower_lr=0.05, batches="shared"), steps=steps)
    assert shared.counts == {**once, "lower_grad": steps * (10 + 1), "hvp": steps * 10}
    counts = bilevel.solve(Quadratic(), amigo(lower_lr=0.05), steps=steps).counts
    # the first product of all is with v = 0
    assert counts == {**once, "lower_grad": steps * (10 + 1), "hvp": steps * 10 - 1}
    counts = bilevel.solve(Quadratic(), t1t2(lower_lr=0.05), steps=steps).counts
    assert counts == {**once, "lower_grad": steps * (1 + 1), "hvp": 0}
    counts = bilevel.solve(Cubic(), AID(linear="fisher", linear_steps=5), steps=steps).counts
    assert counts == {**once, "lower_grad": steps * (10 + 1 + 5), "hvp": 0}


ESTIMATORS = {
    "cg": {"linear": "cg", "linear_steps": 3, "linear_tolerance": 0.0},
    "neumann": {"linear": "neumann", "linear_steps": 4},
    "momentum": {"linear": "neumann", "linear_steps": 4, "linear_momentum": 0.5},
    "fisher": {"linear": "fisher"},
    "identity": {"linear": "identity"},
}


@pytest.mark.parametrize("name", ESTIMATORS)
@given(quadratics, st.floats(0.5, 4.0))
def test_invariance_of_the_estimate(name, problem, c):
    """I15, I16, I17: x = Pu; y = Qw; f -> cf; g -> cg with step sizes over c."""
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(problem.dim_x, problem.dim_x, generator=generator).double()
    p = p + 5 * torch.eye(problem.dim_x)
    q = torch.linalg.qr(torch.randn(problem.dim_y, problem.dim_y, generator=generator).double()).Q
    x, y = torch.ones(problem.dim_x).double(), torch.ones(problem.dim_y).double()
    f, g = (lambda x, y: problem.upper(x, y, None)), (lambda x, y: problem.lower(x, y, None))
    lr = 1 / problem.condition

    def at(f, g, x, y, lr=lr):
        turned = bilevel.Functions(f, g, x, y)
        return estimate(turned, x, y, inner_steps=2, lower_lr=lr, **ESTIMATORS[name])[0]

    expected = at(f, g, x, y)
    size = {"atol": 1e-9 * problem.condition * float(1 + expected.norm()), "rtol": 1e-9}
    u = torch.linalg.solve(p, x)
    got = at(lambda u, y: f(p @ u, y), lambda u, y: g(p @ u, y), u, y)
    assert torch.allclose(got, p.T @ expected, **{**size, "atol": 10 * size["atol"]})
    got = at(lambda x, w: f(x, q @ w), lambda x, w: g(x, q @ w), x, q.T @ y)
    assert torch.allclose(got, expected, **size)
    assert torch.allclose(at(lambda x, y: c * f(x, y), g, x, y), c * expected, **size)
    if name != "fisher":  # quadratic in the scale of g, not linear: it is no Hessian
        got = at(f, lambda x, y: c * g(x, y), x, y, lr / c)
        assert torch.allclose(got, expected, **size)


def test_sources_may_come_in_any_order():
    """I19: permuted centers permute the estimate."""
    problem, order = SoftmaxMixture(), torch.tensor([2, 0, 3, 1])
    m, t = problem.centers()
    x, y = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    permuted = bilevel.Functions(
        lambda x, y: 0.5 * (y - t).square().sum(),
        lambda x, y: x.softmax(0) @ (0.5 * (y - m[order]).square().sum(1)),
        x,
        y,
    )
    one, _ = estimate(problem, x, y, inner_steps=2)
    two, _ = estimate(permuted, x[order], y, inner_steps=2)
    assert torch.allclose(one[order], two, atol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        amigo(lower_lr=0.05),
        stocbio(lower_lr=0.05, linear_momentum=0.5),
        t1t2(lower_lr=0.05),
        AID(linear="fisher", linear_steps=5, lower_lr=0.05, lower_optimizer="adam"),
        AID(lower_lr=0.05),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(solver, tmp_path):
    """I31, bitwise."""
    whole = bilevel.solve(Cubic(), solver, steps=9)
    bilevel.solve(Cubic(), solver, steps=4, checkpoints=tmp_path)
    again = bilevel.solve(Cubic(), solver, steps=9, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, again.x) and torch.equal(whole.y, again.y)
    assert whole.history == again.history and whole.counts == again.counts


def test_a_wrong_word_for_the_linear_solver_is_a_fault():
    """The field also takes objects, which no word of the command line can be."""
    with pytest.raises(bilevel.InputError, match=r"one of cg, .*identity, got 'lu'\."):
        parse(["problem=quadratic", "solver=aid", "linear=lu"])


def test_fresh_batches_need_neumann():
    with pytest.raises(bilevel.InputError, match="batches=fresh"):
        stocbio(linear="cg")


def test_divergence_is_not_called_a_success(tmp_path):
    """The step of y is 2.5 times what is stable: losses grow by 16 a step, yet stay finite."""
    result = bilevel.solve(
        Quadratic(condition=1.0),
        AID(inner_steps=1, lower_lr=5.0, upper_lr=1e-6),
        steps=400,
        checkpoints=tmp_path,
        checkpoint_every=5,
    )
    assert result.status is bilevel.Status.DIVERGED and not result.success
    assert result.message.startswith(f"After step {result.nit}: The losses grew")
    newest = max(int(p.name.split("-")[1]) for p in tmp_path.iterdir())
    assert result.nit - 5 <= newest < result.nit


@pytest.mark.parametrize("step", ["1/L", "2/(mu+L)"])
@given(quadratics, st.integers(1, 30))
def test_inner_descent_contracts_at_its_rate(step, problem, steps):
    """I12: |y_t - y*| <= rho^t |y_0 - y*|, rho = 1 - mu/L or (kappa - 1)/(kappa + 1)."""
    spectrum = torch.linalg.eigvalsh(problem.data()["A"])
    mu, large = float(spectrum[0]), float(spectrum[-1])
    lr, rho = {
        "1/L": (1 / large, 1 - mu / large),
        "2/(mu+L)": (2 / (mu + large), (large - mu) / (large + mu)),
    }[step]
    solver, launcher = AID(lower_lr=lr), bilevel.Single()
    state = solver.init(problem, bilevel.Full(), launcher, torch.Generator())
    x, y = state.variables["x"].value, state.variables["y"]
    star = problem.solution().lower(x.detach())
    before = (y.value.detach() - star).norm()
    descend(problem, launcher, state, steps=steps)
    assert (y.value.detach() - star).norm() <= rho**steps * before * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linear_lr": 0.1}, "solver.linear_lr=0.1 has no effect with linear=cg"),
        ({"linear": "neumann", "damping": 0.1}, "read with linear=cg or linear=minres"),
        ({"linear": "identity", "linear_tolerance": 1e-3}, "Leave it out"),
    ],
)
def test_an_option_without_effect_is_refused(options, words):
    with pytest.raises(bilevel.InputError, match=words):
        AID(**options)
