"""Stacked copies against the same problem solved one copy at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bilevel
from bilevel import Batch, Functions, InputError
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.solvers.implicit import AID
from bilevel.solvers.penalty import Penalty


def starts(problem, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, y0 = problem.init(generator)
    draw = lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype)  # noqa: E731
    return [(draw(x0), draw(y0)) for _ in range(count)]


@pytest.mark.parametrize(
    "solver",
    [
        Penalty(settle=0.0),  # the copies share the norms that let the penalty grow
        Penalty(settle=0.0, upper_optimizer="sgd"),
        AID(linear="neumann", linear_steps=5, lower_lr=0.05),
    ],
    ids=["adam", "sgd", "neumann"],
)
@given(st.sampled_from([Quadratic(), SoftmaxMixture()]), st.integers(1, 4), st.integers(0, 999))
def test_equals_the_loop_of_single_solves(solver, problem, count, seed):
    pairs = starts(problem, count, seed)
    together = Batch.unstack(bilevel.solve(Batch(problem, pairs), solver, steps=12))
    for (x0, y0), (x, y) in zip(pairs, together, strict=True):
        alone = Functions(
            lambda a, b: problem.upper(a, b, None), lambda a, b: problem.lower(a, b, None), x0, y0
        )
        single = bilevel.solve(alone, solver, steps=12)
        # the penalty multiplies the rounding of differences by up to 10 * 1.1^12
        assert torch.allclose(x, single.x, atol=1e-9, rtol=1e-9)
        assert torch.allclose(y, single.y, atol=1e-9, rtol=1e-9)


def test_projections_act_on_each_copy():
    problem = Functions(
        lambda x, y: (y - 3).square().sum(),
        lambda x, y: (y - x).square().sum(),
        torch.zeros(2),
        torch.zeros(2),
        project_upper=lambda x: x / x.norm().clamp(min=1.0),
    )
    pairs = [(torch.full((2,), v), torch.zeros(2)) for v in (-0.5, 0.0, 0.5)]
    result = bilevel.solve(Batch(problem, pairs), Penalty(upper_lr=0.1, growth=1.0), steps=200)
    assert torch.allclose(result.x, torch.full((3, 2), 0.5**0.5), atol=1e-3)


def test_seeds_start_where_the_problem_does():
    problem = Quadratic()
    batch = Batch.seeds(problem, [0, 1])
    assert batch.init(torch.Generator())[0].shape == (2, problem.dim_x)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "at least one"),
        ([(torch.zeros(2), nn.Linear(2, 1))], "got a module"),
        ([(torch.zeros(2), torch.zeros(2)), (torch.zeros(3), torch.zeros(2))], "one shape"),
    ],
)
def test_wrong_starts_are_told(pairs, words):
    with pytest.raises(InputError, match=words):
        Batch(Quadratic(), pairs)
