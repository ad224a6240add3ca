"""BOME: the barrier's identities at every step, and where it ends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel import Functions
from bilevel.memory import MemoryState
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.bome import BOME
from bilevel.tree import leaves

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)


def begin(problem, x, y, **options):
    solver, launcher = BOME(**options), bilevel.Single()
    state = solver.init(problem, bilevel.Full(), launcher, torch.Generator().manual_seed(0))
    state.variables["x"].assign([x])
    state.variables["y"].assign([y])
    return solver, launcher, state


def direction(problem, x, y, **options):
    """The direction of one step at (x, y), by steps of size 1, and the state after it."""
    options = {"upper_lr": 1.0, "lower_lr": 1.0, "inner_lr": 0.02} | options
    solver, launcher, state = begin(problem, x, y, **options)
    solver.step(problem, launcher, state)
    ends = [state.variables[name].value.detach() for name in "xy"]
    return torch.cat([x - ends[0], y - ends[1]]), state


def point(problem):
    generator = torch.Generator().manual_seed(problem.data_seed)
    x = torch.randn(problem.dim_x, generator=generator, dtype=torch.float64)
    return x, torch.randn(problem.dim_y, generator=generator, dtype=torch.float64)


def gradients(problem, x, y, steps, lr=0.02):
    """grad f, grad q and q by dense algebra, z from y by gradient descent on g."""
    d = problem.data()
    g = lambda y: 0.5 * y @ d["A"] @ y - y @ (d["B"] @ x + d["b"])  # noqa: E731
    z = y
    for _ in range(steps):
        z = z - lr * (d["A"] @ z - d["B"] @ x - d["b"])
    r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
    f = torch.cat([d["D"] @ y + problem.rho * (x - d["s"]), r])
    q = torch.cat([-d["B"].T @ (y - z), d["A"] @ y - d["B"] @ x - d["b"]])
    return f, q, float(g(y) - g(z))


@given(
    quadratics,
    st.integers(1, 12),
    st.floats(0.05, 2.0),
    st.sampled_from(["gradient", "value"]),
)
def test_the_step_descends_on_the_gap(problem, steps, barrier, phi):
    """I27: <grad q, step> >= phi, lam >= 0, and lam = 0 iff <grad f, grad q> >= phi."""
    x, y = point(problem)
    options = {"inner_steps": steps, "barrier": barrier, "phi": phi}
    got, state = direction(problem, x, y, **options)
    f, q, gap = gradients(problem, x, y, steps)
    assert state.numbers["q"] == pytest.approx(gap, abs=1e-10)
    floor = barrier * (float(q @ q) if phi == "gradient" else gap)
    multiplier = state.numbers["multiplier"]
    tiny = 1e-9 * (1 + float(q @ q) + float(f.norm() * q.norm()))
    assert multiplier >= 0 and q @ got >= floor - tiny
    assert torch.allclose(got, f + multiplier * q, atol=1e-9, rtol=1e-9)
    if multiplier > 0:  # the least correction: the barrier is met with equality
        assert float(f @ q) < floor + tiny and float(q @ got) == pytest.approx(floor, abs=tiny)
    else:
        assert float(f @ q) >= floor - tiny


def test_the_multiplier_vanishes_where_f_descends_on_the_gap_anyway():
    """f = g in y: <grad f, grad q> = |grad q|^2 beats a share below 1, and not one above."""
    problem = Functions(
        lambda x, y: 0.5 * (y - x).square().sum(),
        lambda x, y: 0.5 * (y - x).square().sum(),
        torch.zeros(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.float64),
    )
    x, y = (t.detach() for t in problem.init(torch.Generator()))
    # One step of size 1 solves the lower level: z = x, grad_x q = x - y.
    below, above = (
        direction(problem, x, y, barrier=share, inner_steps=1, inner_lr=1.0)[1].numbers
        for share in (0.9, 1.5)
    )
    assert below["multiplier"] == 0.0
    assert above["multiplier"] == pytest.approx(0.5)


@given(quadratics, st.floats(0.2, 5.0))
def test_moves_with_coordinates_scales_and_shifts(problem, c):
    """I17: f -> c f with steps / c; I18: shifts g + q(x), constants: no effect on the step."""
    x, y = point(problem)
    upper, lower = problem.upper, problem.lower

    def found(f, g, **options):
        changed = Functions(lambda x, y: f(x, y, None), lambda x, y: g(x, y, None), x, y)
        return direction(changed, x, y, **options)[0]

    base = found(upper, lower)
    near = lambda a, b: (a - b).norm() <= 1e-9 * (1 + base.norm())  # noqa: E731
    assert near(found(upper, lambda x, y, b: lower(x, y, b) + x.exp().sum() + 3), base)
    # g -> c g with inner steps / c: q -> c q, so that phi's share must follow for the same step
    scaled = found(upper, lambda *a: c * lower(*a), inner_lr=0.02 / c, barrier=0.5 / c)
    assert near(scaled, base)


def test_the_error_halves_with_the_step():
    """The multiplier grows as 1/|grad q| until steps of lr no longer follow: a bias of O(lr).

    With mu = L = 1 one inner step is exact, so that q is the true gap.
    """
    problem = Quadratic(condition=1.0)
    optimum, errors = problem.solution().x, []
    for lr, steps in ((0.04, 300), (0.02, 600), (0.01, 1200)):
        tail = []
        bilevel.solve(
            problem,
            BOME(upper_lr=lr, lower_lr=lr, inner_lr=1.0, inner_steps=1),
            steps=steps,
            callbacks=[lambda state, r, tail=tail: tail.append(state.variables["x"].value.clone())],
        )
        errors.append(float((torch.stack(tail[-50:]).detach().mean(0) - optimum).norm()))
    assert errors[1] <= 0.6 * errors[0] and errors[2] <= 0.6 * errors[1]
    assert errors[2] <= 0.1 <= 0.2 * optimum.norm()


def test_oracle_counts():
    counts = bilevel.solve(Quadratic(), BOME(inner_steps=4), steps=7).counts
    assert counts == {"upper_grad": 7, "lower_grad": 7 * 5, "hvp": 0, "cross": 0}


@pytest.mark.parametrize("solver", [BOME(), BOME(phi="value", lower_optimizer="adam")])
def test_a_saved_run_goes_on_bit_for_bit(solver, tmp_path):
    problem = SoftmaxMixture()
    whole = bilevel.solve(problem, solver, steps=7)
    bilevel.solve(problem, solver, steps=4, checkpoints=tmp_path)
    rest = bilevel.solve(problem, solver, steps=7, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, rest.x) and torch.equal(whole.y, rest.y)
    assert whole.history == rest.history and whole.counts == rest.counts


def test_iterates_stay_in_the_feasible_sets():
    seen = []
    zero = torch.zeros((), dtype=torch.float64)
    bilevel.minimize(
        lambda x, y: (y - 3) ** 2 + 0 * x,
        lambda x, y: (y - x) ** 2,
        zero,
        zero,
        solver=BOME(upper_lr=0.1, lower_lr=0.1),
        steps=100,
        project_upper=lambda x: x.clamp(-1, 0.5),
        project_lower=lambda y: y.clamp(-1, 0.75),
        callback=lambda state, r: seen.append([v.value.item() for v in state.variables.values()]),
    )
    assert all(x <= 0.5 and y <= 0.75 and z <= 0.75 for x, y, z in seen)
    assert seen[-1][0] == 0.5


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
    result = bilevel.solve(problem, BOME(), steps=3, memory=Held())
    assert torch.equal(result.y[1], start[1]) and not torch.equal(result.y[0], start[0])


def test_a_diverging_lower_level_ends_with_a_status():
    result = bilevel.solve(Quadratic(), BOME(inner_lr=1e200), steps=5)
    assert result.status is bilevel.Status.NONFINITE
    assert bool(result.x.isfinite().all()) and bool(result.y.isfinite().all())


def test_wrong_options_are_reported_together():
    with pytest.raises(bilevel.InputError) as error:
        BOME(inner_steps=0, barrier=0.0, upper_lr=-1.0)
    assert len(error.value.faults) == 3
