"""Every fault of losses, starts and projections is a sentence, and all come together."""

import pytest
import torch
from torch import nn

import bilevel
from bilevel import Functions, check
from bilevel.problems.quadratic import Quadratic
from bilevel.solvers.implicit import AID

ONE = torch.ones(2, dtype=torch.float64)
noise = torch.Generator().manual_seed(0)


def upper(x, y):
    return ((y - 1) ** 2).sum()


def lower(x, y):
    return ((y - x) ** 2).sum()


def impure(x, y):
    return lower(x, y) + torch.rand((), generator=noise, dtype=torch.float64)


def meddling(x, y):
    with torch.no_grad():
        y += 1
    return lower(x, y)


def breaking(x, y):
    raise KeyError("weights")


def fixed(depth):
    """A stack of linear layers of which the first does not require gradients."""
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth))).double()
    module[0].requires_grad_(False)
    return module


class Once(torch.autograd.Function):
    """y^2 with a gradient that has no derivative."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Functions(lambda x, y: y * x, lower, ONE, ONE), "upper must return a scalar tensor, got"),
        (Functions(upper, lambda x, y: 1.0, ONE, ONE), "lower must return a scalar tensor, got fl"),
        (Functions(upper, lambda x, y: (y / 0).sum(), ONE, ONE), "lower is inf at the start"),
        (Functions(upper, lambda x, y: x.sum(), ONE, ONE), "lower does not depend on y"),
        (Functions(upper, lambda x, y: y.square().sum(), ONE, ONE), "neither loss depends on x"),
        (Functions(lambda x, y: ONE.sum(), lower, ONE, ONE), "upper depends on neither"),
        (Functions(upper, impure, ONE, ONE), "lower is not pure"),
        (Functions(upper, meddling, ONE, ONE), "lower changes its arguments in place"),
        (Functions(upper, breaking, ONE, ONE), "lower raised KeyError at the start: 'weights'"),
        (Functions(upper, lower, 0.5, ONE), "x0 must be a tensor, got float 0.5"),
        (Functions(upper, lower, ONE, {"w": ONE.long()}), "y0['w'] must be floating point"),
        (Functions(upper, lower, ONE, [ONE, ONE.float()]), "y0 must have one dtype"),
        (Functions(upper, lower, ONE, []), "y0 holds no tensor"),
        (Functions(upper, lower, ONE / 0, ONE), "x0 is not finite"),
        (Functions(upper, lower, ONE, ONE * 1j), "got torch.complex128; use torch.view_as_real."),
        (Functions(upper, lower, ONE, fixed(2)), "y0.0.weight, y0.0.bias must require gradients"),
        (Functions(upper, lower, ONE, nn.LazyLinear(2)), "y0.weight has no shape yet"),
        (Functions(upper, lower, ONE, nn.Linear(2, 1, bias=False, device="meta")), "meta device"),
        (Functions(upper, lower, {"a": ONE, "b": ONE[:0]}, ONE), "x0['b'] has no entries"),
        (
            Functions(upper, lower, ONE, ONE, project_upper=lambda x: x / 0),
            "project_upper is not finite",
        ),
        (
            Functions(upper, lambda x, y: (y - x).abs().sqrt().sum(), ONE, ONE),
            "gradient of lower is not finite",
        ),
        (
            Functions(upper, lower, ONE, ONE, project_lower=lambda y: y / 2),
            "project_lower is not idempotent",
        ),
        (
            Functions(upper, lower, ONE, ONE, project_upper=lambda x: x[:1]),
            "project_upper must keep structure, shape",
        ),
    ],
)
def test_a_fault_of_the_problem_is_told(problem, words):
    with_words = [fault for fault in check(problem) if words in fault]
    assert len(with_words) == 1


def test_several_faults_come_together():
    faults = check(Functions(lambda x, y: y, impure, ONE, ONE, project_lower=lambda y: y / 2))
    assert len(faults) == 3


@pytest.mark.parametrize("solver", ["aid", "penalty"])
def test_second_derivatives_are_asked_of_solvers_that_take_them(solver):
    problem = Functions(upper, lambda x, y: (x * Once.apply(y)).sum(), ONE, ONE)
    found = check(problem, solver)
    assert (
        found == []
        if solver == "penalty"
        else "second derivatives of the lower loss are wrong" in found[0]
    )


def test_memory_that_trains_parts_is_refused_by_second_order_solvers():
    assert "memory=full" in check(Quadratic(), "aid", memory=bilevel.LISA())[0]


def test_minimize_tells_them():
    with pytest.raises(bilevel.InputError, match="not pure"):
        bilevel.minimize(upper, impure, ONE, ONE)


def test_a_module_and_its_start_stay_as_they_are():
    module = nn.Linear(2, 1).double()
    before = [p.detach().clone() for p in module.parameters()]
    problem = Functions(
        lambda x, y: y(x).square().sum(), lambda x, y: (y(x) - 1).square().sum(), ONE, module
    )
    assert check(problem, "aid") == []
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("solver", ["penalty", "f2ba", "aid", "itd", "scalebio"])
def test_an_upper_loss_of_x_alone_is_minimized(solver):
    result = bilevel.minimize(
        lambda x, y: (x - 1).square().sum(), lower, ONE * 0, ONE, solver=solver, steps=40
    )
    assert result.success and 0 < float(result.x[0]) <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bilevel.solve(Quadratic(), None), "solver must be a name"),
        (lambda: bilevel.solve(Quadratic(), bilevel.Solver), "got Solver"),
        (lambda: bilevel.solve("quadratic"), "problem must be a bilevel.Problem, got str"),
        (lambda: bilevel.solve(Quadratic(), steps=1.5), "whole number of at least 1"),
        (lambda: bilevel.solve(Quadratic(), memory="lisa"), "memory must be a bilevel.Memory"),
        (lambda: bilevel.solve(Quadratic(), seed="3"), "seed must be a whole number, got str"),
        (lambda: bilevel.compare(Quadratic(), "aidd"), "did you mean 'aid'"),
        (lambda: bilevel.compare(Quadratic(), steps=0), "at least 1"),
    ],
)
def test_wrong_arguments_are_told(call, words):
    with pytest.raises(bilevel.InputError, match=words):
        call()


def test_a_checkpoint_of_another_solver_or_shape_is_refused(tmp_path):
    problem = Functions(upper, lower, ONE, ONE)
    bilevel.solve(problem, "aid", steps=2, checkpoints=tmp_path)
    for other, solver, words in (
        (problem, "penalty", "solver"),
        (problem, AID(upper_lr=0.5), "solver.upper_lr"),
        (Functions(upper, lower, ONE.float(), ONE.float()), "aid", "torch.float32"),
    ):
        with pytest.raises(bilevel.InputError, match=words):
            bilevel.solve(other, solver, steps=4, checkpoints=tmp_path, resume=True)
    assert bilevel.solve(problem, "aid", steps=4, checkpoints=tmp_path, resume=True).nit == 4


def test_no_move_within_the_warm_up_is_said():
    result = bilevel.minimize(upper, lower, ONE * 0, ONE, steps=5)
    assert any("warm-up" in words for words in result.warnings)


class Backbone(bilevel.Problem):
    """A class, whose start is first seen when it is solved."""

    def init(self, generator):
        return ONE.clone(), fixed(2)

    def upper(self, x, y, batch):
        return y(x).square().sum()

    def lower(self, x, y, batch):
        return (y(x) - x).square().sum()


@pytest.mark.parametrize("solver", ["penalty", "aid", "itd", "soba", "maid", "zo"])
def test_a_class_whose_start_has_fixed_parameters_is_refused(solver):
    with pytest.raises(bilevel.InputError, match=r"y0\.0\.weight, y0\.0\.bias must require"):
        bilevel.solve(Backbone(), solver, steps=1)
