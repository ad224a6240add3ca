"""Members of the penalty family, and a quadratic with noise to try them on."""

import torch

import bilevel
from bilevel.solvers.penalty import VPBGD, Penalty, RecursivePenalty, accf2ba, f2sa2, proximal

ZERO = torch.zeros((), dtype=torch.float64)
SGD = {"upper_optimizer": "sgd", "upper_lr": 0.1}
MEMBERS = {
    "order 1": Penalty(stencil=1, **SGD),
    "order 2": Penalty(**SGD),
    "order 3": Penalty(stencil=3, **SGD),
    "order 4": Penalty(stencil=4, **SGD),
    "proximal": proximal(**SGD),
    "accelerated": accf2ba(upper_lr=0.03),
    "normalized": f2sa2(upper_step="normalized", **SGD),
    "joint": VPBGD(),
    "recursive": RecursivePenalty(eta=0.3, upper_lr=0.02),
    "recursive without memory": RecursivePenalty(eta=1.0),
}


def distance(result, problem):
    """From x to the known optimum."""
    return float((result.x - problem.solution().x).norm())


class Noisy(bilevel.Stream):
    """Standard normal batches from a counter."""

    def __init__(self, size):
        self.size, self.at = size, 0

    def __next__(self):
        self.at += 1
        generator = torch.Generator().manual_seed(self.at)
        return torch.randn(self.size, generator=generator, dtype=torch.float64)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class NoisyQuadratic(bilevel.Problem):
    """f = |y - 1|^2 / 2 and g = |y - x|^2 / 2 + <noise, y> (1 + |x|^2 / 2)."""

    def init(self, generator):
        return torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def upper(self, x, y, batch):
        return 0.5 * (y - 1).square().sum()

    def lower(self, x, y, batch):
        return 0.5 * (y - x).square().sum() + (batch @ y) * (1 + 0.5 * x.square().sum())

    def batches(self, generator):
        return Noisy(1), Noisy(2)
