"""Iterative differentiation and DARTS against closed forms, differences and each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bilevel
from bilevel import Functions, Problem
from bilevel.linear import Neumann
from bilevel.memory import MemoryState
from bilevel.oracle import Oracle
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.darts import DARTS
from bilevel.solvers.unrolled import ITD
from bilevel.tree import clone, leaves

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)
STEPS = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adam": {"lower_optimizer": "adam"},
}


def estimate(problem, x, y, kind=ITD, **options):
    """The hypergradient that one step takes from (x, y), and the state after it."""
    options = {"upper_optimizer": "sgd", "upper_lr": 1.0} | options
    solver, launcher = kind(**options), bilevel.Single()
    state = solver.init(problem, bilevel.Full(), launcher, torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in leaves(x)]
    for name, value in (("x", x), ("y", y)):
        state.variables[name].assign([p.detach() for p in leaves(value)])
    seen = []
    move = launcher.step
    object.__setattr__(
        launcher,
        "step",
        lambda variables: (
            seen.extend(
                [g.clone() for g in v.gradient()] for v in variables if v is state.variables["x"]
            ),
            move(variables),
        ),
    )
    solver.step(problem, launcher, state)
    assert len(seen) == 1 and len(seen[0]) == len(before)
    return (seen[0][0] if len(seen[0]) == 1 else seen[0]), state


def point(problem):
    generator = torch.Generator().manual_seed(problem.data_seed)
    x = torch.randn(problem.dim_x, generator=generator, dtype=torch.float64)
    return x, torch.randn(problem.dim_y, generator=generator, dtype=torch.float64)


def slopes(problem, x, y):
    """r = grad_y f and grad_x f of the quadratic."""
    d = problem.data()
    r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
    return r, d["D"] @ y + problem.rho * (x - d["s"])


class Curved(Problem):
    """A non-quadratic lower level with two tensors as y, two as x, batches, and a box for y."""

    def __init__(self, project=False):
        if project:
            self.project_lower = lambda y: [p.clamp(-0.2, 0.3) for p in y]

    def init(self, generator):
        x = {"a": torch.tensor([0.3, -0.2]), "b": torch.tensor([[0.5]])}
        y = [torch.tensor([0.1, -0.4, 0.2]), torch.tensor([[0.3, 0.1]])]
        return clone({k: v.double() for k, v in x.items()}), clone([p.double() for p in y])

    def lower(self, x, y, batch):
        p, q = y[0], y[1].flatten()
        own = 0.5 * p.square().sum() + torch.cosh(q - x["b"].sum()).sum()
        mixed = (p[:2] * q).sum() * torch.sigmoid(x["a"][0])
        return own + 0.3 * mixed + 0.1 * p.pow(4).sum() - batch * torch.sin(x["a"]).sum() * p.sum()

    def upper(self, x, y, batch):
        fit = (y[0] - 1).square().sum() + torch.sin(y[1]).sum()
        return fit + batch * x["a"].square().sum() * y[0][0] + x["b"].sum()

    def batches(self, generator):
        return Cycle([0.7, 0.2]), Cycle([1.0, 0.5, 0.3])


class Cycle(bilevel.Stream):
    def __init__(self, items):
        self.items, self.at = items, 0

    def __next__(self):
        self.at += 1
        return self.items[(self.at - 1) % len(self.items)]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def flat(gradient):
    tensors = gradient if isinstance(gradient, list) else [gradient]
    return torch.cat([t.flatten() for t in tensors])


@given(quadratics, st.integers(1, 12), st.integers(0, 12), st.floats(0.01, 1.0))
def test_equals_the_closed_form(problem, total, cut, share):
    """I9: dy_T/dx = H^{-1} (I - (I - eta H)^K) B with K differentiated steps, y_T by the series."""
    d, (x, y) = problem.data(), point(problem)
    eta = share / problem.condition
    last = min(cut or total, total)
    turn = torch.eye(problem.dim_y, dtype=torch.float64) - eta * d["A"]
    star = problem.solution().lower(x)
    end = star + torch.linalg.matrix_power(turn, total) @ (y - star)
    r, direct = slopes(problem, x, end)
    power = torch.linalg.matrix_power(turn, last)
    unrolled = torch.linalg.solve(d["A"], d["B"] - power @ d["B"])
    got, state = estimate(problem, x, y, inner_steps=total, truncate=cut, lower_lr=eta)
    true = direct + unrolled.T @ r
    assert (got - true).norm() <= 1e-12 * (1 + true.norm() + direct.norm())
    assert torch.allclose(state.variables["y"].value.detach(), end, atol=1e-12)
    left = float((power @ r).norm() / r.norm())
    assert state.numbers["linear_residual"] == pytest.approx(left, abs=1e-12)


@given(quadratics, st.integers(1, 7), st.integers(0, 7), st.sampled_from(list(STEPS)))
def test_modes_agree(problem, total, cut, steps):
    """Checkpointed equals reverse bit for bit, forward to rounding."""
    x, y = point(problem)
    options = {"inner_steps": total, "truncate": cut, "lower_lr": 0.02, **STEPS[steps]}
    found = {m: estimate(problem, x, y, mode=m, **options) for m in ("reverse", "checkpointed")}
    assert torch.equal(found["reverse"][0], found["checkpointed"][0])
    forward, state = estimate(problem, x, y, mode="forward", **options)
    assert (forward - found["reverse"][0]).norm() <= 1e-12 * (1 + forward.norm())
    ends = [state, *(s for _, s in found.values())]
    assert all(torch.equal(s.variables["y"].value, state.variables["y"].value) for s in ends)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("steps", list(STEPS))
def test_equals_central_differences_of_the_unrolled_value(steps, project):
    """I9 on a curved problem with batches, trees and a box: d/dx of f(x, y_T(x)), T = 5."""
    problem = Curved(project)
    x, y = problem.init(torch.Generator())
    options = {"inner_steps": 5, "lower_lr": 0.1, **STEPS[steps]}
    found = {
        mode: flat(estimate(problem, x, y, mode=mode, **options)[0])
        for mode in ("reverse", "checkpointed", "forward")
    }
    assert torch.equal(found["reverse"], found["checkpointed"])
    assert torch.allclose(found["reverse"], found["forward"], atol=1e-12)

    def value(shift):
        moved, start = {}, 0
        for key, p in x.items():
            moved[key] = p.detach() + shift[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return estimate(problem, moved, y, **options)[1].upper

    e = 1e-5  # the error of the difference is about e^2 and 1e-16 / e
    units = torch.eye(3, dtype=torch.float64)
    true = torch.tensor([(value(e * u) - value(-e * u)) / (2 * e) for u in units]).double()
    assert torch.allclose(found["reverse"], true, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "twin"),
    [
        ({"momentum": 0.9}, lambda y: torch.optim.SGD([y], lr=0.02, momentum=0.9)),
        (
            {"lower_optimizer": "adam", "betas": (0.8, 0.95), "eps": 1e-30},
            lambda y: torch.optim.Adam([y], lr=0.02, betas=(0.8, 0.95), eps=0.0),
        ),
    ],
)
def test_functional_steps_are_those_of_torch(options, twin):
    problem = Quadratic()
    x, y = point(problem)
    _, state = estimate(problem, x, y, inner_steps=6, lower_lr=0.02, **options)
    moved = y.clone().requires_grad_()
    optimizer = twin(moved)
    for _ in range(6):
        optimizer.zero_grad()
        problem.lower(x, moved, None).backward()
        optimizer.step()
    assert torch.allclose(state.variables["y"].value, moved, atol=1e-12)


@pytest.mark.parametrize("mode", ["reverse", "checkpointed", "forward"])
def test_every_inner_step_draws_its_own_batch(mode):
    problem = Curved()
    x, y = problem.init(torch.Generator())
    _, state = estimate(problem, x, y, inner_steps=5, lower_lr=0.1, mode=mode)
    assert state.streams["lower"].at == 5 and state.streams["upper"].at == 1
    for batch in (1.0, 0.5, 0.3, 1.0, 0.5):
        g = torch.autograd.grad(problem.lower(x, y, batch), y)
        y = [(p - 0.1 * d).detach().requires_grad_() for p, d in zip(y, g, strict=True)]
    pairs = zip(state.variables["y"].value, y, strict=True)
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in pairs)


@pytest.mark.parametrize("last", [1, 3, 8])
def test_truncated_from_the_solution_is_the_neumann_series(last):
    """I10, on a problem that is not quadratic."""
    problem = Functions(
        lambda x, y: (y - 1).pow(2).sum() + (x * y).sum(),
        lambda x, y: torch.cosh(y - x).sum() + 0.3 * (y[0] * y[1]) * x[0] + 0.5 * y.square().sum(),
        torch.tensor([0.4, -0.3], dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    x, y = problem.init(torch.Generator())
    _, state = estimate(problem, x, y, inner_steps=300, lower_lr=0.2)
    star = state.variables["y"].value
    oracle = Oracle(problem, {})
    bend, upper = oracle.curvature(x, star, None), oracle.upper(x, star, None)
    v = Neumann(steps=last, lr=0.2).solve(bend.hvp, upper.y).solution
    got, _ = estimate(problem, x, star, inner_steps=10, truncate=last, lower_lr=0.2)
    assert torch.allclose(got, upper.x[0] - bend.cross(v)[0], atol=1e-12)


class Attention(Problem):
    """A module with fused attention as y, its input scaled by x, and two micro-batches."""

    def init(self, generator):
        torch.manual_seed(0)
        y = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        return torch.ones(2, dtype=torch.float64, requires_grad=True), y

    def lower(self, x, y, batch):
        data = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4) * batch
        out = y(data * x[0], data, data, need_weights=False)[0]
        return out.square().mean() * x[1].exp() + 0.1 * sum(
            p.square().sum() for p in y.parameters()
        )

    def upper(self, x, y, batch):
        return self.lower(torch.ones_like(x), y, batch) + x.sum() * 0.1

    def batches(self, generator):
        return Cycle([(0.5, 1.0)]), Cycle([(1.0, 2.0), (3.0,)])

    def split(self, batch):
        return batch if isinstance(batch, tuple) else (batch,)


def test_modules_with_attention_are_unrolled():
    problem = Attention()
    x, y = problem.init(torch.Generator())
    options = {"inner_steps": 4, "lower_lr": 0.3}
    found = {m: estimate(problem, x, y, mode=m, **options)[0] for m in ("reverse", "checkpointed")}
    assert torch.equal(found["reverse"], found["checkpointed"])
    forward, _ = estimate(problem, x, y, mode="forward", **options)
    assert torch.allclose(forward, found["reverse"], atol=1e-12)
    e = 1e-5
    for i, unit in enumerate(torch.eye(2, dtype=torch.float64)):
        ends = [estimate(problem, x.detach() + s * e * unit, y, **options)[1] for s in (1, -1)]
        assert float(forward[i]) == pytest.approx(
            (ends[0].upper - ends[1].upper) / (2 * e), abs=1e-8
        )


@given(quadratics)
def test_moments_at_zero_gradient_have_derivatives(problem):
    """At y* Adam's second momentum is 0, where a root without eps has an infinite derivative."""
    x, _ = point(problem)
    options = {"inner_steps": 3, "lower_optimizer": "adam"}
    problem = Functions(
        lambda x, y: (y - 1).square().sum(),
        lambda x, y: 0.5 * (y - x.sum()).square().sum(),
        x.zero_(),
        torch.zeros(2, dtype=torch.float64),
    )
    got, _ = estimate(problem, *problem.init(torch.Generator()), **options)
    assert bool(got.isfinite().all()) and bool(got.any())


