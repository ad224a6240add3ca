"""What must not change an estimate of the penalty family, and bounds that it must keep."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel.hypergradient import Estimates
from bilevel.problems.box import Box
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.penalty import VPBGD, Penalty, RecursivePenalty

PLAIN = {"warmup": 0, "growth": 1.0, "inner_steps": 3, "lower_lr": 0.02, "patience": 0}
SOLVERS = {
    "order 1": Penalty(stencil=1, **PLAIN),
    "order 2": Penalty(stencil=2, **PLAIN),
    "order 3": Penalty(stencil=3, **PLAIN),
    "order 4": Penalty(stencil=4, **PLAIN),
    "proximal": Penalty(stencil=1, prox=0.7, **PLAIN),
    "joint": VPBGD(rise=0, lower_lr=0.02),
    "recursive": RecursivePenalty(warmup=0, lower_lr=0.02, prox=0.7),
}
FEW = settings(max_examples=6)  # for each of the seven solvers
each = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)


def estimate(problem, x, solver, steps=3):
    """What the third step gathers for x, held at x."""
    path = Estimates(problem, x, solver)
    for _ in range(steps):
        path.advance()
    return path.latest().value[0]


def close(a, b, size=1.0):
    """To 1e-12, relative to the numbers that rounding has passed through."""
    return bool((a - b).norm() <= 1e-11 * (size + a.norm() + b.norm()))


def normal(*shape, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_(False)


def start(problem, seed):
    """A point to hold x at and a start of y, both away from 0."""
    return normal(problem.dim_x, seed=seed), normal(problem.dim_y, seed=seed + 1)


def functions(problem, x, y, upper=None, lower=None):
    return bilevel.Functions(
        upper or (lambda x, y: problem.upper(x, y, None)),
        lower or (lambda x, y: problem.lower(x, y, None)),
        x,
        y,
    )


@each
@FEW
@given(quadratics, st.integers(0, 99))
def test_reparametrized_x_gives_the_transposed_estimate(solver, problem, seed):
    """I15: x = P u gives P' est, P invertible."""
    x, y = start(problem, seed)
    p = normal(len(x), len(x), seed=seed) + 3 * torch.eye(len(x), dtype=torch.float64)
    u = torch.linalg.solve(p, x)
    moved = functions(
        problem,
        u,
        y,
        lambda u, y: problem.upper(p @ u, y, None),
        lambda u, y: problem.lower(p @ u, y, None),
    )
    size = float(torch.linalg.cond(p)) * 100
    assert close(
        estimate(moved, u, solver), p.T @ estimate(functions(problem, x, y), x, solver), size
    )


@each
@FEW
@given(quadratics, st.integers(0, 99))
def test_rotated_y_changes_nothing(solver, problem, seed):
    """I16: y = Q w, Q orthogonal."""
    x, y = start(problem, seed)
    q = torch.linalg.qr(normal(len(y), len(y), seed=seed)).Q
    turned = functions(
        problem,
        x,
        q.T @ y,
        lambda x, w: problem.upper(x, q @ w, None),
        lambda x, w: problem.lower(x, q @ w, None),
    )
    base = estimate(functions(problem, x, y), x, solver)
    assert close(estimate(turned, x, solver), base, 100.0)


@each
@FEW
@given(quadratics, st.integers(0, 99), st.floats(0.3, 3.0))
def test_scaled_losses_scale_the_estimate(solver, problem, seed, c):
    """I17: c f with c penalty gives c est; c g with steps, penalty and prox over c changes nothing.

    V-PBGD scales its steps by min(1, 1 / penalty), hence a penalty above 3.
    """
    x, y = start(problem, seed)
    base = estimate(functions(problem, x, y), x, solver)
    larger = functions(problem, x, y, upper=lambda x, y: c * problem.upper(x, y, None))
    same = dataclasses.replace(solver, penalty=c * solver.penalty)
    assert close(estimate(larger, x, same), c * base, 100.0)
    steeper = functions(problem, x, y, lower=lambda x, y: c * problem.lower(x, y, None))
    options = {"penalty": solver.penalty / c, "lower_lr": solver.lower_lr / c}
    if getattr(solver, "prox", 0.0):
        options["prox"] = solver.prox / c
    assert close(estimate(steeper, x, dataclasses.replace(solver, **options)), base, 100.0)


