"""Where the vectors of a saved state lie when they are loaded, told on a device without numbers."""

import pytest
import torch

from bilevel.solver import State
from bilevel.tree import dot, norm
from bilevel.variable import Variable, optimizer_by_name

SHAPE = 3
SAVED = {
    "like x": lambda x, y: [torch.zeros(SHAPE, device=x)],
    "like y": lambda x, y: [torch.zeros(SHAPE, device=y)],
    "table of y": lambda x, y: [torch.zeros(7, SHAPE, device=y)],
    "generator": lambda x, y: [torch.Generator().get_state()],
}
"""Vectors that a solver might keep; x and y have one shape, so that a shape does not tell."""


class NoMemory:
    def state_dict(self):
        return {}

    def load_state_dict(self, saved, copies):
        assert saved == {}


def state(x, y, vectors=None):
    """A state with x and y on devices of these names."""
    leaves = {"x": torch.zeros(SHAPE, device=x), "y": torch.zeros(SHAPE, device=y)}
    variables = {
        name: Variable(name, p, optimizer_by_name("sgd", 1.0)) for name, p in leaves.items()
    }
    return State(variables=variables, streams={}, memory=NoMemory(), vectors=vectors or {})


def devices(vectors):
    return {name: vector[0].device.type for name, vector in vectors.items()}


@pytest.mark.parametrize(
    ("x", "y"), [("cpu", "cpu"), ("cpu", "meta"), ("meta", "cpu"), ("meta", "meta")]
)
def test_a_loaded_vector_lies_where_it_lay(x, y):
    vectors = {name: make(x, y) for name, make in SAVED.items()}
    saved = state(x, y, vectors).state_dict()
    for variable in saved["variables"].values():  # as files give them back; meta has no numbers
        variable["value"] = {k: torch.zeros(SHAPE) for k in variable["value"]}
    saved["vectors"] = {
        k: [torch.empty_like(t, device="cpu") for t in v] for k, v in vectors.items()
    }
    fresh = state(x, y)
    fresh.load_state_dict(saved)
    assert devices(fresh.vectors) == devices(vectors)
    assert devices(fresh.vectors)["generator"] == "cpu"


@pytest.mark.parametrize("places", [True, False])
def test_a_vector_of_another_run_lies_where_the_leaf_like_it_does(places):
    saved = state("cpu", "cpu", {"v": [torch.zeros(SHAPE)], "odd": [torch.zeros(2)]}).state_dict()
    if not places:  # written before places were
        del saved["places"]
    fresh = state("cpu", "meta")
    fresh.load_state_dict(saved)
    assert devices(fresh.vectors) == {"v": "meta", "odd": "cpu"}


def test_values_on_several_devices_have_a_norm_and_products():
    value = [torch.ones(2, device="meta"), torch.ones(2)]
    assert dot(value, value).device.type == "meta"
    with pytest.raises(Exception, match="meta"):  # reads the number: the sum was not refused
        norm(value)