@given(quadratics, st.floats(0.2, 5.0))
def test_moves_with_coordinates_scales_and_shifts(problem, c):
    """I15: x = P u gives P'est; I17: f -> c f, g -> c g with steps / c; I18: shifts of g, f."""
    x, y = point(problem)
    generator = torch.Generator().manual_seed(problem.data_seed + 1)
    turn = torch.randn(problem.dim_x, problem.dim_x, generator=generator, dtype=torch.float64)
    turn = turn + 3 * torch.eye(problem.dim_x, dtype=torch.float64)
    own_upper, own_lower = problem.upper, problem.lower

    def found(kind, upper, lower, x, factor=1.0):
        changed = Functions(lambda x, y: upper(x, y, None), lambda x, y: lower(x, y, None), x, y)
        options = {"inner_steps": 4} if kind is ITD else {}
        return estimate(changed, x, y, kind, lower_lr=0.02 / factor, **options)[0]

    for kind, tolerance in ((ITD, 1e-12), (DARTS, 1e-9)):  # rounding of the difference
        base = found(kind, own_upper, own_lower, x)
        near = lambda a, b: (a - b).norm() <= tolerance * 100 * (1 + base.norm())  # noqa: B023, E731
        u = torch.linalg.solve(turn, x)
        turned = [lambda u, y, b, own=own: own(turn @ u, y, b) for own in (own_upper, own_lower)]
        assert near(found(kind, *turned, u), turn.T @ base)
        assert near(found(kind, lambda *a: c * own_upper(*a), own_lower, x), c * base)
        assert near(found(kind, own_upper, lambda *a: c * own_lower(*a), x, c), base)
        shift = lambda x, y, b: own_lower(x, y, b) + x.sin().sum() + 3  # noqa: E731
        assert near(found(kind, own_upper, shift, x), base)
        shift = lambda x, y, b: own_upper(x, y, b) + x.sin().sum() + 3  # noqa: E731
        assert near(found(kind, shift, own_lower, x), base + x.cos())


