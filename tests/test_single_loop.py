"""Single-loop methods against dense recursions, enumeration over pieces and closed forms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.single_loop import SingleLoop, masoba, saba, soba, srba

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)
PRESETS = {"soba": soba, "masoba": masoba, "saba": saba, "srba": srba}


class Pick(bilevel.Stream):
    """Numbers below n, drawn with replacement."""

    def __init__(self, n, seed):
        self.n, self.generator = n, torch.Generator().manual_seed(seed)

    def __next__(self):
        return int(torch.randint(self.n, (), generator=self.generator))

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


class Fixed(bilevel.Always):
    """Always one numbered piece, of several."""

    def __init__(self, index, pieces):
        super().__init__((index, pieces[index]))
        self.pieces = pieces


class FiniteSum(bilevel.Problem):
    """A quadratic problem as the mean of 4 pieces of g and 3 of f that differ in every matrix."""

    def __init__(self):
        self.whole_problem = Quadratic(condition=3.0)
        data, generator = self.whole_problem.data(), torch.Generator().manual_seed(0)

        def noise(count, like):
            """`count` random tensors of mean zero."""
            draw = 0.3 * torch.randn(count, *like.shape, generator=generator).double()
            return draw - draw.mean(0)

        self.A, self.B, self.b = (noise(4, data[name]) for name in "ABb")
        self.A = (self.A + self.A.mT) / 2
        self.D, self.q = noise(3, data["D"]), noise(3, data["c"])

    def init(self, generator):
        return self.whole_problem.init(generator)

    def lower(self, x, y, batch):
        value = self.whole_problem.lower(x, y, None)
        if batch is None:
            return value
        return value + y @ (0.5 * self.A[batch] @ y - self.B[batch] @ x - self.b[batch])

    def upper(self, x, y, batch):
        value = self.whole_problem.upper(x, y, None)
        if batch is None:
            return value
        return value + x @ self.D[batch] @ y + self.q[batch] @ y

    def batches(self, generator):
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        return Pick(3, seeds[0]), Pick(4, seeds[1])

    def whole(self):
        return None, None

    def pieces(self):
        return range(3), range(4)


def begin(problem, solver, x, y, v):
    """A state of a solver at (x, y, v)."""
    generator = torch.Generator().manual_seed(0)
    state = solver.init(problem, bilevel.Full(), bilevel.Single(), generator)
    state.variables["x"].assign([x])
    state.variables["y"].assign([y])
    state.vectors["v"] = [v.clone()]
    return state


def moves(problem, solver, state):
    """Minus the moves (d_y, d_v, d_x) of one step."""
    before = point(state)
    after = point(solver.step(problem, bilevel.Single(), state))
    return tuple(a - b for a, b in zip(before, after, strict=True))


def point(state):
    y, x = (state.variables[name].value.detach().clone() for name in "yx")
    return y, state.vectors["v"][0].clone(), x


def dense(problem, x, y, v):
    """(d_y, d_v, d_x) of the quadratic from its matrices."""
    d = problem.data()
    r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
    along_x = problem.rho * (x - d["s"]) + d["D"] @ y + d["B"].T @ v
    return d["A"] @ y - d["B"] @ x - d["b"], d["A"] @ v - r, along_x


def somewhere(problem, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (problem.dim_x, problem.dim_y, problem.dim_y)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]


def unit(**options):
    """Options under which one step moves everything by its whole direction."""
    return {"upper_lr": 1.0, "lower_lr": 1.0, "decay": 0.0, "momentum": 0.0, **options}


@given(quadratics, st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.9]))
def test_steps_are_the_dense_recursion(problem, decay, momentum):
    """Simultaneous steps from the old point; own step sizes; the running mean starts at d_x."""
    lr = 1 / problem.condition
    options = {"decay": decay, "momentum": momentum}
    solver = SingleLoop(upper_lr=0.01, lower_lr=lr, linear_lr=lr / 2, **options)
    result, states = [], []
    bilevel.solve(problem, solver, steps=5, callbacks=[lambda s, _: states.append(point(s))])
    x, y = (t.detach().clone() for t in problem.init(torch.Generator()))
    v, h = torch.zeros_like(y), None
    for t in range(5):
        along_y, along_v, along_x = dense(problem, x, y, v)
        h = along_x if h is None else momentum * h + (1 - momentum) * along_x
        scale = (t + 1) ** -decay
        x, y, v = x - scale * 0.01 * h, y - scale * lr * along_y, v - scale * lr / 2 * along_v
        result.append((y, v, x))
    for got, expected in zip(states, result, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["saga", "sarah"])
@pytest.mark.parametrize("period", [0, 4])
@pytest.mark.parametrize("problem", [Quadratic(), SoftmaxMixture()])
def test_one_piece_is_the_full_batch_method(problem, estimator, period):
    """I22, bitwise."""
    options = {"upper_lr": 0.05, "lower_lr": 0.1}
    plain = bilevel.solve(problem, SingleLoop(**options), steps=20)
    solver = SingleLoop(estimator=estimator, period=period, **options)
    other = bilevel.solve(problem, solver, steps=20)
    assert torch.equal(plain.x, other.x) and torch.equal(plain.y, other.y)
    assert plain.evidence == other.evidence


def test_the_mean_direction_of_soba_is_the_full_one():
    """I23: over all pairs of pieces, at any (x, y, v)."""
    problem, solver = FiniteSum(), soba(**unit())
    x, y, v = somewhere(problem.whole_problem)
    found = []
    for i in range(4):
        for j in range(3):
            state = begin(problem, solver, x, y, v)
            state.streams = {"lower": bilevel.Always(i), "upper": bilevel.Always(j)}
            found.append(moves(problem, solver, state))
    spread = torch.stack([d[2] for d in found]).std(0)
    assert spread.min() > 0.01  # the pieces do differ
    for mean, full in zip(means(found), dense(problem.whole_problem, x, y, v), strict=True):
        assert torch.allclose(mean, full, atol=1e-12)


def test_the_mean_direction_of_saba_is_the_full_one():
    """Whatever the tables hold; and what was drawn, and only that, is stored."""
    problem, solver = FiniteSum(), saba(**unit())
    x, y, v = somewhere(problem.whole_problem)
    generator = torch.Generator().manual_seed(5)
    rows = {"lower_table": (4, (5, 5, 3)), "upper_table": (3, (5, 3))}
    tables = {
        key: [torch.randn(n, size, generator=generator, dtype=torch.float64) for size in sizes]
        for key, (n, sizes) in rows.items()
    }
    found = []
    for i in range(4):
        for j in range(3):
            state = begin(problem, solver, x, y, v)
            state.vectors |= {key: [t.clone() for t in own] for key, own in tables.items()}
            state.streams = {"lower": Fixed(i, range(4)), "upper": Fixed(j, range(3))}
            found.append(moves(problem, solver, state))
            for key, index in (("lower_table", i), ("upper_table", j)):
                for new, old in zip(state.vectors[key], tables[key], strict=True):
                    changed = (new != old).any(1).nonzero().flatten().tolist()
                    assert changed == [index]
    for mean, full in zip(means(found), dense(problem.whole_problem, x, y, v), strict=True):
        assert torch.allclose(mean, full, atol=1e-12)


def test_the_mean_direction_of_srba_is_recursive():
    """last + full(now) - full(then); then the point is back where it was, bit for bit."""
    problem, solver = FiniteSum(), srba(period=10, **unit())
    here, then = somewhere(problem.whole_problem), somewhere(problem.whole_problem, seed=1)
    generator = torch.Generator().manual_seed(5)
    last = {
        key: [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
        for key, sizes in {"lower_last": (5, 5, 3), "upper_last": (5, 3)}.items()
    }
    lower, upper = last["lower_last"], last["upper_last"]
    past = (lower[0], lower[1] - upper[0], upper[1] - lower[2])
    found = []
    for i in range(4):
        for j in range(3):
            state = begin(problem, solver, *here)
            state.step = 1
            state.vectors |= {key: [t.clone() for t in own] for key, own in last.items()}
            state.vectors["last_point"] = [t.clone() for t in then]
            state.streams = {"lower": Fixed(i, range(4)), "upper": Fixed(j, range(3))}
            found.append(moves(problem, solver, state))
            for kept, real in zip(state.vectors["last_point"], here, strict=True):
                assert torch.equal(kept, real)
    now, before = (dense(problem.whole_problem, *at) for at in (here, then))
    for mean, p, a, b in zip(means(found), past, now, before, strict=True):
        assert torch.allclose(mean, p + a - b, atol=1e-12)


def means(found):
    return [torch.stack(column).mean(0) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("make", [saba, srba])
def test_variance_reduction_reaches_the_optimum_of_a_finite_sum(make):
    problem = FiniteSum()
    solver = make(upper_lr=0.05, lower_lr=0.2)
    result = bilevel.solve(problem, solver, steps=600)
    optimum = problem.whole_problem.solution().x
    assert (result.x - optimum).norm() <= 1e-6
    noisy = bilevel.solve(problem, SingleLoop(upper_lr=0.05, lower_lr=0.2), steps=600)
    assert (noisy.x - optimum).norm() > 1e-3  # what constant steps without memory leave


def test_batches_grow_as_the_norm_test_asks():
    """Constant steps arrive once all pieces are in; before, only as many as the noise needs."""
    problem, sizes = FiniteSum(), []

    def watch(state, record):
        sizes.append(record["batch"])

    solver = SingleLoop(estimator="growing", upper_lr=0.05, lower_lr=0.2)
    result = bilevel.solve(problem, solver, steps=600, callbacks=[watch])
    assert (result.x - problem.whole_problem.solution().x).norm() <= 1e-6
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == 4  # of 4 and 3 pieces
    loose = bilevel.solve(problem, replace(solver, theta=1e3), steps=5)
    assert loose.evidence["batch"] == 2 and loose.counts["lower_grad"] == 10


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_reaches_the_optimum_of_the_quadratic(make):
    problem = Quadratic(condition=3.0)
    result = bilevel.solve(problem, make(upper_lr=0.02, lower_lr=0.3, decay=0.0), steps=800)
    assert (result.x - problem.solution().x).norm() <= 1e-6
    assert not result.warnings


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_reaches_a_stationary_point_of_the_mixture(make):
    problem = SoftmaxMixture(sources=3, dim=3)
    solver = make(upper_lr=1.0, lower_lr=0.5, decay=0.0)
    result = bilevel.solve(problem, solver, steps=600)
    start = problem.solution().hypergradient(torch.zeros(3).double()).norm()
    assert problem.solution().hypergradient(result.x).norm() <= 1e-2 * start
    assert (result.y - problem.solution().lower(result.x)).norm() <= 1e-3


def test_steps_of_soba_fall():
    """With decay 1/2 the noise floor falls too, where constant steps stay on it."""
    problem, steps = FiniteSum(), 600
    optimum = problem.whole_problem.solution().x
    options = {"upper_lr": 0.1, "lower_lr": 0.3}
    errors = [
        (bilevel.solve(problem, soba(decay=decay, **options), steps=steps).x - optimum).norm()
        for decay in (0.5, 0.0)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_oracle_counts():
    """Section 3 of the methods: a step of SOBA is one call of each oracle."""
    steps = 7
    each = dict.fromkeys(("upper_grad", "lower_grad", "hvp", "cross"), steps)
    for make in (soba, masoba):
        assert bilevel.solve(FiniteSum(), make(lower_lr=0.01), steps=steps).counts == each
    counts = bilevel.solve(FiniteSum(), saba(lower_lr=0.01), steps=steps).counts
    tables = {"upper_grad": 3, "lower_grad": 4, "hvp": 4, "cross": 4}
    assert counts == {k: n + tables[k] for k, n in each.items()}
    counts = bilevel.solve(FiniteSum(), srba(lower_lr=0.01, period=3), steps=steps).counts
    assert counts == {k: 3 * n + 2 * 4 for k, n in tables.items()}  # restarts at 0, 3 and 6
    counts = bilevel.solve(FiniteSum(), srba(lower_lr=0.01), steps=steps).counts
    assert counts == {k: 2 * n + 2 * 5 for k, n in tables.items()}  # period 4
    counts = bilevel.solve(Quadratic(), soba(products="finite"), steps=steps).counts
    assert counts == {**dict.fromkeys(each, 0), "upper_grad": steps, "lower_grad": 3 * steps}


@given(quadratics)
def test_finite_products_agree_with_the_graph(problem):
    at = somewhere(problem)
    found = []
    for products in ("graph", "finite"):
        solver = soba(products=products, **unit())
        found.append(moves(problem, solver, begin(problem, solver, *at)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-6)  # rounding of a difference of gradients


@given(quadratics, st.floats(0.5, 4.0))
def test_invariance_of_the_direction_of_x(problem, c):
    """I15, I16, I17: x = Pu, y = Qw, f -> cf with v -> cv, g -> cg with v -> v / c."""
    x, y, v = somewhere(problem)
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(problem.dim_x, problem.dim_x, generator=generator).double()
    p = p + 5 * torch.eye(problem.dim_x)
    q = torch.linalg.qr(torch.randn(problem.dim_y, problem.dim_y, generator=generator).double()).Q
    solver = soba(**unit())

    def along_x(f, g, *at):
        turned = bilevel.Functions(f, g, at[0], at[1])
        return moves(turned, solver, begin(turned, solver, *at))[2]

    f, g = (lambda x, y: problem.upper(x, y, None)), (lambda x, y: problem.lower(x, y, None))
    expected = dense(problem, x, y, v)[2]
    close = {"atol": 1e-10, "rtol": 1e-10}
    got = along_x(
        lambda u, y: f(p @ u, y), lambda u, y: g(p @ u, y), torch.linalg.solve(p, x), y, v
    )
    assert torch.allclose(got, p.T @ expected, **close)
    got = along_x(lambda x, w: f(x, q @ w), lambda x, w: g(x, q @ w), x, q.T @ y, q.T @ v)
    assert torch.allclose(got, expected, **close)
    assert torch.allclose(along_x(lambda x, y: c * f(x, y), g, x, y, c * v), c * expected, **close)
    assert torch.allclose(along_x(f, lambda x, y: c * g(x, y), x, y, v / c), expected, **close)


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_a_resumed_run_is_the_uninterrupted_one(make, tmp_path):
    """I31, bitwise: tables, draws, running means and last points are all saved."""
    solver = make(upper_lr=0.02, lower_lr=0.1, momentum=0.5)
    whole = bilevel.solve(FiniteSum(), solver, steps=11)
    bilevel.solve(FiniteSum(), solver, steps=6, checkpoints=tmp_path)
    again = bilevel.solve(FiniteSum(), solver, steps=11, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, again.x) and torch.equal(whole.y, again.y)
    assert whole.history == again.history and whole.counts == again.counts


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_leaves_do_not_matter(make):
    """y as a tree of two leaves moves as y in one piece."""
    whole = Quadratic()
    x, y = (t.detach() for t in whole.init(torch.Generator()))
    parted = bilevel.Functions(
        lambda x, y: whole.upper(x["a"], torch.cat(y), None),
        lambda x, y: whole.lower(x["a"], torch.cat(y), None),
        {"a": x},
        [y[:2], y[2:]],
    )
    solver = make(upper_lr=0.02, lower_lr=0.05, period=3)
    one, two = (bilevel.solve(problem, solver, steps=8) for problem in (whole, parted))
    assert torch.allclose(one.x, two.x["a"], atol=1e-12)
    assert torch.allclose(one.y, torch.cat(two.y), atol=1e-12)


def test_what_cannot_work_is_refused():
    class Endless(FiniteSum):
        pieces = bilevel.Problem.pieces

    with pytest.raises(bilevel.InputError, match="pieces"):
        bilevel.solve(Endless(), saba())
    assert bilevel.solve(Endless(), soba(), steps=1).nit == 1
    zero = torch.zeros(())
    bounded = bilevel.Functions(
        lambda x, y: y**2, lambda x, y: (y - x) ** 2, zero, zero, project_lower=lambda y: y
    )
    with pytest.raises(bilevel.InputError, match="project_lower"):
        bilevel.solve(bounded, soba())
    with pytest.raises(bilevel.InputError, match="momentum"):
        soba(momentum=1.0)


def test_a_diverging_run_ends_with_the_last_finite_values():
    result = bilevel.solve(Quadratic(condition=30.0), saba(lower_lr=10.0), steps=2000)
    assert result.status is bilevel.Status.DIVERGED
    assert bool(result.x.isfinite().all()) and bool(result.y.isfinite().all())
