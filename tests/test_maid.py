"""MAID's certificates against closed forms: no bound may fail, in any run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel import Functions
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.maid import MAID
from bilevel.spectrum import extremes

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 6),
    dim_y=st.integers(1, 6),
    condition=st.floats(1.0, 30.0),
    rho=st.floats(0.1, 2.0),
    data_seed=st.integers(0, 10_000),
)


class Recording(bilevel.Single):
    """A launcher that keeps what x gathered, the step size, and x and y around every step."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "seen", [])

    def step(self, variables):
        x = variables[-1]
        assert x.name == "x"
        before, lr = x.value.detach().clone(), x.optimizer.param_groups[0]["lr"]
        gradient = x.gradient()[0].clone()
        super().step(variables)
        self.seen.append((before, gradient, lr, x.value.detach().clone()))


def value(problem, x):
    """F(x)."""
    return float(problem.upper(x, problem.solution().lower(x), None))


def run(problem, solver, steps):
    """The recorded steps with their evidence and the y of their p, and the result."""
    launcher, rows, ends = Recording(), [], []

    def keep(state, record):
        rows.append(record)
        ends.append(state.vectors["before"][0].clone())

    result = bilevel.solve(problem, solver, steps=steps, launcher=launcher, callbacks=[keep])
    return [
        (*seen, row, y) for seen, row, y in zip(launcher.seen, rows, ends, strict=False)
    ], result


def check_certificates(problem, solver, steps):
    """I25 at every step: the error of p, the error of y, the decrease of F."""
    taken, result = run(problem, solver, steps)
    known = problem.solution()
    for before, p, lr, after, row, y in taken:
        true = known.hypergradient(before)
        assert (y - known.lower(before)).norm() <= row["accuracy"] * (1 + 1e-9) + 1e-12
        error = abs(float(problem.upper(before, y, None)) - value(problem, before))
        assert error <= row["value_bound"] * (1 + 1e-9) + 1e-12 * (1 + abs(row["upper"]))
        tiny = 1e-9 * (1 + true.norm())  # rounding of closed form and estimate
        assert (p - true).norm() <= row["bound"] * (1 + 1e-9) + tiny
        assert row["bound"] <= (1 - solver.descent) * p.norm()
        assert p @ true >= solver.descent * p @ p - tiny * p.norm()
        fall, scale = value(problem, before) - value(problem, after), 1 + abs(result.upper)
        assert fall >= solver.decrease * lr * float(p @ p) - 1e-12 * scale
        assert torch.equal(after, torch.add(before, p, alpha=-lr))
    return len(taken), result


@given(
    quadratics,
    st.floats(1e-5, 1e-1),
    st.sampled_from([1e-3, 1e3]),
    st.sampled_from(["gradient", "nesterov"]),
    st.sampled_from([0.001, 0.01, 1.0]),
)
@settings(max_examples=12)
def test_no_certificate_is_violated(problem, accuracy, linear, method, lr):
    options = {"accuracy": accuracy, "linear_accuracy": linear, "upper_lr": lr}
    check_certificates(problem, MAID(lower_method=method, tolerance=1e-2, **options), 4)