@given(quadratics, st.floats(0.01, 0.1))
def test_darts_is_one_truncated_step(problem, xi):
    """On a quadratic the difference is exact: the same as truncated differentiation, K = T = 1."""
    x, y = point(problem)
    got, state = estimate(problem, x, y, DARTS, lower_lr=xi, inner_steps=0)
    true, _ = estimate(problem, x, y, inner_steps=1, lower_lr=xi)
    assert (got - true).norm() <= 1e-10 * (1 + true.norm())  # rounding over the spacing, 1e-2
    assert torch.equal(state.variables["y"].value, y)


def test_darts_errs_by_the_square_of_its_spacing():
    problem = Curved()
    problem.batches = lambda generator: (Cycle([1.0]), Cycle([1.0]))
    x, y = problem.init(torch.Generator())
    true = flat(estimate(problem, x, y, inner_steps=1, lower_lr=0.2)[0])
    errors = []
    for spacing in (0.2, 0.1, 0.05):
        options = {"lower_lr": 0.7, "virtual_lr": 0.2, "inner_steps": 0, "spacing": spacing}
        errors.append((flat(estimate(problem, x, y, DARTS, **options)[0]) - true).norm())
    assert 3.9 < errors[0] / errors[1] < 4.1 and 3.9 < errors[1] / errors[2] < 4.1


