"""Which stencil a penalty method ends with: where copies start, what is doubted, when it falls."""

import pytest
import torch
from penalty_case import SGD, ZERO, distance

import bilevel
from bilevel.problems.many_minimisers import ManyMinimisers
from bilevel.problems.quadratic import Quadratic
from bilevel.solvers.penalty import Penalty
from bilevel.solvers.penalty.stencils import stencil
from bilevel.solvers.penalty.sweeps import Point, Seen, bends_down, draw_in


def test_order_2_falls_back_where_many_minimizers_leave_it_no_minimum():
    problem = ManyMinimisers(dim_x=2)
    solver = Penalty(lower_lr=0.15, max_penalty=100.0, **SGD)
    result = bilevel.solve(problem, solver, steps=800)
    assert result.evidence["stencil"] == 1
    assert distance(result, problem) < 0.001  # measured 0.0005; it waits for w, of curvature nu


@pytest.mark.parametrize(("curvature", "falls_back"), [(0.5, False), (0.9, False), (2.0, True)])
def test_the_stencil_falls_back_where_g_minus_nu_f_bends_down(curvature, falls_back):
    """g - nu f has curvature 1 - nu c, at nu = 1 and before the penalty grows."""
    places = []
    result = bilevel.minimize(
        lambda x, y: 0.5 * curvature * (y - 1) ** 2,
        lambda x, y: 0.5 * (y - x) ** 2,
        ZERO,
        ZERO,
        solver=Penalty(penalty=1.0, upper_optimizer="sgd", upper_lr=0.1),
        steps=200,
        callback=lambda state, record: places.append((record["doubts"], float(record["stencil"]))),
    )
    assert result.evidence["stencil"] == (1 if falls_back else 2)
    assert any(doubt for doubt, _ in places) == falls_back
    assert float(result.x) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_copies_are_drawn_in_where_they_belong(order):
    """On quadratics y_j = y* + j nu d + O(nu^2): the error after is of that order, not nu."""
    problem = Quadratic(condition=5.0)
    x = torch.ones(3, dtype=torch.float64)
    d = problem.data()

    def exact(weight):
        right = d["B"] @ x + d["b"] + weight * (d["C"].T @ d["c"] - d["D"].T @ x)
        return torch.linalg.solve(d["A"] + weight * d["C"].T @ d["C"], right)

    gaps = []
    for nu in (1e-3, 5e-4):
        points = [
            Point(
                copy=bilevel.Variable(str(j), exact(j * nu), torch.optim.SGD),
                weight=j * nu / 1.1,
                share=0.0,
            )
            for j in stencil(order)
        ]
        draw_in(points, 1 / 1.1)
        gaps.append(max(float((p.copy.value.detach() - exact(p.weight)).norm()) for p in points))
    assert 3.6 <= gaps[0] / gaps[1] <= 4.4


@pytest.mark.parametrize(("scaled", "bends"), [(-1.01, True), (-0.99, False), (1.01, False)])
@pytest.mark.parametrize("rho", [0.0, 100.0])
def test_curvature_between_copies_has_the_right_sign(scaled, bends, rho):
    """g + w f has curvature 1 + 2 w on every segment; a prox term adds 1 / rho."""
    y, z, b = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g, f = (lambda v: 0.5 * (v + b).square().sum()), (lambda v: (v - b).square().sum())
    weight = scaled * (1 + (1 / rho if rho else 0)) / 2
    anchor, probe = (
        Point(copy=bilevel.Variable(n, v.clone(), torch.optim.SGD), weight=w, share=0.0)
        for n, v, w in (("y", y, -weight), ("z", z, weight))
    )
    (g(probe.copy.value) + weight * f(probe.copy.value)).backward()
    seen = tuple(Seen(upper=float(f(v)), lower=float(g(v))) for v in (y, z))
    assert bends_down(anchor, probe, seen, rho) == bends


def test_x_is_held_while_the_stencil_is_in_doubt():
    moves, apart = [], []

    def look(state, record):
        moves.append((record.get("doubts"), record["stencil"], float(record.get("change", 0.0))))
        apart.append(float((state.variables["y"].value - state.variables["z"].value).detach()))

    solver = Penalty(penalty=0.5, warmup=0, patience=5, upper_optimizer="sgd", upper_lr=0.1)
    bilevel.minimize(
        lambda x, y: (y - 1) ** 2,
        lambda x, y: 0.5 * (y - x) ** 2,
        ZERO,
        ZERO,
        solver=solver,
        steps=6,
        callback=look,
    )
    assert [m[:2] for m in moves[:4]] == [(1.0, 2), (2.0, 2), (3.0, 2), (4.0, 2)]
    assert not any(m[2] for m in moves[:4]) and moves[4][1] == 1 and moves[5][2] > 0
    assert all(apart[:4]) and apart[4] == 0.0  # z begins again from y


def test_a_probe_that_diverges_alone_is_doubted():
    """-f makes g - nu f four times as steep as g + nu f allows: steps are stable at y only."""
    result = bilevel.minimize(
        lambda x, y: -0.5 * 9 * (y - 1) ** 2,
        lambda x, y: 0.5 * 10 * (y - x) ** 2 + 5 * x**2,
        ZERO,
        ZERO,
        solver=Penalty(penalty=1.0, lower_lr=0.15, growth=1.0, **SGD),
        steps=14,
    )
    assert result.success and result.evidence["stencil"] == 1


def test_a_fallen_stencil_survives_save_and_load(tmp_path):
    problem = ManyMinimisers(dim_x=2)
    solver = Penalty(stencil=4, penalty=1.0, lower_lr=0.1)

    def run(folder, *stops) -> bilevel.Result:
        for steps in stops:
            result = bilevel.solve(
                problem, solver, steps=steps, checkpoints=tmp_path / folder, resume=True
            )
        return result

    whole = run("whole", 13)
    assert whole.evidence["stencil"] == 1
    for cut in (1, 2, 3, 11):
        parts = run(str(cut), cut, 13)
        assert torch.equal(whole.x, parts.x) and whole.history == parts.history
