"""SAMA against the optimizers' own steps and closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solve import start
from bilevel.solvers.sama import SAMA

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)


def after(problem, x, y, steps=1, **options):
    """The state after `steps` steps from (x, y), and minus the last move of x."""
    options = {"upper_optimizer": "sgd", "upper_lr": 1.0, **options}
    solver = SAMA(**options)
    state = solver.init(problem, bilevel.Full(), bilevel.Single(), torch.Generator().manual_seed(0))
    state.variables["x"].assign([x])
    state.variables["y"].assign([y])
    for _ in range(steps):
        before = state.variables["x"].value.detach().clone()
        state = solver.step(problem, bilevel.Single(), state)
    return state, before - state.variables["x"].value.detach()


@given(quadratics, st.sampled_from(["sgd", "adam", "adamw"]), st.integers(1, 4))
def test_v_is_the_derivative_of_the_optimizers_step(problem, name, inner):
    """Against differences of the step that torch takes after the same gradients."""
    x, y = torch.ones(problem.dim_x).double(), torch.ones(problem.dim_y).double()
    state, _ = after(problem, x, y, lower_optimizer=name, inner_steps=inner, lower_lr=0.01)
    d, now = problem.data(), state.variables["y"].value.detach()

    def gradient(y):
        return d["A"] @ y - d["B"] @ x - d["b"]

    def end(change):
        """y after the same steps, the last gradient changed in every entry."""
        leaf = y.clone().requires_grad_()
        optimizer = bilevel.optimizer_by_name(name, 0.01)([leaf])
        for step in range(inner):
            leaf.grad = gradient(leaf.detach()) + (change if step == inner - 1 else 0.0)
            optimizer.step()
        return leaf.detach()

    assert torch.allclose(end(0.0), now, atol=1e-14)
    size = gradient(now).abs().mean()
    h = 1e-5 * float(size)
    slope = (end(-h) - end(h)) / (2 * h)  # elementwise, hence all entries at once
    r = d["C"].T @ (d["C"] @ now - d["c"]) + d["D"].T @ x
    assert torch.allclose(state.vectors["v"][0], slope * r, rtol=1e-3, atol=1e-6 / float(size))


@given(quadratics, st.floats(1e-3, 10.0), st.integers(1, 3))
def test_the_estimate_on_the_quadratic(problem, alpha, inner):
    """grad_x f + lr B'r at the y that was reached: a central difference is exact there."""
    d, lr = problem.data(), 1 / problem.condition
    x, y = torch.ones(problem.dim_x).double(), torch.ones(problem.dim_y).double()
    state, got = after(problem, x, y, alpha=alpha, inner_steps=inner, lower_lr=lr)
    now = y
    for _ in range(inner):
        now = now - lr * (d["A"] @ now - d["B"] @ x - d["b"])
    assert torch.allclose(state.variables["y"].value, now, atol=1e-12, rtol=1e-12)
    r = d["C"].T @ (d["C"] @ now - d["c"]) + d["D"].T @ x
    expected = problem.rho * (x - d["s"]) + d["D"] @ now + lr * d["B"].T @ r
    # rounding of gradients of size up to 1e2, magnified by |v| / alpha
    assert torch.allclose(
        got, expected, rtol=1e-9, atol=1e-12 * 100 * (1 + float(r.norm()) / alpha)
    )


class Half(bilevel.Problem):
    """y in bfloat16, each entry drawn to x and to a number of its own."""

    def init(self, generator):
        return torch.ones(1).double(), torch.linspace(-2, 2, 5).bfloat16()

    def lower(self, x, y, batch):
        return ((y.double() - x).square() * torch.arange(1, 6)).sum()

    def upper(self, x, y, batch):
        return (y.double() - 3).square().sum()


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_float32_masters_hide_no_gradient(name):
    """They take it from y when the optimizer begins its step."""
    found = []
    for precision in ("master", "plain"):
        solver = SAMA(lower_optimizer=name, lower_lr=1e-2)
        state = start(Half(), solver, memory=bilevel.Full(precision=precision))
        state = solver.step(Half(), bilevel.Single(), state)
        found.append([state.numbers["lower_error"], *state.vectors["v"][0].double().tolist()])
    assert found[0][0] > 0
    assert found[0] == pytest.approx(found[1], rel=0.05, abs=1e-6)  # roundings of 2^-8


def test_the_difference_is_of_second_order():
    """On a loss whose J changes with y the error falls with the square of alpha."""
    x, y = torch.ones(2).double(), torch.tensor([0.3, -0.2]).double()
    problem = bilevel.Functions(
        lambda x, y: (y - 1).square().sum(),
        lambda x, y: (x * y.exp()).sum() + y.square().sum(),
        x,
        y,
    )
    state, _ = after(problem, x, y)
    now, v = state.variables["y"].value.detach(), state.vectors["v"][0]
    exact = -now.exp() * v
    errors = [
        (after(problem, x, y, alpha=alpha)[1] - exact).norm() for alpha in (0.02, 0.01, 0.005)
    ]
    assert 3.9 <= errors[0] / errors[1] <= 4.1 and 3.9 <= errors[1] / errors[2] <= 4.1


def test_stops_at_its_own_fixed_point():
    """The bias on the quadratic, as of the identity: rho (x - s) + D y* + lr B' r = 0."""
    problem, lr = Quadratic(condition=3.0), 0.3
    d, lower = problem.data(), problem.solution().lower

    def estimated(x):
        y = lower(x)
        r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
        return x - d["s"] + d["D"] @ y + lr * d["B"].T @ r

    constant = estimated(torch.zeros(3).double())
    columns = [estimated(e) - constant for e in torch.eye(3, dtype=torch.float64)]
    expected = torch.linalg.solve(torch.stack(columns, dim=1), -constant)
    solver = SAMA(upper_optimizer="sgd", upper_lr=0.05, lower_lr=lr)
    result = bilevel.solve(problem, solver, steps=400)
    assert (result.x - expected).norm() <= 1e-6


