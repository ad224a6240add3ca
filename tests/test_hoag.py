"""HOAG: its accuracies, its rule for the step and its answers, against closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.hoag import HOAG, SCHEDULES

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)


def trace(problem, solver, steps):
    """Of every step: x before and after, y, v and the record."""
    rows, x = [], problem.init(torch.Generator())[0].detach()

    def note(state, record):
        nonlocal x
        values = [state.variables[name].value.detach().clone() for name in "xy"]
        rows.append((x, *values, state.vectors["v"][0].clone(), record))
        x = values[0]

    result = bilevel.solve(problem, solver, steps=steps, callbacks=[note])
    return rows, result


@settings(max_examples=10)
@given(quadratics, st.sampled_from(sorted(SCHEDULES)))
def test_residuals_and_errors_are_within_the_accuracies(problem, schedule):
    """I26 at every step, by dense algebra; I11: hence |p - dF| <= constants e_k."""
    solver = HOAG(schedule=schedule, lower_lr=1 / problem.condition)
    rows, _ = trace(problem, solver, 15)
    d, norm = problem.data(), torch.linalg.matrix_norm
    constant = norm(d["D"], 2) + norm(d["C"].T @ d["C"], 2) * norm(d["B"], 2) + norm(d["B"], 2)
    for k, (x, after, y, v, record) in enumerate(rows, start=1):
        e = record["goal"]
        assert e <= 0.1 * SCHEDULES[schedule](k)
        r = d["C"].T @ (d["C"] @ y - d["c"]) + d["D"].T @ x
        rounding = 1e-12 * problem.condition * (1 + r.norm())
        assert (d["A"] @ y - d["B"] @ x - d["b"]).norm() <= e + rounding
        assert (d["A"] @ v - r).norm() <= e + rounding
        p = record["smoothness"] * (x - after)
        assert (p - problem.solution().hypergradient(x)).norm() <= constant * e + 1e-9


def test_accuracies_follow_their_schedules():
    """Their sums are finite: 0.1 times 9, pi^2 / 6 and 1.2021, the geometric and zeta series."""
    for schedule, total in (("exponential", 9.0), ("quadratic", 1.644935), ("cubic", 1.202057)):
        assert math.fsum(map(SCHEDULES[schedule], range(1, 3000))) <= total * (1 + 1e-12)
        solver = HOAG(schedule=schedule, smoothness=50.0, lower_lr=1 / 3)
        rows, _ = trace(Quadratic(condition=3.0), solver, 4)
        got = [record["goal"] for *_, record in rows]
        expected = {
            "exponential": [0.09, 0.081, 0.0729, 0.06561],
            "quadratic": [0.1, 0.025, 0.1 / 9, 0.00625],
            "cubic": [0.1, 0.0125, 0.1 / 27, 0.0015625],
        }[schedule]
        assert got == pytest.approx(expected)


@pytest.mark.parametrize("smoothness", [0.0, 0.2, 2.0, 1e3])
def test_the_rule_for_the_step(smoothness):
    """Replayed from what is seen of a run; every branch is met over the starts."""
    problem = Quadratic(condition=3.0, data_seed=1)
    rows, _ = trace(problem, HOAG(smoothness=smoothness, lower_lr=1 / 3), 40)
    x, after, _, _, first = rows[0]
    if smoothness:
        assert first["smoothness"] == smoothness
    else:  # the first step moves entries by one in root mean square
        assert (x - after).square().mean().sqrt() == pytest.approx(1.0)
    size, least, tightening, met = first["smoothness"], 0.0, 1.0, set()
    for (x, after, _, _, old), (_, _, _, v, new) in itertools.pairwise(rows):
        rise = new["upper"] - old["upper"]
        promise = -size * float((after - x).square().sum()) / 2
        slack = float(v.norm()) * (new["goal"] + old["goal"])
        if rise <= promise:
            size, branch = 0.95 * size, "kept"
        elif rise > slack or rise > 0.2 * abs(old["upper"]):
            size, tightening, branch = 2 * size, tightening / 2, "rose"
            least = size
        elif rise > promise + slack:
            size, branch = size / 0.95, "broken"
        else:
            branch = "unclear"
        size = max(size, least)
        met.add(branch)
        assert new["smoothness"] == pytest.approx(size, rel=1e-9)
        assert new["tightening"] == tightening
    assert {0.0: "broken", 0.2: "rose", 2.0: "kept", 1e3: "kept"}[smoothness] in met


def test_halved_accuracies_stay_halved():
    rows, _ = trace(Quadratic(condition=3.0, data_seed=1), HOAG(smoothness=0.2, lower_lr=0.3), 12)
    halved = [record["tightening"] for *_, record in rows]
    assert halved[-1] < 1.0
    for k in range(1, 12):  # a rise seen at step k counts from step k + 1
        assert rows[k][-1]["goal"] == pytest.approx(0.1 * 0.9 ** (k + 1) * halved[k - 1])


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("seed", range(3))
def test_reaches_the_optimum_of_the_quadratic(schedule, seed):
    problem = Quadratic(condition=3.0, data_seed=seed)
    result = bilevel.solve(problem, HOAG(schedule=schedule, lower_lr=1 / 3), steps=150)
    assert (result.x - problem.solution().x).norm() <= 2e-6  # e_150 is 4e-6 for quadratic
    assert not result.warnings


def test_is_stationary_on_the_mixture():
    problem = SoftmaxMixture(sources=3)
    result = bilevel.solve(problem, HOAG(lower_lr=1.0), steps=60)
    start = problem.solution().hypergradient(torch.zeros(3).double()).norm()
    assert problem.solution().hypergradient(result.x).norm() <= 1e-2 * start


def test_oracle_counts():
    """Inner steps as they were needed, the last test, the graph; one of f and of J' a step."""
    rows, result = trace(Quadratic(), HOAG(lower_lr=0.1), 12)
    inner = sum(record["inner_steps"] for *_, record in rows)
    hvp = result.counts["hvp"]
    assert result.counts == {
        "upper_grad": 12,
        "lower_grad": inner + 2 * 12,
        "hvp": hvp,
        "cross": 12,
    }
    assert inner > 12
    # H = I on the mixture: one product for the residual of the warm v, at most one more
    counts = bilevel.solve(SoftmaxMixture(), HOAG(lower_lr=1.0), steps=12).counts
    assert 1 + 11 <= counts["hvp"] <= 1 + 2 * 11
    assert counts["lower_grad"] <= 12 * 3  # one exact inner step at most


