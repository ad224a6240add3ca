"""I14: every installed solver goes to the known solution of Q, R and S, within its own bias."""

from dataclasses import fields, replace

import pytest
import torch

import bilevel
from bilevel import plugins
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.ridge import Ridge
from bilevel.problems.softmax_mixture import SoftmaxMixture

PROBLEMS = {
    "Q": (Quadratic(condition=3.0), {"upper_lr": 0.05, "lower_lr": 0.2}),
    "R": (Ridge(), {"upper_lr": 0.2, "lower_lr": 0.1}),
    "S": (SoftmaxMixture(), {"upper_lr": 1.0, "lower_lr": 0.5}),
}
SLOW = {"upper_lr": 0.02}
"""Everything moves at once: a step of x must be small against that of y."""

BIAS = {
    **dict.fromkeys(("aid", "amigo", "auto", "hoag", "maid", "penalty"), (1e-5, 1e-5)),
    **dict.fromkeys(("saba", "srba", "masoba"), (1e-5, 1e-5)),
    "soba": (0.1, 0.3),  # its steps fall as 1/sqrt(t)
    "f2sa2": (1e-3, 5e-3),  # O(nu^2), nu = 1/100
    **dict.fromkeys(("f2ba", "proximal"), (1e-2, 5e-2)),  # O(nu), nu = 1/100
    "accf2ba": (1e-2, 0.4),  # the same, with restarts that are slow on R
    "f2sa": (1e-3, 1e-3),  # O(nu), and nu falls
    **dict.fromkeys(("recursive_penalty", "scalebio", "scalebio_votes", "vpbgd"), (0.1, 0.3)),
    "itd": (1e-2, 0.3),  # ten warm steps
    "stocbio": (0.1, 0.3),  # ten terms of a Neumann series
    **dict.fromkeys(("t1t2", "sama", "darts", "bome"), (0.9, 0.5)),  # go elsewhere, but downhill
}
"""The part of |dF| that may be left, on Q and on R."""


@pytest.mark.parametrize("name", [n for n in plugins.names("solver") if n != "zo"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_arrives(problem, name):
    """Of |dF| at the start at most the declared part is left; zo, random, has tests of its own."""
    instance, options = PROBLEMS[problem]
    solver = plugins.find("solver", name)()
    together = hasattr(solver, "estimator") or name in ("f2sa", "recursive_penalty")
    wanted = {"upper_optimizer": "sgd", "lower_optimizer": "sgd", **options}
    if together and problem != "S":
        wanted |= SLOW
    own = {f.name for f in fields(solver)}
    solver = replace(solver, **{k: v for k, v in wanted.items() if k in own})
    result = bilevel.solve(instance, solver, steps=1500 if together else 300)
    assert result.success
    known = instance.solution().hypergradient
    start = instance.init(torch.Generator())[0]
    left = float(known(result.x).norm() / known(start).norm())
    assert left <= (0.03 if problem == "S" else BIAS[name][problem == "R"])
