"""The loss difference that most methods move weights by: of a model being trained and another.

    d_i = l_i(model) - l_i(reference)

RHO: the reference has seen the target, rows of large d are trained on. DoReMi: the reference is an
ordinary model, the weight of a source grows with its d. ScaleBiO: both models are trained at once,
and the reference is the one that also sees the target; see the solver.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bilevel.problems.llm_reweight.baselines.lab import Lab
from bilevel.problems.llm_reweight.tokens import Batch


def excess(lab: Lab, losses: Tensor, reference: nn.Module, batch: Batch) -> Tensor:
    """[rows], d_i in float64, from the losses [rows] that the model has."""
    return losses.detach().double().cpu() - lab.losses(reference, batch)


def by_source(values: Tensor, batch: Batch, sources: int) -> Tensor:
    """[sources], the mean of [rows] values over the rows of each source, 0 where there are none."""
    shared = torch.zeros(sources, dtype=torch.float64)
    return shared.index_add(0, batch.source, values.double() * batch.share)
