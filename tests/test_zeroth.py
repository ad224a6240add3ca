"""Zeroth order: the two-point estimate, replayed directions, and the forward-only penalty."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bilevel
from bilevel import Functions
from bilevel.memory import MemoryState
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.zeroth import ZO, replay, two_point
from bilevel.tree import leaves

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
    return x, torch.randn(problem.dim_y, generator=generator, dtype=torch.float64)


def estimate(problem, x, y, z, **options):
    """The gradient of x that one step takes at given copies of y, which do not move."""
    options = {"inner_steps": 0, "warmup": 0, "upper_optimizer": "sgd", "upper_lr": 1.0} | options
    solver, launcher = ZO(**options), bilevel.Single()
    state = solver.init(problem, bilevel.Full(), launcher, torch.Generator().manual_seed(0))
    for name, value in (("x", x), ("y", y), ("z", z)):
        state.variables[name].assign([value])
    solver.step(problem, launcher, state)
    return x - state.variables["x"].value.detach(), state


@given(quadratics, st.floats(1e-2, 1e2), st.integers(0, 100))
def test_two_points_are_exact_on_quadratics(problem, spacing, seed):
    """I28: the slope along u for any e; y is left as it was bit for bit."""
    x, y = point(problem)
    d, was = problem.data(), y.clone()
    u = replay([y], seed)
    slope = two_point(lambda: float(problem.lower(x, y, None)), [y], u, spacing)
    true = float((d["A"] @ y - d["B"] @ x - d["b"]) @ next(u()))
    value = abs(float(problem.lower(x, y, None))) + problem.condition * spacing**2 * 100
    assert slope == pytest.approx(true, abs=1e-14 * value / spacing + 1e-12 * abs(true))
    assert torch.equal(y, was)


@given(quadratics)
def test_the_mean_over_a_frame_is_the_gradient(problem):
    """I28: over orthonormal directions of norm sqrt(d), to 1e-12."""
    x, y = point(problem)
    d, n = problem.data(), problem.dim_y
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    found = torch.zeros_like(y)
    for q in frame.T * n**0.5:
        value = lambda: float(problem.lower(x, y, None))  # noqa: E731
        found += two_point(value, [y], lambda q=q: iter([q]), 0.1) * q / n
    true = d["A"] @ y - d["B"] @ x - d["b"]
    assert (found - true).norm() <= 1e-12 * (1 + true.norm()) * problem.condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_restores_low_precision_bit_for_bit(dtype):
    """Adding the direction back would not: (w + e u) - e u rounds."""
    points = [torch.linspace(-3, 3, 101).to(dtype), torch.full((5, 2), 0.3, dtype=dtype)]
    was = [p.clone() for p in points]
    u = replay(points, 5)
    two_point(lambda: float(sum(p.double().square().sum() for p in points)), points, u, 1e-1)
    assert all(torch.equal(a, b) for a, b in zip(points, was, strict=True))
    added = [(p + 0.1 * d) - 0.1 * d for p, d in zip(points, u(), strict=True)]
    assert not all(torch.equal(a, b) for a, b in zip(added, was, strict=True))
    pairs = zip(u(), u(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in pairs)
    other = replay(points, 6)
    assert not torch.equal(next(u()), next(other()))


def test_directions_are_standard_normal_and_differ_by_leaf():
    first, second = replay([torch.zeros(20_000), torch.zeros(20_000)], 1)()
    for t in (first, second):  # 4 standard deviations of the mean and of the variance
        assert abs(float(t.mean())) < 4 / 20_000**0.5
        assert abs(float(t.square().mean()) - 1) < 4 * (2 / 20_000) ** 0.5
    assert abs(float((first * second).mean())) < 4 / 20_000**0.5


@given(
    st.integers(2, 8), st.integers(1, 8), st.integers(0, 10_000), st.sampled_from([2.0, 10.0, 1e3])
)
def test_softmax_mixture_has_the_exact_factor(sources, dim, seed, penalty):
    """I6: dF / (1 + nu) at exact points."""
    problem = SoftmaxMixture(sources=sources, dim=dim, data_seed=seed)
    _, t = problem.centers()
    x = torch.linspace(-1, 1, sources, dtype=torch.float64)
    star, nu = problem.solution().lower(x), 1 / penalty
    got, state = estimate(problem, x, (star + nu * t) / (1 + nu), star, penalty=penalty)
    true = problem.solution().hypergradient(x)
    assert torch.allclose(got * (1 + nu), true, atol=1e-10, rtol=1e-9)
    gap = penalty * (state.lower - float(problem.lower(x, star, None)))
    assert state.numbers["penalty_gap"] == pytest.approx(gap, abs=1e-9)
    assert state.numbers["penalty"] == penalty


@given(quadratics, st.floats(1.0, 100.0))
def test_two_points_over_x_average_to_the_gradient_by_autograd(problem, penalty):
    """The penalized value is quadratic in x, so that one slope is exact: s = <gradient, u>."""
    x, y = point(problem)
    z = y + 0.1
    exact, _ = estimate(problem, x, y, z, penalty=penalty)
    got, state = estimate(
        problem, x, y, z, penalty=penalty, upper_gradient="two_point", spacing=0.5
    )
    generator = torch.Generator()
    solver_state = ZO().init(
        problem, bilevel.Full(), bilevel.Single(), torch.Generator().manual_seed(0)
    )
    generator.set_state(solver_state.vectors["generator"][0])
    seed = int(torch.randint(2**62, (1,), generator=generator, dtype=torch.int64))
    u = next(replay([x], seed)())
    assert torch.allclose(got, (exact @ u) * u, atol=1e-9 * penalty, rtol=1e-9)
    assert state.counts["lower_grad"] == state.counts["upper_grad"] == 0


@given(quadratics)
def test_several_directions_are_averaged(problem):
    x, y = point(problem)
    options = {"upper_optimizer": "sgd", "upper_lr": 1.0, "warmup": 0, "spacing": 0.5}
    ways = {"upper_gradient": "two_point", "directions": 3, "inner_steps": 1, "lower_lr": 0.01}
    solver, launcher = ZO(**options, **ways), bilevel.Single()
    state = solver.init(problem, bilevel.Full(), launcher, torch.Generator().manual_seed(0))
    for name, value in (("x", x), ("y", y), ("z", y)):
        state.variables[name].assign([value])
    generator = torch.Generator()
    generator.set_state(state.vectors["generator"][0])
    seeds = [torch.randint(2**62, (3,), generator=generator, dtype=torch.int64) for _ in "yx"]
    solver.step(problem, launcher, state)
    d, (y1, z1) = problem.data(), (state.variables[name].value.detach() for name in "yz")
    g = d["A"] @ y - d["B"] @ x - d["b"]
    us = torch.stack([next(replay([y], int(seed))()) for seed in seeds[0]])
    assert torch.allclose(z1, y - 0.01 * (us @ g) @ us / 3, atol=1e-9)
    exact, _ = estimate(problem, x, y1, z1)
    us = torch.stack([next(replay([x], int(seed))()) for seed in seeds[1]])
    moved = x - state.variables["x"].value.detach()
    assert torch.allclose(moved, (us @ exact) @ us / 3, atol=1e-8, rtol=1e-8)


class Forward(Quadratic):
    """The quadratic, refusing any evaluation from which y could be differentiated."""

    def lower(self, x, y, batch):
        assert not (torch.is_grad_enabled() and y.requires_grad)
        return Quadratic.lower(self, x, y, batch)

    def upper(self, x, y, batch):
        assert not (torch.is_grad_enabled() and y.requires_grad)
        return Quadratic.upper(self, x, y, batch)


@pytest.mark.parametrize("way", ["autograd", "two_point"])
def test_nothing_is_differentiated_by_y(way):
    state_after = []
    bilevel.solve(
        Forward(),
        ZO(upper_gradient=way, warmup=1),
        steps=4,
        callbacks=[lambda state, r: state_after.append(state)],
    )
    for name in ("y", "z"):
        assert all(p.grad is None for p in leaves(state_after[-1].variables[name].value))


def test_both_copies_go_along_one_direction_on_one_batch():
    """With f = 0 they stay equal bit for bit, whatever the noise; x then has no gradient."""
    batches = []

    class Noisy(Quadratic):
        def lower(self, x, y, batch):
            batches.append(batch)
            return Quadratic.lower(self, x, y, batch) * batch

        def upper(self, x, y, batch):
            return 0.0 * y.sum() + 0.0 * x.sum()

        def batches(self, generator):
            return bilevel.Always(None), Rising()

    states = []
    solver = ZO(warmup=0, inner_steps=3)
    result = bilevel.solve(
        Noisy(), solver, steps=3, callbacks=[lambda state, r: states.append(state)]
    )
    y, z = (states[-1].variables[name].value for name in "yz")
    assert torch.equal(y, z) and bool(y.any()) and not result.x.any()
    assert batches[:4] == [1.0] * 4 and batches[4:8] == [2.0] * 4


class Rising(bilevel.Stream):
    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return float(self.at)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@given(quadratics)
def test_one_inner_step_against_the_formula(problem):
    """y <- y - lr s u with s = <grad g + nu grad f, u> and z without f: the same u."""
    x, y = point(problem)
    d, nu, lr = problem.data(), 0.25, 0.01
    solver, launcher = ZO(inner_steps=1, penalty=4.0, lower_lr=lr, spacing=0.5), bilevel.Single()
    state = solver.init(problem, bilevel.Full(), launcher, torch.Generator().manual_seed(0))
    for name, value in (("x", x), ("y", y), ("z", y)):
        state.variables[name].assign([value])
    solver.step(problem, launcher, state)
    g = d["A"] @ y - d["B"] @ x - d["b"]
    r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
    moves = [(state.variables[name].value.detach() - y) / lr for name in "yz"]
    # both along u: recover it from z's move, s u with s = <g, u>
    u = moves[1] / -((moves[1] @ -g).abs().sqrt())
    assert torch.allclose(moves[1], -(g @ u) * u, atol=1e-7)
    assert torch.allclose(moves[0], -((g + nu * r) @ u) * u, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("way", "directions"), [("autograd", 1), ("two_point", 4)])
def test_reaches_the_optimum_within_its_bias(way, directions):
    """The bias is nu/(1 + nu) of dF on the mixture-like family mu = L = 1, C'C about 1."""
    problem = Quadratic(condition=1.0, dim_x=2, dim_y=2)
    options = {"upper_gradient": way, "penalty": 100.0, "directions": directions}
    solver = ZO(**options, lower_lr=0.1, upper_optimizer="sgd", upper_lr=0.1)
    result = bilevel.solve(problem, solver, steps=150)
    optimum = problem.solution().x
    assert (result.x - optimum).norm() <= 0.05 * (1 + optimum.norm())