@pytest.mark.parametrize("options", [{}, {"momentum": 0.3}, {"mode": "checkpointed"}])
def test_reaches_the_optimum_of_the_quadratic(options):
    """30 steps of rate 2/3, or sqrt(0.3) with momentum, leave under 1e-5 of the implicit part."""
    problem = Quadratic(condition=3.0)
    options = {"inner_steps": 30, "upper_lr": 0.3, "lower_lr": 1 / 3, **options}
    result = bilevel.solve(problem, ITD(upper_optimizer="sgd", **options), steps=40)
    assert (result.x - problem.solution().x).norm() <= 1e-5
    assert not result.warnings


def test_reaches_the_optimum_of_the_softmax_mixture():
    """With mu = L = 1 and step 1 one inner step is exact, and so is the hypergradient."""
    problem = SoftmaxMixture()
    x = torch.linspace(-1, 1, problem.sources, dtype=torch.float64)
    start = torch.zeros(problem.dim, dtype=torch.float64)
    true = problem.solution().hypergradient(x)
    for kind in (ITD, DARTS):
        got, _ = estimate(problem, x, start, kind, inner_steps=1, lower_lr=1.0)
        assert torch.allclose(got, true, atol=1e-12)
        assert abs(float(got.sum())) < 1e-12  # I20


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"inner_steps": 6}, (6, 6, 6)),
        ({"inner_steps": 6, "truncate": 2}, (6, 2, 2)),
        ({"inner_steps": 6, "mode": "checkpointed"}, (12, 6, 6)),
        ({"inner_steps": 6, "mode": "checkpointed", "truncate": 4}, (10, 4, 4)),
        ({"inner_steps": 6, "mode": "forward"}, (6, 18, 18)),
        ({"inner_steps": 6, "mode": "forward", "truncate": 9}, (6, 18, 18)),
    ],
)
def test_oracle_counts(options, counts):
    result = bilevel.solve(Quadratic(), ITD(**options), steps=3)
    names = ("lower_grad", "hvp", "cross")
    want = {name: 3 * count for name, count in zip(names, counts, strict=True)}
    assert result.counts == {"upper_grad": 3, **want}