@each
@FEW
@given(quadratics, st.integers(0, 99))
def test_terms_of_x_alone_count_once_above_and_never_below(solver, problem, seed):
    """I18: g + q(x) changes nothing, f + q(x) adds grad q; constants do neither."""
    x, y = start(problem, seed)
    q = lambda x: 0.5 * (x * x).sum() + x.sin().sum() + 3.0  # noqa: E731
    base = estimate(functions(problem, x, y), x, solver)
    below = functions(problem, x, y, lower=lambda x, y: problem.lower(x, y, None) + q(x))
    above = functions(problem, x, y, upper=lambda x, y: problem.upper(x, y, None) + q(x))
    assert close(estimate(below, x, solver), base, 100.0)
    assert close(estimate(above, x, solver), base + x + x.cos(), 100.0)


@each
@FEW
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 999), st.floats(-5.0, 5.0))
def test_order_of_sources_and_shift_of_logits_do_not_matter(solver, sources, dim, seed, shift):
    """I19 and I20: a permuted estimate for permuted sources; the same, of sum 0, for x + c."""
    problem = SoftmaxMixture(sources=sources, dim=dim, data_seed=seed)
    m, t = problem.centers()
    order = torch.randperm(sources, generator=torch.Generator().manual_seed(seed))
    x = normal(sources, seed=seed)

    def mixture(centers):
        return bilevel.Functions(
            lambda x, y: 0.5 * (y - t).square().sum(),
            lambda x, y: x.softmax(0) @ (0.5 * (y - centers).square().sum(1)),
            x,
            torch.zeros(dim, dtype=torch.float64),
        )

    base = estimate(mixture(m), x, solver)
    assert close(estimate(mixture(m[order]), x[order], solver), base[order])
    assert close(estimate(mixture(m), x + shift, solver), base)
    assert abs(float(base.sum())) <= 1e-11 * (1 + float(base.norm()))


def curved(seed):
    """A smooth problem that is not quadratic, and its lower solution for any nu by Newton."""
    a, b, c = normal(4, 4, seed=seed), normal(4, 2, seed=seed + 1), normal(4, seed=seed + 2)
    a = torch.eye(4, dtype=torch.float64) + 0.1 * a @ a.T

    def lower(x, y):
        return 0.5 * y @ a @ y - y @ (b @ x) + (1 + x[0] ** 2) * (0.3 * y).cosh().sum()

    def upper(x, y):
        return (y - c).sin().sum() + 0.5 * (y * y).sum() + (x * y[:2]).sum()

    def solved(x, nu):
        y = torch.zeros(4, dtype=torch.float64)
        penalized = lambda y: lower(x, y) + nu * upper(x, y)  # noqa: E731
        for _ in range(7):
            slope = torch.func.grad(penalized)(y)
            y = y - torch.linalg.solve(torch.func.hessian(penalized)(y), slope)
        return y

    return lower, upper, solved


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 10])
def test_error_falls_with_the_power_of_the_order(order, seed):
    """I3: halving nu divides the error by 2^order within 10 %, 14 to 18 at order 4."""
    lower, upper, solved = curved(seed)
    x = torch.tensor([0.3, -0.5], dtype=torch.float64)
    y = solved(x, 0.0)
    hessian = torch.func.hessian(lambda y: lower(x, y))(y)
    cross = torch.func.jacrev(torch.func.grad(lower, 1), 0)(x, y)
    along_x, along_y = torch.func.grad(upper, (0, 1))(x, y)
    true = along_x - cross.T @ torch.linalg.solve(hessian, along_y)
    errors = []
    for penalty in (40.0, 80.0):
        solver = Penalty(
            stencil=order, penalty=penalty, inner_steps=1, lower_lr=1e-300, warmup=0, patience=0
        )
        path = Estimates(bilevel.Functions(upper, lower, x, y), x, solver)
        offsets = {1: (1, 0), 2: (1, -1), 3: (1, 0, -1, 2), 4: (1, -1, 2, -2)}[order]
        copies = [v for n, v in path.state.variables.items() if n != "x"]
        for copy, offset in zip(copies, offsets, strict=True):
            copy.assign([solved(x, offset / penalty)])
        path.advance()
        errors.append((path.latest().value[0] - true).norm())
    low, high = {1: (1.8, 2.2), 2: (3.6, 4.4), 3: (7.2, 8.8), 4: (14.0, 18.0)}[order]
    assert low <= errors[0] / errors[1] <= high