@pytest.mark.parametrize("accuracy", [1e-1, 1e-3])
def test_the_bound_is_that_of_the_theorem(accuracy):
    """w = (L_f |J| / mu + |D|) e + |J| d / mu on a quadratic, with mu = 1."""
    problem = Quadratic()
    d, norm = problem.data(), lambda m: torch.linalg.matrix_norm(m, 2)
    options = {"accuracy": accuracy, "linear_accuracy": accuracy}
    taken, _ = run(problem, MAID(lower_method="gradient", **options), 3)
    for before, _, _, _, row, y in taken:
        r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ before
        e, residual = row["accuracy"], row["linear_residual"] * r.norm()
        assert e == pytest.approx(float((d["A"] @ y - d["B"] @ before - d["b"]).norm()), abs=1e-12)
        cross, bend = norm(d["B"]), norm(d["C"].T @ d["C"])
        want = (bend * cross + norm(d["D"])) * e + cross * residual
        assert row["bound"] == pytest.approx(float(want), rel=1e-6)
        assert row["value_bound"] == pytest.approx(float(r.norm() * e + bend * e**2 / 2), rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_takes_the_first_trial_with_enough_decrease(seed):
    """At high accuracy the line search is Armijo's on F itself; twice the step must fail."""
    problem = Quadratic(dim_x=2, dim_y=2, condition=3.0, data_seed=seed)
    options = {"accuracy": 1e-11, "linear_accuracy": 1e-11, "descent": 0.9, "decrease": 0.8}
    taken, _ = run(problem, MAID(upper_lr=8.0, **options), 2)
    (before, p, lr, after, row, _), (_, _, next_lr, _, next_row, _) = taken

    def enough(lr):
        fall = value(problem, before) - value(problem, before - lr * p)
        return fall >= 0.8 * lr * float(p @ p)

    assert enough(lr) and not enough(2 * lr)
    assert lr == 8.0 * 0.5 ** (row["trials"] - 1)
    assert next_lr == lr * 1.25 * 0.5 ** (next_row["trials"] - 1)
    assert row["upper"] == pytest.approx(value(problem, after), abs=1e-9)


@pytest.mark.slow
@given(
    quadratics,
    st.floats(1e-5, 1e-1),
    st.floats(1e-5, 1e-1),
    st.sampled_from(["gradient", "nesterov"]),
    st.sampled_from([0.001, 0.01, 1.0]),
)
@settings(max_examples=300)
def test_no_certificate_is_violated_in_300_runs(problem, accuracy, linear, method, lr):
    options = {"accuracy": accuracy, "linear_accuracy": linear, "upper_lr": lr}
    check_certificates(problem, MAID(lower_method=method, tolerance=1e-3, **options), 8)


def test_outer_steps_do_not_depend_on_the_first_accuracy():
    """I25: within a factor of 2 for e from 1e-5 to 1e-1, to the same certified gradient."""
    counts = []
    for accuracy in (1e-1, 1e-3, 1e-5):
        options = {"accuracy": accuracy, "linear_accuracy": accuracy, "tolerance": 1e-1}
        result = bilevel.solve(Quadratic(condition=5.0), MAID(**options), steps=200)
        assert result.status is bilevel.Status.CONVERGED
        counts.append(result.nit)
    assert max(counts) <= 2 * min(counts) and min(counts) > 5


def test_reaches_the_optimum_with_its_certificate():
    """|x - x*| <= |dF| / mu_F, mu_F the least eigenvalue of the Hessian of the quadratic F."""
    problem = Quadratic(condition=3.0)
    slope, zero = problem.solution().hypergradient, torch.zeros(3, dtype=torch.float64)
    bend = torch.stack([slope(e) - slope(zero) for e in torch.eye(3, dtype=torch.float64)])
    least = float(torch.linalg.eigvalsh(bend)[0])
    result = bilevel.solve(problem, MAID(tolerance=1e-3, upper_lr=0.1), steps=200)
    assert result.status is bilevel.Status.CONVERGED and not result.warnings
    assert result.evidence["gradient"] + result.evidence["bound"] <= 1e-3
    assert problem.solution().hypergradient(result.x).norm() <= 1e-3
    assert (result.x - problem.solution().x).norm() <= 1e-3 / least


def test_ends_where_the_precision_ends():
    """With no tolerance it stops by itself when float32 holds no step that can be certified."""
    start = torch.zeros(2)
    result = bilevel.minimize(
        lambda x, y: (y - 1).square().sum(),
        lambda x, y: (y - x).square().sum() + 0.5 * (y[0] - y[1]).square(),
        start,
        start,
        solver=MAID(upper_lr=0.1),
        steps=500,
    )
    assert result.status is bilevel.Status.CONVERGED and result.nit > 5
    assert (result.x - 1).norm() <= 1e-2  # certifying needs e |r| below the decrease


def test_certifies_a_problem_that_is_not_quadratic():
    """Ridge with weight exp(x): F known by a solve, constants estimated by secants."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    target = rows.sum(1) + torch.randn(12, generator=generator, dtype=torch.float64)

    def lower(x, y):
        return 0.5 * (rows[:6] @ y - target[:6]).square().mean() + 0.5 * x.exp() * y.square().sum()

    def upper(x, y):
        return 0.5 * (rows[6:] @ y - target[6:]).square().mean()

    def solved(x):
        bend = rows[:6].T @ rows[:6] / 6 + x.exp() * torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(bend, rows[:6].T @ target[:6] / 6)

    start = torch.zeros((), dtype=torch.float64)
    problem = Functions(upper, lower, start, torch.zeros(4, dtype=torch.float64))
    launcher = Recording()
    result = bilevel.solve(problem, MAID(tolerance=1e-4), steps=60, launcher=launcher)
    assert result.status is bilevel.Status.CONVERGED and len(launcher.seen) > 3
    for (before, p, lr, after), row in zip(launcher.seen, result.history, strict=False):
        x = before.clone().requires_grad_()
        (true,) = torch.autograd.grad(upper(x, solved(x)), x)
        assert abs(p - true) <= row["bound"] * (1 + 1e-9) + 1e-12
        fall = upper(before, solved(before)) - upper(after, solved(after))
        assert fall >= 0.01 * lr * p * p - 1e-12


def test_a_rejected_trial_leaves_no_trace():
    """With curvature exp(x) the constants of a trial are not those of where it started."""
    scale = torch.tensor([1.0, 4.0], dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    problem = Functions(
        lambda x, y: (y.sum() - 1).square() + 0.1 * (x - 1).square(),
        lambda x, y: 0.5 * x.exp() * (scale * y.square()).sum() - y.sum(),
        zero,
        torch.ones(2, dtype=torch.float64),
    )
    solver = MAID(upper_lr=8.0, trials=1, lower_method="gradient")
    taken, _ = run(problem, solver, 3)
    assert taken[0][4]["lr"] < 8.0
    for before, _, _, _, row, y in taken:
        gradient = before.exp() * scale * y - 1
        assert row["accuracy"] == pytest.approx(float(gradient.norm() / before.exp()), rel=1e-9)


def test_given_constants_cost_nothing_and_bound_alike():
    problem = Quadratic()
    d = problem.data()
    norm = lambda m: float(torch.linalg.matrix_norm(m, 2))  # noqa: E731
    given = {
        "strong_convexity": 1.0,
        "smoothness": problem.condition,
        "cross_norm": norm(d["B"]),
        "upper_smoothness": norm(d["C"].T @ d["C"]),
        "upper_cross_norm": norm(d["D"]),
    }
    own, told = (bilevel.solve(problem, MAID(**options), steps=3) for options in ({}, given))
    assert told.counts.keys() == {"upper_grad", "lower_grad", "hvp", "cross"}
    assert own.counts["hvp"] > told.counts["hvp"]
    assert torch.allclose(own.x, told.x, atol=1e-8)
    assert own.evidence["bound"] == pytest.approx(told.evidence["bound"], rel=1e-6)


class Counted(Quadratic):
    """The quadratic, counting how often each loss is evaluated."""

    calls = {}

    def lower(self, x, y, batch):
        self.calls["lower"] = self.calls.get("lower", 0) + 1
        return Quadratic.lower(self, x, y, batch)

    def upper(self, x, y, batch):
        self.calls["upper"] = self.calls.get("upper", 0) + 1
        return Quadratic.upper(self, x, y, batch)


def test_counts_are_the_evaluations_of_the_losses():
    problem = Counted()
    problem.calls.clear()
    counts = bilevel.solve(problem, MAID(), steps=4).counts
    assert problem.calls == {"lower": counts["lower_grad"], "upper": counts["upper_grad"]}


def test_feasible_at_every_iterate_and_optimal():
    """With X = {x <= 0.2}: every step certified, and the fixed point of the projected gradient."""
    problem = Quadratic(condition=3.0)
    boxed = Functions(
        lambda x, y: problem.upper(x, y, None),
        lambda x, y: problem.lower(x, y, None),
        *problem.init(torch.Generator()),
        project_upper=lambda x: x.clamp(max=0.2),
    )
    seen = []
    result = bilevel.solve(
        boxed,
        MAID(tolerance=1e-4),
        steps=100,
        callbacks=[lambda state, r: seen.append(state.variables["x"].value.detach().clone())],
    )
    assert result.status is bilevel.Status.CONVERGED
    values = [value(problem, x) for x in seen]
    assert all(bool((x <= 0.2).all()) for x in seen) and values == sorted(values, reverse=True)
    step = result.x - problem.solution().hypergradient(result.x)
    assert (result.x - step.clamp(max=0.2)).norm() <= 1e-4 and bool((result.x == 0.2).any())


def test_softmax_mixture_decreases():
    problem = SoftmaxMixture()
    taken, _ = run(problem, MAID(upper_lr=1.0), 20)
    values = [value(problem, after) for _, _, _, after, _, _ in taken]
    assert len(values) == 20 and values == sorted(values, reverse=True)


def test_scales_and_shifts():
    """I17, I18: p at the first step under f -> c f, g -> c g, g + q(x), f + q(x)."""
    problem = Quadratic()
    upper, lower = problem.upper, problem.lower
    start = problem.init(torch.Generator())

    def first(f, g):
        launcher = Recording()
        changed = Functions(lambda x, y: f(x, y, None), lambda x, y: g(x, y, None), *start)
        tight = {"accuracy": 1e-12, "linear_accuracy": 1e-12}
        bilevel.solve(changed, MAID(**tight), steps=1, launcher=launcher)
        return launcher.seen[0][1]

    base = first(upper, lower)
    near = lambda a, b: torch.allclose(a, b, atol=1e-9)  # noqa: E731
    assert near(first(lambda *a: 3 * upper(*a), lower), 3 * base)
    assert near(first(upper, lambda *a: 3 * lower(*a)), base)
    assert near(first(upper, lambda x, y, b: lower(x, y, b) + x.exp().sum()), base)
    assert near(first(lambda x, y, b: upper(x, y, b) + x.exp().sum(), lower), base + 1)


def test_a_saved_run_goes_on_bit_for_bit(tmp_path):
    problem, solver = Quadratic(), MAID()
    whole = bilevel.solve(problem, solver, steps=7)
    bilevel.solve(problem, solver, steps=4, checkpoints=tmp_path)
    rest = bilevel.solve(problem, solver, steps=7, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, rest.x) and torch.equal(whole.y, rest.y)
    assert whole.history == rest.history and whole.counts == rest.counts


def test_a_lower_level_without_strong_convexity_is_reported():
    result = bilevel.minimize(
        lambda x, y: ((y - 1) ** 2).sum(),
        lambda x, y: (y[0] - x) ** 2,
        torch.zeros((), dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        solver=MAID(),
        steps=3,
    )
    assert result.status is bilevel.Status.NONFINITE and "strongly convex" in result.message


def test_a_loss_that_turns_nan_leaves_the_last_good_state():
    zero = torch.zeros((), dtype=torch.float64)
    result = bilevel.minimize(
        lambda x, y: torch.where(x > 0.5, torch.nan, 1.0) * (y - 2) ** 2,
        lambda x, y: (y - x) ** 2,
        zero,
        zero,
        solver=MAID(upper_lr=0.05, grow=1.0),
        steps=100,
    )
    assert result.status is bilevel.Status.NONFINITE and "upper loss" in result.message
    assert 0 < float(result.x) <= 0.5 and abs(float(result.y - result.x)) < 0.1


def test_wrong_options_and_constraints_are_reported():
    with pytest.raises(bilevel.InputError) as error:
        MAID(accuracy=0, shrink=1.0, trials=0)
    assert len(error.value.faults) == 3
    with pytest.raises(bilevel.InputError, match=r"below solver\.descent"):
        MAID(descent=0.1, decrease=0.1)
    box = Functions(*[None] * 4, project_lower=lambda y: y)
    assert "project_lower" in MAID().check(box)[0]


@given(st.integers(1, 8), st.integers(0, 1000), st.booleans())
def test_extremes_of_a_spectrum(n, seed, repeated):
    """Against dense eigenvalues; with too few steps the largest stays within its residual."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix).Q
    spectrum = torch.randn(n, generator=generator, dtype=torch.float64)
    spectrum[1:] = spectrum[1] if repeated and n > 1 else spectrum[1:]
    matrix = basis @ torch.diag(spectrum) @ basis.T
    products = []

    def matvec(v):
        products.append(1)
        return [matrix @ v[0]]

    low, high = extremes(matvec, [torch.zeros(n).double()], steps=n)
    assert low == pytest.approx(float(spectrum.min()), abs=1e-9)
    assert high == pytest.approx(float(spectrum.max()), abs=1e-9)
    assert len(products) <= (2 if repeated else n)