def test_modules_and_parts_are_moved():
    torch.manual_seed(0)
    rows = torch.randn(8, 3, dtype=torch.float64)

    class Parts(bilevel.Problem):
        def init(self, generator):
            return torch.zeros(2, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)

        def lower(self, x, y, batch):
            return x.exp()[0] * y(batch).square().sum() + y.weight.square().sum() / 2

        def upper(self, x, y, batch):
            return (y(batch) - 1).square().sum()

        def batches(self, generator):
            return bilevel.Always(rows), bilevel.Always(rows)

        def split(self, batch):
            return batch.split(4)

    result = bilevel.solve(Parts(), ZO(lower_lr=1e-2, warmup=5, spacing=1e-2), steps=30)
    assert result.success and bool(result.x[0].abs() > 0) and float(result.x[1]) == 0.0
    assert result.upper < 8.0  # what y = 0 has; the output moves towards 1


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"inner_steps": 3}, (5, 10, 42, 84)),
        ({"inner_steps": 3, "directions": 2}, (5, 10, 84, 168)),
        ({"inner_steps": 3, "upper_gradient": "two_point"}, (0, 0, 42 + 10, 84 + 20)),
        (
            {"inner_steps": 1, "upper_gradient": "two_point", "directions": 3},
            (0, 0, 42 + 30, 84 + 60),
        ),
    ],
)
def test_oracle_counts(options, want):
    counts = bilevel.solve(Quadratic(), ZO(warmup=2, **options), steps=7).counts
    names = ("upper_grad", "lower_grad", "upper_eval", "lower_eval")
    assert tuple(counts[name] for name in names) == want
    assert counts["hvp"] == counts["cross"] == 0


