"""The rows of a batch at which a loss or its gradient is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bilevel.problems.llm_reweight.tokens import Batch, cut

MOST_NAMED = 8
"""Rows that are named."""


def sentence(losses: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch) -> str:
    """Which rows they are, empty without any; each takes a pass of its own.

    Args:
        losses: Gives the loss of each row of a batch at a model, [rows].
        model: Where they are taken.
        batch: What is looked at.
    """
    moving = [p for p in model.parameters() if p.requires_grad]
    bad = []
    for row in cut(batch, 1):
        loss = losses(model, row).sum()
        grads = torch.autograd.grad(loss, moving, allow_unused=True)
        if not all(bool(t.isfinite().all()) for t in (loss, *grads) if t is not None):
            bad += row.labels
    if not bad:
        return ""
    more = f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    return (
        f"not finite for {len(bad)} of {len(batch.labels)} rows (source:record from 0): "
        f"{', '.join(bad[:MOST_NAMED])}{more}"
    )
