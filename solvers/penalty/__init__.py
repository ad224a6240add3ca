"""First-order penalty methods: the hypergradient as a finite difference of lower-level values."""

from bilevel.solvers.penalty.joint import VPBGD
from bilevel.solvers.penalty.presets import (
    accf2ba,
    f2ba,
    f2sa,
    f2sa2,
    proximal,
    scalebio,
    scalebio_votes,
)
from bilevel.solvers.penalty.recursive import RecursivePenalty
from bilevel.solvers.penalty.template import Penalty

__all__ = [
    "VPBGD",
    "Penalty",
    "RecursivePenalty",
    "accf2ba",
    "f2ba",
    "f2sa",
    "f2sa2",
    "proximal",
    "scalebio",
    "scalebio_votes",
]
