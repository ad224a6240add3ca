"""Penalty methods that move x, y and z in one step, jointly or by recursive momentum."""

import pytest
import torch
from penalty_case import Noisy, NoisyQuadratic

import bilevel
from bilevel import Single
from bilevel.problems.quadratic import Quadratic
from bilevel.solvers.penalty import VPBGD, RecursivePenalty


@pytest.mark.parametrize("inner", [1, 3])
def test_counts_of_the_joint_step(inner):
    counts = bilevel.solve(Quadratic(), VPBGD(inner_steps=inner), steps=7).counts
    assert counts == {"upper_grad": 7, "lower_grad": 7 * (inner + 1), "sweeps": 7 * (inner + 1)}


@pytest.mark.parametrize(("eta", "times"), [(0.1, 13), (1.0, 7)])
def test_counts_of_the_recursive_loop(eta, times):
    """Two gradients of g and one of f, at this and the last iterate, but for the first step."""
    counts = bilevel.solve(Quadratic(), RecursivePenalty(eta=eta), steps=7).counts
    assert counts == {"upper_grad": times, "lower_grad": 2 * times, "sweeps": 2 * times}


def test_the_joint_penalty_rises_linearly_to_its_cap():
    rows = bilevel.solve(Quadratic(), VPBGD(penalty=8.0, rise=4), steps=6).history
    assert [row["penalty"] for row in rows] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_the_joint_step_is_that_of_its_formula():
    """One step of (x, y) by hand at the penalties 0.5 and 2, on either side of the scale's kink."""
    problem = Quadratic()
    for penalty in (0.5, 2.0):
        solver = VPBGD(penalty=penalty, rise=0, inner_steps=1, upper_lr=0.03, lower_lr=0.02)
        state = solver.init(problem, bilevel.Full(), Single(), torch.Generator())
        point = {n: torch.randn_like(state.variables[n].value).detach() for n in "xyz"}
        for name, value in point.items():
            state.variables[name].assign([value])
        x, y = (point[n].clone().requires_grad_() for n in "xy")
        gap = problem.lower(x, y, None) - problem.lower(x, point["z"], None)
        (problem.upper(x, y, None) + penalty * gap).backward()
        solver.step(problem, Single(), state)
        scale = min(1.0, 1 / penalty)
        expected = {"x": x - 0.03 * scale * x.grad, "y": y - 0.02 * scale * y.grad}
        for name, value in expected.items():
            assert torch.allclose(state.variables[name].value, value, rtol=1e-13, atol=1e-13)


def test_recursive_momentum_reduces_noise():
    """At small steps the momentum averages; without memory x carries the noise of every batch."""
    problem = NoisyQuadratic()
    spread = {}
    for eta in (0.05, 1.0):
        solver = RecursivePenalty(eta=eta, prox=0.0, lower_lr=0.05, upper_lr=0.005)
        rows = bilevel.solve(problem, solver, steps=600).history[300:]
        spread[eta] = sum(row["change"] ** 2 for row in rows)
    assert spread[0.05] < 0.3 * spread[1.0]


def test_recursive_momentum_is_that_of_its_formula():
    """d_k = G_k + (1 - eta)(d_{k-1} - G_{k-1}) with both G on the batch of step k, by autograd."""
    problem, eta, penalty = NoisyQuadratic(), 0.3, 5.0
    solver = RecursivePenalty(
        eta=eta, penalty=penalty, prox=0.0, warmup=0, upper_lr=1e-2, lower_lr=1e-1
    )

    def gradients(values, batch):
        x, y, z = (v.clone().requires_grad_() for v in values)
        own = problem.lower(x, y, batch) + problem.upper(x, y, None) / penalty
        below = problem.lower(x, z, batch)
        (along_y,) = torch.autograd.grad(own, y, retain_graph=True)
        (along_z,) = torch.autograd.grad(below, z, retain_graph=True)
        (along_x,) = torch.autograd.grad(penalty * (own - below), x)
        return [along_x, along_y, along_z]

    places = []
    state = solver.init(problem, bilevel.Full(), Single(), torch.Generator())
    for _ in range(4):
        places.append([state.variables[n].value.detach().clone() for n in "xyz"])
        solver.step(problem, Single(), state)
    noise = Noisy(2)
    batches = [next(noise) for _ in range(4)]
    d = gradients(places[0], batches[0])
    for k in range(1, 4):
        steps = [1e-2, 1e-1, 1e-1]
        for now, before, lr, g in zip(places[k], places[k - 1], steps, d, strict=True):
            assert torch.allclose(now, before - lr * g, rtol=1e-12, atol=1e-13)
        new, old = gradients(places[k], batches[k]), gradients(places[k - 1], batches[k])
        d = [a + (1 - eta) * (b - c) for a, b, c in zip(new, d, old, strict=True)]


def test_recursive_momentum_refuses_drawn_blocks():
    with pytest.raises(bilevel.InputError, match="memory=full"):
        bilevel.solve(Quadratic(), RecursivePenalty(), steps=1, memory=bilevel.LISA())
