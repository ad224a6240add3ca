"""The table of problems times solvers, which every plugin joins by itself; and that it can fail."""

import dataclasses

import pytest
import torch

import bilevel
from bilevel import Functions, Stream, options, plugins
from bilevel.problems.quadratic import Quadratic
from bilevel.solvers.implicit import AID
from bilevel.testing import check_problem, check_solver

PROBLEMS = [name for name in plugins.names("problem") if name != "llm_reweight"]  # has its own
SOLVERS = plugins.names("solver")
SMALL: dict[str, dict] = {
    "pruning": {"train": 60, "validation": 60, "hidden": 4},
    "augmentation": {"train": 20, "validation": 60, "copies": 2, "trials": 1},
    "hypercleaning": {"train": 60, "validation": 60},
    "logistic": {"train": 60, "validation": 60},
    "denoising": {"size": 8},
    "few_shot": {"tasks": 3, "test_tasks": 3, "hidden": 4, "queries": 3},
}
"""Options that keep a problem quick here."""


LATER = {("augmentation", "maid"): "2.13"}
"""Pairs that need a newer torch, one where grid_sample can be differentiated twice."""


def make(name):
    return plugins.find("problem", name)(**SMALL.get(name, {}))


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem(name):
    check_problem(make(name))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_solver_on_problem(problem, solver):
    if torch.__version__ < (needed := LATER.get((problem, solver), "0")):
        pytest.skip(f"needs torch {needed}")
    problem, solver = make(problem), plugins.find("solver", solver)()
    if reasons := bilevel.check(problem, solver):
        assert all(len(words) > 20 for words in reasons)  # it says why, and is not run
        with pytest.raises(bilevel.InputError):
            bilevel.solve(problem, solver, steps=1)
    else:
        check_solver(solver, problem, steps=2)


@pytest.mark.parametrize("kind", ["problem", "solver"])
def test_every_field_is_an_option_with_a_meaning(kind):
    for name in plugins.names(kind):
        text = options.help_text(["problem=quadratic"] * (kind == "solver") + [f"{kind}={name}"])
        for field in dataclasses.fields(plugins.find(kind, name)()):
            assert f"{kind}.{field.name}" in text


ONE = torch.ones(2, dtype=torch.float64)


class Shared(Functions):
    def init(self, generator):
        return self._start


class Stuck(Stream):
    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return self.at

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Forgetful(Functions):
    def batches(self, generator):
        return Stuck(), Stuck()


class Doubling(Functions):
    def split(self, batch):
        return batch, batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrong(bilevel.Problem):
    """Quadratic with an answer that is not its own."""

    sign: float = 1.0
    shift: float = 0.0

    def init(self, generator):
        return ONE.clone(), ONE.clone()

    def upper(self, x, y, batch):
        return (y - 2).square().sum()

    def lower(self, x, y, batch):
        return (y - x).square().sum()

    def solution(self):
        return bilevel.Solution(
            lower=lambda x: x + self.shift, hypergradient=lambda x: 2 * self.sign * (x - 2)
        )


def upper(x, y):
    return (y - 2).square().sum()


def lower(x, y):
    return (y - x).square().sum()


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Shared(upper, lower, ONE.clone(), ONE.clone()), "same x0 twice"),
        (Forgetful(upper, lower, ONE, ONE), "saved position"),
        (Doubling(upper, lower, ONE, ONE), "add up"),
        (Wrong(shift=0.1), "is possible"),
        (Wrong(sign=-1.0), "off the slope"),
    ],
)
def test_a_broken_problem_is_caught(problem, words):
    with pytest.raises(AssertionError, match=words):
        check_problem(problem)


def test_a_right_one_is_not():
    check_problem(Wrong())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Careless(bilevel.Solver):
    """Moves x down f at y = x by hand; `fault` says what it does wrong."""

    fault: str = ""

    def init(self, problem, memory, launcher, generator):
        inner = AID(upper_optimizer="sgd", upper_lr=0.1)
        state = inner.init(problem, memory, launcher, generator)
        self.__dict__["generator"] = generator
        self.__dict__["moment"] = 0.0
        return state

    def step(self, problem, launcher, state):
        x = state.variables["x"]
        move = 0.1 * torch.ones_like(x.value)
        if self.fault == "noise":
            move = move * torch.rand(1).double()
        if self.fault == "hidden":
            self.__dict__["moment"] += 0.1
            move = move * self.__dict__["moment"]
        x.assign([x.value - move])
        if self.fault != "uncounted":
            state.counts["upper_grad"] += 1 if self.fault != "falling" else -1
        state.step += 1
        return state


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hidden", "resumed from a checkpoint differs"),
        ("uncounted", "no oracle call"),
        ("falling", "must not fall"),
    ],
)
def test_a_broken_solver_is_caught(fault, words):
    with pytest.raises(AssertionError, match=words):
        check_solver(Careless(fault=fault), Quadratic(dim_x=2))


def test_an_infeasible_iterate_is_caught():
    problem = Functions(upper, lower, ONE, ONE, project_upper=lambda x: x.clamp(0.95, 1.0))
    with pytest.raises(AssertionError, match="feasible set of upper"):
        check_solver(Careless(), problem)
