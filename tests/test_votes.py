"""Pairwise votes: still on noise, decisive on signal, indifferent to scale and order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel import PairwiseVotes
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.penalty import Penalty


def walk(costs, **options):
    """The weights after gradients p_s (c_s - sum_t p_t c_t) for every row c of `costs`."""
    x = torch.zeros(costs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = PairwiseVotes([x], **options)
    for c in costs:
        p = x.detach().softmax(0)
        x.grad = p * (c - p @ c)
        optimizer.step()
    return x.detach().softmax(0)


def noise(seed, steps, n):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_leaves_the_weights_even(seed):
    p = walk(noise(seed, 300, 6))
    assert p.max() - p.min() < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_twins_stay_even_while_the_rest_is_decided(seed):
    """Signal of two standard deviations a step for the first two of six."""
    good = torch.tensor([-2.0, -2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    p = walk(good + noise(seed, 300, 6))
    assert p[:2].sum() > 0.95
    assert 1 / 1.2 < p[0] / p[1] < 1.2


def test_a_small_but_lasting_difference_is_found():
    """Half a standard deviation: five standard errors of a paired mean over 100 steps."""
    good = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    assert walk(good + noise(0, 400, 2))[0] > 0.9


@given(st.integers(0, 1000), st.floats(1e-6, 1e6), st.permutations(range(4)))
def test_neither_scale_nor_order_matters(seed, scale, order):
    costs = noise(seed, 40, 4) + torch.arange(4.0, dtype=torch.float64)
    base = walk(costs)
    assert torch.allclose(walk(scale * costs), base, rtol=0, atol=1e-9)
    assert torch.allclose(walk(costs[:, order]), base[list(order)], rtol=0, atol=1e-9)


@given(st.integers(0, 1000), st.integers(2, 8))
def test_equally_noisy_votes_descend(seed, n):
    """<G, step> >= 0 for exact, noiseless gradients at any weights."""
    start = noise(seed, 1, n)[0]
    costs = noise(seed + 1, 1, n)[0]
    x = start.clone().requires_grad_()
    optimizer = PairwiseVotes([x], lr=1e-3, hold=2)
    p = start.softmax(0)
    gradient = p * (costs - p @ costs)
    for _ in range(2):
        x.grad = gradient.clone()
        optimizer.step()
    assert gradient @ (start - x.detach()) >= 0
    assert not torch.equal(x.detach(), start)


def test_zero_gradients_move_nothing():
    costs = torch.zeros(30, 3, dtype=torch.float64)
    assert torch.equal(walk(costs), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_state_survives_saving():
    def steps(x, optimizer, rows):
        for row in rows:
            x.grad = row.clone()
            optimizer.step()

    rows = noise(0, 40, 3) + torch.arange(3.0)
    whole, first, second = (torch.zeros(3, dtype=torch.float64) for _ in range(3))
    optimizers = [PairwiseVotes([v]) for v in (whole, first, second)]
    steps(whole, optimizers[0], rows)
    steps(first, optimizers[1], rows[:23])
    second.copy_(first)
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    steps(second, optimizers[2], rows[23:])
    assert torch.equal(whole, second)


def test_votes_solve_the_softmax_mixture():
    """Within a ball of the step size of what Adam finds; F = f(y*(x)) is known."""
    problem = SoftmaxMixture()

    def value(optimizer, lr):
        solver = Penalty(upper_optimizer=optimizer, upper_lr=lr, penalty=1e3, growth=1.0)
        x = bilevel.solve(problem, solver, steps=400).x
        return float(problem.upper(x, problem.solution().lower(x), None))

    start = torch.zeros(4, dtype=torch.float64)
    first = float(problem.upper(start, problem.solution().lower(start), None))
    best = value("adam", 0.05)
    assert value("votes", 0.05) - best < 0.05 * (first - best)


def test_options_are_checked_together():
    with pytest.raises(bilevel.InputError) as error:
        PairwiseVotes([torch.zeros(3)], lr=-1.0, hold=1)
    assert len(error.value.faults) == 2
    with pytest.raises(bilevel.InputError, match="use adam"):
        PairwiseVotes([torch.zeros(5000)])