@pytest.mark.parametrize("options", [{"lower_lr": 1.0}, {"lower_optimizer": "adam"}])
def test_is_stationary_on_the_mixture(options):
    """Exact with unit steps, as H = I; with Adam of the right sign, which is enough here."""
    problem = SoftmaxMixture(sources=3)
    result = bilevel.solve(problem, SAMA(upper_lr=0.05, **options), steps=400)
    start = problem.solution().hypergradient(torch.zeros(3).double()).norm()
    assert problem.solution().hypergradient(result.x).norm() <= 0.05 * start


def test_equal_on_the_mixture_to_the_truth():
    problem = SoftmaxMixture()
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)
    star = problem.solution().lower(x)
    _, got = after(problem, x, star, lower_lr=1.0, alpha=0.1)
    assert torch.allclose(got, problem.solution().hypergradient(x), atol=1e-12)


def test_oracle_counts():
    """Three gradients more than the inner steps, no products."""
    counts = bilevel.solve(Quadratic(), SAMA(inner_steps=4), steps=7).counts
    assert counts == {"upper_grad": 7, "lower_grad": 7 * (4 + 2), "hvp": 0, "cross": 0}


@given(quadratics, st.floats(0.5, 4.0))
def test_invariance_of_the_estimate(problem, c):
    """I15, I16, I17 with sgd: x = Pu; y = Qw; f -> cf; g -> cg with lr over c."""
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(problem.dim_x, problem.dim_x, generator=generator).double()
    p = p + 5 * torch.eye(problem.dim_x)
    q = torch.linalg.qr(torch.randn(problem.dim_y, problem.dim_y, generator=generator).double()).Q
    x, y = torch.ones(problem.dim_x).double(), torch.ones(problem.dim_y).double()
    f, g = (lambda x, y: problem.upper(x, y, None)), (lambda x, y: problem.lower(x, y, None))
    lr = 1 / problem.condition

    def at(f, g, x, y, lr=lr):
        return after(bilevel.Functions(f, g, x, y), x, y, inner_steps=2, lower_lr=lr)[1]

    expected = at(f, g, x, y)
    close = {"atol": 1e-8 * float(1 + expected.norm()), "rtol": 1e-8}
    u = torch.linalg.solve(p, x)
    got = at(lambda u, y: f(p @ u, y), lambda u, y: g(p @ u, y), u, y)
    assert torch.allclose(got, p.T @ expected, rtol=1e-8, atol=10 * close["atol"])
    got = at(lambda x, w: f(x, q @ w), lambda x, w: g(x, q @ w), x, q.T @ y)
    assert torch.allclose(got, expected, **close)
    assert torch.allclose(at(lambda x, y: c * f(x, y), g, x, y), c * expected, **close)
    assert torch.allclose(at(f, lambda x, y: c * g(x, y), x, y, lr / c), expected, **close)


def test_adam_does_not_divide_by_zero():
    """Entries that never had a gradient, and an upper loss that does not depend on y."""
    zero = torch.zeros(2).double()
    problem = bilevel.Functions(
        lambda x, y: (y - x).square().sum(), lambda x, y: y[0] ** 2 + x[0] * y[0], zero, zero
    )
    state, got = after(problem, zero, zero, steps=2, lower_optimizer="adam")
    assert bool(got.isfinite().all()) and bool(state.vectors["v"][0].isfinite().all())
    flat = bilevel.Functions(lambda x, y: x.sum(), lambda x, y: (y - x).square().sum(), zero, zero)
    _, got = after(flat, zero, zero)
    assert torch.equal(got, torch.ones(2).double())


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_what_does_not_train_has_no_part(name):
    """A frozen leaf of y, as LISA has them, and one that g does not depend on."""
    zero = torch.zeros(2).double()
    problem = bilevel.Functions(
        lambda x, y: sum((t - 1).square().sum() for t in y),
        lambda x, y: (y[0] - x).square().sum() + (y[1] - x).square().sum(),
        zero,
        [zero, zero, zero],
    )
    solver = SAMA(lower_optimizer=name)
    generator = torch.Generator().manual_seed(0)
    state = solver.init(problem, bilevel.Full(), bilevel.Single(), generator)
    state.variables["y"].value[1].requires_grad_(False)
    v = solver.step(problem, bilevel.Single(), state).vectors["v"]
    assert bool(v[0].all()) and not v[1].any()
    assert name == "sgd" or not v[2].any()
    assert not state.variables["y"].value[1].any()


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    """I31, bitwise."""
    solver = SAMA(lower_optimizer=name, lower_lr=0.05)
    whole = bilevel.solve(Quadratic(), solver, steps=9)
    bilevel.solve(Quadratic(), solver, steps=4, checkpoints=tmp_path)
    again = bilevel.solve(Quadratic(), solver, steps=9, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, again.x) and torch.equal(whole.y, again.y)
    assert whole.history == again.history and whole.counts == again.counts


def test_what_cannot_work_is_refused():
    with pytest.raises(bilevel.InputError, match="adamw"):
        SAMA(lower_optimizer="rmsprop")
    zero = torch.zeros(())
    bounded = bilevel.Functions(
        lambda x, y: y**2, lambda x, y: (y - x) ** 2, zero, zero, project_lower=lambda y: y
    )
    with pytest.raises(bilevel.InputError, match="project_lower"):
        bilevel.solve(bounded, SAMA())