@pytest.mark.parametrize("way", ["autograd", "two_point"])
def test_a_saved_run_goes_on_bit_for_bit(way, tmp_path):
    problem, solver = SoftmaxMixture(), ZO(upper_gradient=way, warmup=1)
    whole = bilevel.solve(problem, solver, steps=7)
    bilevel.solve(problem, solver, steps=4, checkpoints=tmp_path)
    rest = bilevel.solve(problem, solver, steps=7, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, rest.x) and torch.equal(whole.y, rest.y)
    assert whole.history == rest.history and whole.counts == rest.counts


def test_iterates_stay_in_the_feasible_sets():
    seen = []
    zero = torch.zeros((), dtype=torch.float64)
    bilevel.minimize(
        lambda x, y: (y - 3) ** 2,
        lambda x, y: (y - x) ** 2,
        zero,
        zero,
        solver=ZO(upper_lr=0.1, lower_lr=0.1),
        steps=60,
        project_upper=lambda x: x.clamp(-1, 0.5),
        project_lower=lambda y: y.clamp(-1, 0.4),
        callback=lambda state, r: seen.append([v.value.item() for v in state.variables.values()]),
    )
    assert all(x <= 0.5 and y <= 0.4 and z <= 0.4 for x, y, z in seen)
    assert seen[-1][1] == 0.4