@settings(max_examples=15)
@given(quadratics, st.sampled_from([20.0, 200.0]))
def test_copy_value_and_gap_are_within_their_bounds(problem, penalty):
    """I4 and I5, and what penalty_gap is: the penalized value's distance from F.

    |y - y*| <= nu |r| / mu, g(y) - g* <= nu^2 |r|^2 / 2 mu, 0 <= F - l <= nu |r|^2 / 2 mu with
    l = f(y) + penalty (g(y) - g(z)) and mu = 1.
    """
    d, nu = problem.data(), 1 / penalty
    x = torch.ones(problem.dim_x, dtype=torch.float64)
    curvature = problem.condition + nu * float(torch.linalg.matrix_norm(d["C"], 2)) ** 2
    rate = 1 - 2 / (1 + curvature)
    inner = math.ceil(40 / -math.log(rate)) if rate > 0 else 5
    solver = Penalty(
        stencil=1,
        penalty=penalty,
        growth=1.0,
        warmup=0,
        inner_steps=inner + 1,
        lower_lr=2 / (1 + curvature),
    )
    path = Estimates(problem, x, solver)
    path.advance()
    numbers, y = path.state.numbers, path.state.variables["y"].value.detach()
    star = problem.solution().lower(x)
    r = d["C"].T @ (d["C"] @ star - d["c"]) + d["D"].T @ x
    bound = float(r.norm())
    slack = 1e-9 * (1 + abs(path.state.lower)) * penalty  # rounding of g times the penalty
    assert float((y - star).norm()) <= nu * bound * (1 + 1e-9) + 1e-9
    gap = float(problem.lower(x, y, None) - problem.lower(x, star, None))
    assert -slack / penalty <= gap <= nu**2 * bound**2 / 2 * (1 + 1e-9) + slack / penalty
    lost = float(problem.upper(x, star, None)) - (path.state.upper + numbers["penalty_gap"])
    assert -slack <= lost <= nu * bound**2 / 2 * (1 + 1e-9) + slack
    assert numbers["penalty_gap"] == pytest.approx(penalty * gap, abs=slack)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 999), st.sampled_from([3.0, 50.0]))
def test_the_box_has_the_exact_factor(dim_x, dim_y, seed, penalty):
    """I6: dF / (1 + nu) while the active set is that of y*; steps of 1 / (1 + nu) solve exactly."""
    problem = Box(dim_x=dim_x, dim_y=dim_y, data_seed=seed)
    d, nu = problem.data(), 1 / penalty
    x = normal(dim_x, seed=seed)
    free = (d["B"] @ x).abs() < problem.bound
    ends = (d["B"] @ x, (d["B"] @ x + nu * d["c"]) / (1 + nu))
    if not bool(((ends[1].abs() < problem.bound) == free).all()):
        return
    solver = Penalty(
        stencil=1, penalty=penalty, warmup=0, growth=1.0, inner_steps=60, lower_lr=1 / (1 + nu)
    )
    got = estimate(problem, x, solver, steps=2)
    assert close((1 + nu) * got, problem.solution().hypergradient(x), 10 * penalty)