def test_oracle_counts_of_darts():
    counts = bilevel.solve(Quadratic(), DARTS(inner_steps=2), steps=3).counts
    assert counts == {"upper_grad": 3, "lower_grad": 3 * 5, "hvp": 0, "cross": 0}


@pytest.mark.parametrize(
    "solver", [ITD(inner_steps=2), ITD(warm=False, lower_optimizer="adam"), DARTS()]
)
def test_a_saved_run_goes_on_bit_for_bit(solver, tmp_path):
    whole = bilevel.solve(Curved(), solver, steps=7)
    bilevel.solve(Curved(), solver, steps=4, checkpoints=tmp_path)
    rest = bilevel.solve(Curved(), solver, steps=7, checkpoints=tmp_path, resume=True)
    for name in ("x", "y"):
        pairs = zip(leaves(getattr(whole, name)), leaves(getattr(rest, name)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.history == rest.history and whole.counts == rest.counts


def test_cold_starts_begin_where_y_first_was():
    """Without `warm` every upper step unrolls from the problem's own start."""
    problem = Quadratic()
    ends = []
    solver = ITD(warm=False, inner_steps=1, upper_lr=1e-9)
    bilevel.solve(
        problem,
        solver,
        steps=2,
        callbacks=[lambda state, r: ends.append(state.variables["y"].value.detach().clone())],
    )
    assert torch.allclose(*ends, atol=1e-7) and bool(ends[0].any())


@pytest.mark.parametrize("solver", [ITD(lower_lr=1e3, inner_steps=200), DARTS(virtual_lr=1e300)])
def test_a_diverging_lower_level_ends_with_a_status(solver):
    result = bilevel.solve(Quadratic(), solver, steps=5)
    assert result.status is bilevel.Status.NONFINITE
    assert bool(result.x.isfinite().all()) and bool(result.y.isfinite().all())


def test_constraints_of_the_lower_level_are_refused_by_darts():
    problem = Curved(project=True)
    assert "project_lower" in DARTS().check(problem)[0] and not ITD().check(problem)


def test_iterates_of_the_lower_level_stay_in_the_box():
    result = bilevel.solve(Curved(project=True), ITD(), steps=3)
    assert all(bool((p >= -0.2).all() and (p <= 0.3).all()) for p in result.y)


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


def test_leaves_held_by_a_memory_strategy_are_constants_to_darts():
    """As if they were no part of y at all."""
    problem = Curved()
    x, y = problem.init(torch.Generator())
    rest = y[1].detach()
    alone = Functions(
        lambda x, y: problem.upper(x, [y, rest], 0.7),
        lambda x, y: problem.lower(x, [y, rest], 1.0),
        x,
        y[0],
    )
    still = DARTS(inner_steps=0, upper_optimizer="sgd", upper_lr=1.0)
    want = bilevel.solve(alone, still, steps=1)
    got = bilevel.solve(problem, still, steps=1, memory=Held())
    assert all(
        torch.allclose(a, b, atol=1e-12) for a, b in zip(leaves(want.x), leaves(got.x), strict=True)
    )
    moved = bilevel.solve(problem, DARTS(), steps=2, memory=Held()).y
    assert torch.equal(moved[1], rest) and not torch.equal(moved[0], y[0])


def test_wrong_options_are_reported_together():
    with pytest.raises(bilevel.InputError) as error:
        ITD(inner_steps=0, momentum=1.0, eps=0.0)
    assert len(error.value.faults) == 3
    with pytest.raises(bilevel.InputError, match="spacing must be positive"):
        DARTS(spacing=0.0)
    assert math.isfinite(bilevel.solve(Quadratic(), ITD(), steps=1).upper)
