"""On a GPU: every solver with y there, and x there or not, against the CPU, and resumed."""

import pytest
import torch
from test_contracts import make
from torch.utils._pytree import tree_map

import bilevel
from bilevel import Problem, plugins
from bilevel.solvers.implicit import AID
from bilevel.solvers.penalty import Penalty
from bilevel.solvers.sama import SAMA
from bilevel.solvers.unrolled import ITD
from bilevel.testing import check_solver
from bilevel.tree import leaves

DEVICE = "cuda"
HOMES = [("cpu", DEVICE), (DEVICE, DEVICE)]
"""Where x and y are; in the first way language models have them."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; torch finds none"),
]


class Away(Problem):
    """Another problem, whose losses are computed on the CPU, with x and y elsewhere."""

    def __init__(self, inner, x_home, y_home):
        self.inner, self.x_home, self.y_home = inner, x_home, y_home
        self.solver_options = inner.solver_options
        kind = type(inner)
        if kind.project_upper is not Problem.project_upper:
            self.project_upper = lambda x: to(inner.project_upper(to(x, "cpu")), x_home)
        if kind.project_lower is not Problem.project_lower:
            self.project_lower = lambda y: to(inner.project_lower(to(y, "cpu")), y_home)

    def init(self, generator):
        x, y = self.inner.init(generator)
        return to(x, self.x_home), to(y, self.y_home)

    def batches(self, generator):
        return self.inner.batches(generator)

    def split(self, batch):
        return self.inner.split(batch)

    def upper(self, x, y, batch):
        return self.inner.upper(to(x, "cpu"), to(y, "cpu"), batch).to(self.x_home)

    def lower(self, x, y, batch):
        return self.inner.lower(to(x, "cpu"), to(y, "cpu"), batch).to(self.x_home)


def to(value, device):
    return tree_map(lambda t: t.to(device), value)


@pytest.mark.parametrize("homes", HOMES, ids="-".join)
@pytest.mark.parametrize("solver", plugins.names("solver"))
@pytest.mark.parametrize("problem", ["quadratic", "simplex", "box"])
def test_a_solver_does_on_a_gpu_what_it_does_on_the_cpu(problem, solver, homes):
    inner, solver = make(problem), plugins.find("solver", solver)()
    away = Away(inner, *homes)
    if bilevel.check(away, solver):
        pytest.skip("cannot solve this problem anywhere")
    check_solver(solver, away, steps=2)
    found, expected = (bilevel.solve(p, solver, steps=2) for p in (away, inner))
    assert [found.x.device.type, leaves(found.y)[0].device.type] == list(homes)
    if type(solver).__name__ != "ZO":  # draws on the device, where a seed has other numbers
        torch.testing.assert_close(found.x.cpu(), expected.x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "solver",
    [
        ITD(mode="forward", inner_steps=3),
        ITD(mode="checkpointed", inner_steps=3, lower_optimizer="adam"),
        *(AID(linear=name) for name in ("nystrom", "fisher", "minres")),
        AID(products="finite"),
        SAMA(lower_optimizer="adam"),
        Penalty(stencil=1, prox=1.0, momentum=0.5, upper_step="normalized", upper_optimizer="sgd"),
        Penalty(stencil=3, clip=1.0),
    ],
)
def test_options_do_on_a_gpu_what_they_do_on_the_cpu(solver):
    inner = make("quadratic")
    found, expected = (bilevel.solve(p, solver, steps=2) for p in (Away(inner, *HOMES[0]), inner))
    torch.testing.assert_close(found.x, expected.x, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        leaves(found.y)[0].cpu(), leaves(expected.y)[0], rtol=1e-7, atol=1e-9
    )