@FEW
@given(quadratics)
def test_upper_steps_contract_at_the_rate_of_gradient_descent(problem):
    """I13: with the lower level solved, steps of 1 / L_F shrink F - F* by 1 - mu_F / L_F each."""
    known, d = problem.solution(), problem.data()
    zero = torch.zeros(problem.dim_x, dtype=torch.float64)
    columns = [known.hypergradient(e) - known.hypergradient(zero) for e in torch.eye(len(zero)).double()]  # fmt: skip # noqa: E501
    spectrum = torch.linalg.eigvalsh(torch.stack(columns, 1))
    if spectrum[0] < 0.05:
        return
    steep = problem.condition + 1e-3 * float(torch.linalg.matrix_norm(d["C"], 2)) ** 2
    solver = Penalty(
        penalty=1e4,
        warmup=0,
        growth=1.0,
        inner_steps=int(5 * problem.condition) + 10,
        lower_lr=2 / (1 + steep),
        upper_optimizer="sgd",
        upper_lr=1 / float(spectrum[-1]),
    )
    values = []

    def look(state, record):
        x = state.variables["x"].value.detach()
        values.append(float(problem.upper(x, known.lower(x), None)))

    bilevel.solve(problem, solver, steps=12, callbacks=[look])
    best = float(problem.upper(known.x, known.lower(known.x), None))
    gaps = [value - best for value in values][4:]  # the copies first have to meet their solutions
    rate = 1 - float(spectrum[0] / spectrum[-1])
    # 1e-6: inner error e^-10 and bias 1e-8, both relative to the first gap
    floor = 1e-5 * (values[0] - best) + 1e-6
    assert all(b <= rate * a + floor for a, b in itertools.pairwise(gaps))


class NoisyMixture(SoftmaxMixture):
    """The mixture with its centers moved by the noise of a batch."""

    def lower(self, x, y, batch):
        m, _ = self.centers()
        return x.softmax(0) @ (0.5 * (y - m - batch).square().sum(1))

    def batches(self, generator):
        return bilevel.Always(), Draws(self.sources, self.dim)


class Draws(bilevel.Stream):
    """Standard normal centers, endlessly."""

    def __init__(self, *shape):
        self.shape, self.generator = shape, torch.Generator().manual_seed(0)

    def __next__(self):
        return torch.randn(*self.shape, generator=self.generator, dtype=torch.float64)

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


@pytest.mark.parametrize(
    "solver",
    [
        Penalty(stencil=1, **PLAIN | {"inner_steps": 1, "lower_lr": 1e-300}),
        Penalty(stencil=2, **PLAIN | {"inner_steps": 1, "lower_lr": 1e-300}),
        Penalty(stencil=4, **PLAIN | {"inner_steps": 1, "lower_lr": 1e-300}),
        VPBGD(rise=0, inner_steps=1, lower_lr=1e-300),
        RecursivePenalty(warmup=0, eta=1.0, lower_lr=1e-300, prox=0.0),
    ],
    ids=["order 1", "order 2", "order 4", "joint", "recursive"],
)
def test_variance_stays_bounded_in_the_penalty(solver):
    """I24: with copies O(nu) apart, the variance at 1000 is at most 1.5 of that at 100."""
    problem, spread = NoisyMixture(), []
    x = torch.linspace(-1, 1, problem.sources, dtype=torch.float64)
    star, (_, t) = problem.solution().lower(x), problem.centers()
    for penalty in (100.0, 1000.0):
        options = {"max_penalty": penalty} if isinstance(solver, Penalty) else {}
        path = Estimates(problem, x, dataclasses.replace(solver, penalty=penalty, **options))
        copies = [v for n, v in path.state.variables.items() if n != "x"]
        offsets = (1, -1, 2, -2) if getattr(solver, "stencil", 1) > 1 else (1, 0)
        for copy, offset in zip(copies, offsets, strict=False):
            copy.assign([(star + offset / penalty * t) / (1 + offset / penalty)])
        found = []
        for _ in range(200):
            path.advance()
            found.append(path.latest().value[0])
        spread.append(float(torch.stack(found).var(0).sum()))
    assert spread[0] > 1e-3 and spread[1] <= 1.5 * spread[0]