def test_x_is_projected():
    """The box cuts the optimum off; the answer is the projected fixed point, always feasible."""
    problem, optimum = Quadratic(condition=3.0), Quadratic(condition=3.0).solution().x
    high = float(optimum.max()) / 2
    boxed = Quadratic(condition=3.0)
    object.__setattr__(boxed, "project_upper", lambda x: x.clamp(-high, high))
    rows, result = trace(boxed, HOAG(lower_lr=1 / 3), 150)
    assert all(float(after.abs().max()) <= high for _, after, *_ in rows)
    gradient = problem.solution().hypergradient(result.x)
    fixed = (result.x - gradient).clamp(-high, high)
    assert (fixed - result.x).norm() <= 1e-6 and float(result.x.max()) == high


@given(quadratics)
@settings(max_examples=6)
def test_rotations_of_y_change_nothing(problem):
    """I16 along a run, to what the accuracies leave open."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(problem.dim_y, problem.dim_y, generator=generator).double()).Q
    x, y = (t.detach() for t in problem.init(generator))
    turned = bilevel.Functions(
        lambda x, w: problem.upper(x, q @ w, None), lambda x, w: problem.lower(x, q @ w, None), x, y
    )
    solver = HOAG(lower_lr=1 / problem.condition, accuracy=1e-7)
    one, two = (bilevel.solve(p, solver, steps=4) for p in (problem, turned))
    assert torch.allclose(one.x, two.x, atol=1e-5, rtol=1e-5)


def test_an_accuracy_out_of_reach_is_told():
    result = bilevel.solve(Quadratic(), HOAG(lower_lr=1e-6, inner_steps=5), steps=3)
    assert result.evidence["inner_steps"] == 5
    assert result.evidence["lower_gradient"] > result.evidence["goal"]
    assert any("lower level is not solved" in words for words in result.warnings)


def test_float32_stays_float32():
    one = torch.ones(())
    result = bilevel.minimize(
        lambda x, y: (y - 1) ** 2, lambda x, y: (y - x) ** 2, 0 * one, one, solver=HOAG(), steps=80
    )
    assert result.x.dtype == torch.float32 and abs(float(result.x) - 1) <= 1e-3
    assert result.evidence["goal"] >= 6e-6  # the floor: eps^(3/4)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """I31, bitwise."""
    problem, solver = Quadratic(data_seed=1), HOAG(smoothness=0.2)
    whole = bilevel.solve(problem, solver, steps=9)
    bilevel.solve(problem, solver, steps=4, checkpoints=tmp_path)
    again = bilevel.solve(problem, solver, steps=9, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, again.x) and torch.equal(whole.y, again.y)
    assert whole.history == again.history and whole.counts == again.counts


def test_what_cannot_work_is_refused():
    class Batches(Quadratic):
        def batches(self, generator):
            return bilevel.Always(1), bilevel.Always(2)

    with pytest.raises(bilevel.InputError, match="whole"):
        bilevel.solve(Batches(), HOAG())
    zero = torch.zeros(())
    bounded = bilevel.Functions(
        lambda x, y: y**2, lambda x, y: (y - x) ** 2, zero, zero, project_lower=lambda y: y
    )
    with pytest.raises(bilevel.InputError, match="project_lower"):
        bilevel.solve(bounded, HOAG())
    with pytest.raises(bilevel.InputError, match="accuracy"):
        HOAG(accuracy=0.0)