def test_a_diverging_lower_level_ends_with_a_status():
    result = bilevel.solve(Quadratic(), ZO(lower_lr=1e200), steps=50)
    assert result.status is bilevel.Status.NONFINITE
    assert bool(result.x.isfinite().all()) and bool(result.y.isfinite().all())


def test_shift_of_the_logits_of_weights_changes_nothing():
    """I20, and I18: x + c, and g + q(x)."""
    problem = SoftmaxMixture()
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)
    y, z = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    base, _ = estimate(problem, x, y, z)
    assert torch.allclose(estimate(problem, x + 3, y, z)[0], base, atol=1e-12)
    assert abs(float(base.sum())) < 1e-12 and bool(base.any())
    shifted = Functions(
        lambda x, y: problem.upper(x, y, None),
        lambda x, y: problem.lower(x, y, None) + x.exp().sum(),
        x,
        y,
    )
    assert torch.allclose(estimate(shifted, x, y, z)[0], base, atol=1e-12)


class Held(bilevel.Memory):
    """Holds all leaves of y but the first."""

    def init(self, value, generator):
        return HeldState()


class HeldState(MemoryState):
    def before_step(self, step, variables):
        for variable in variables:
            for leaf in leaves(variable.value)[1:]:
                leaf.requires_grad_(False)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_leaves_held_by_a_memory_strategy_do_not_move():
    start = [torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    problem = Functions(
        lambda x, y: (y[0].sum() + y[1].sum() - 1) ** 2,
        lambda x, y: (y[0] - x).square().sum() + (y[1] - x).square().sum(),
        torch.zeros((), dtype=torch.float64),
        start,
    )
    result = bilevel.solve(problem, ZO(warmup=0), steps=3, memory=Held())
    assert torch.equal(result.y[1], start[1]) and not torch.equal(result.y[0], start[0])


def test_wrong_options_are_reported_together():
    with pytest.raises(bilevel.InputError) as error:
        ZO(penalty=0.0, directions=0, spacing=-1.0)
    assert len(error.value.faults) == 3
