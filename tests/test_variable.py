"""Variables and the optimizers that move them."""

import sys
import types

import pytest
import torch

from bilevel import InputError, Single, Variable, optimizer_by_name


@pytest.mark.parametrize(
    ("name", "lr", "words"),
    [
        ("admaw", 0.1, "did you mean 'adamw'"),
        ("lbfgs", 0.1, "evaluates the loss by itself"),
        ("SparseAdam", 0.1, "sparse gradients"),
        ("sgd", float("inf"), "positive and finite"),
        ("sgd", 0.0, "positive and finite"),
        ("zzzz", 0.1, "choose from adadelta"),
    ],
)
def test_wrong_optimizers_are_told(name, lr, words):
    with pytest.raises(InputError, match=words):
        optimizer_by_name(name, lr)


def test_every_other_optimizer_of_torch_moves_a_variable():
    for name in vars(torch.optim):
        kind = getattr(torch.optim, name)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            continue
        if name in ("Optimizer", "LBFGS", "SparseAdam"):
            continue
        value = torch.ones(2, 2)
        variable = Variable("x", value, optimizer_by_name(name, 0.1))
        variable.gather([torch.ones(2, 2)])
        variable.step()
        assert not torch.equal(value.detach(), torch.ones(2, 2)), name


def test_optimizers_of_pytorch_optimizer_are_found(monkeypatch):
    class Adan(torch.optim.SGD):
        pass

    module = types.ModuleType("pytorch_optimizer")
    module.get_supported_optimizers = lambda: ["adan"]  # as of version 4.1
    module.load_optimizer = {"adan": Adan}.__getitem__
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", module)
    assert isinstance(optimizer_by_name("Adan", 0.1)([torch.ones(1)]), Adan)


def test_gather_adds_and_assign_leaves_the_optimizer():
    variable = Variable("x", torch.zeros(2), optimizer_by_name("sgd", 1.0))
    variable.gather([torch.ones(2)])
    variable.gather([torch.ones(2)])
    assert torch.equal(variable.gradient()[0], torch.full((2,), 2.0))
    variable.assign([torch.full((2,), 5.0)])
    variable.step()
    assert torch.equal(variable.value.detach(), torch.full((2,), 3.0))


def test_negative_threads_are_refused():
    with pytest.raises(InputError, match="threads"):
        Single(threads=-3)


def test_parameters_that_an_optimizer_does_not_take_are_told():
    with pytest.raises(InputError, match=r"muon cannot be used here: .*2D"):
        Variable("y", torch.zeros(3), optimizer_by_name("muon", 0.1))
