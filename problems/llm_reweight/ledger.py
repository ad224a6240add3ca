"""The losses of the sources at a model, noted as the sweeps of a solver compute them."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilevel import processes
from bilevel.problems.llm_reweight.tokens import Batch

MOST = 4096
"""Micro-batches that are kept: those of a step, not of an evaluation that nobody asks about."""


class Ledger:
    """Row losses of every model since they were last taken; they take no pass of their own."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=MOST)

    def add(self, model: nn.Module, batch: Batch, losses: Tensor) -> None:
        """Note the losses [rows] of the rows of a batch at a model."""
        self._seen.append((id(model), batch.source, losses.detach()))

    def take(self, model: nn.Module, sources: int) -> list[float | None]:
        """The mean loss of every source at a model, over all processes; None for those not seen.

        Forgets all models. Several processes must call this together.
        """
        sums = torch.zeros(2, sources, dtype=torch.float64)
        for key, source, losses in self._seen:
            if key == id(model):
                rows = losses.cpu().double()
                sums.index_add_(1, source, torch.stack([rows, torch.ones_like(rows)]))
        self._seen.clear()
        flat = sums.flatten().tolist()
        flat = processes.total(flat) if dist.is_initialized() else flat
        pairs = zip(flat[:sources], flat[sources:], strict=True)
        return [total / count if count else None for total, count in pairs]
