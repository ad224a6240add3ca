"""What solver=auto chooses, why, and that it arrives with nothing else said."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bilevel
from bilevel import Functions
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture
from bilevel.run import main
from bilevel.solvers.auto import Auto

ONE = torch.ones(2, dtype=torch.float64)


def upper(x, y):
    return (y - 1).square().sum()


def lower(x, y):
    return (y - x).square().sum()


class Changing(bilevel.Stream):
    def __next__(self):
        return None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Stochastic(Functions):
    def batches(self, generator):
        return Changing(), Changing()


@pytest.mark.parametrize(
    ("problem", "name", "words"),
    [
        (Functions(upper, lower, ONE, ONE), "aid", "2 lower variables"),
        (
            Functions(upper, lower, ONE, ONE, project_lower=lambda y: y.clamp(0, 1)),
            "penalty",
            "constrained",
        ),
        (Functions(upper, lower, ONE, nn.Linear(2, 1)), "penalty", "module"),
        (Stochastic(upper, lower, ONE, ONE), "penalty", "batch to batch"),
        (
            Functions(upper, lambda x, y: (y[0] - x[0]) ** 2, ONE, ONE),
            "penalty",
            "not strongly convex",
        ),
        (
            Functions(upper, lambda x, y: (x * y).sum() - y.square().sum(), ONE, ONE),
            "penalty",
            "not strongly convex",
        ),
    ],
)
def test_chooses_by_what_the_problem_gives(problem, name, words):
    choice = Auto().choose(problem)
    assert choice.name == name and words in choice.reason


def test_partial_memory_is_for_penalty():
    assert Auto().choose(Functions(upper, lower, ONE, ONE), bilevel.LISA()).name == "penalty"


@given(
    st.builds(
        Quadratic,
        dim_x=st.integers(1, 8),
        dim_y=st.integers(1, 8),
        condition=st.floats(1.0, 30.0),
        data_seed=st.integers(0, 10_000),
    )
)
def test_step_size_and_steps_fit_the_curvature(problem):
    """L to a tenth, from below, so that 1/(2L) is stable."""
    choice = Auto().choose(problem)
    true = float(torch.linalg.eigvalsh(problem.data()["A"])[-1])
    assert choice.name == "aid"
    assert 0.5 / true * (1 - 1e-9) <= choice.options["lower_lr"] <= 0.5 / true / 0.8
    assert 10 <= choice.options["inner_steps"] <= 100


@pytest.mark.parametrize(
    "problem", [Quadratic(condition=30.0), Quadratic(data_seed=3), Quadratic(dim_x=1, dim_y=1)]
)
def test_arrives_unattended(problem):
    result = bilevel.solve(problem, Auto(upper_lr=0.05), steps=500)
    optimum = problem.solution().x
    assert (result.x - optimum).norm() <= 1e-2 * (1 + optimum.norm())  # Adam's own last wiggle
    assert not result.warnings


def test_lowers_the_upper_loss_of_the_mixture():
    problem = SoftmaxMixture()
    result = bilevel.solve(problem, "auto", steps=300)
    before, after = (bilevel.resolve(problem, x).upper for x in (torch.zeros(4).double(), result.x))
    assert after < 0.5 * before


def test_the_command_line_says_what_and_why(capsys, tmp_path):
    assert main(["problem=quadratic", "solver=auto", "steps=2", f"out={tmp_path / 'a'}"]) == 0
    assert "solver=auto chooses aid: 5 lower variables" in capsys.readouterr().out
