"""One weight for each example: the records, their batches, and what a run leaves about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import Stream
from bilevel.problems.llm_reweight.tokens import Batch, Rows, collate, order


@dataclass(frozen=True, kw_only=True)
class Members:
    """The records of all sources in one numbering, and which of them each row was cut from.

    With one logit x_i for each record, a batch of rows B drawn from all sources alike has

        g_B = sum_{r in B} p_r l_r,    p_r = exp(x_i(r)) / sum_{q in B} exp(x_i(q))

    so that only logits of drawn records get a gradient, and these add up to 0. Over all rows the
    same softmax is the weight of a row, and a record has the sum over its rows.

    Reference: Shen, Chen, Das, Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning via Bilevel
    Data Selection, ICLR 2025 (2410.07471), one softmax logit for each example. Deviations: the
    softmax is over the batch rather than over everything, the gradient is that of the penalty's two
    copies rather than of one, and nothing is dropped: weights and scores are what is left.
    """

    member: tuple[Tensor, ...]
    """[rows] of each source, the record of each row, counted through all sources."""
    source: Tensor
    """[records], the source of each record."""
    index: Tensor
    """[records], its number in the file, from 0."""
    rows: Tensor
    """[records], how many rows it was cut into."""

    def __len__(self) -> int:
        return len(self.source)

    def weights(self, x: Tensor) -> Tensor:
        """[records], float64, add up to 1: the share of all draws that go to a record's rows."""
        return (x.detach() + self.rows.log()).softmax(0)

    def summary(self, x: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """What a step's record holds: the sums of each source, and numbers about all examples."""
        weights = self.weights(x)
        sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, self.source, weights)
        ratio = weights / self.rows * self.rows.sum()  # to that of a row under even weights
        entropy = -torch.special.xlogy(weights, weights / self.rows).sum()
        return {
            "weights": dict(zip(names, sums.tolist(), strict=True)),
            "examples": {
                "count": len(self),
                "effective_share": float(entropy.exp() / self.rows.sum()),
                "least": float(ratio.min()),
                "median": float(ratio.median()),
                "largest": float(ratio.max()),
            },
        }


def members(sources: Sequence[Rows]) -> Members:
    """The records of tokenized sources, in the order of the sources and their rows."""
    member, source, index, count, start = [], [], [], [], 0
    for k, rows in enumerate(sources):
        records, inverse, cuts = np.unique(
            np.asarray(rows.records), return_inverse=True, return_counts=True
        )
        member.append(torch.from_numpy(inverse.astype(np.int64)) + start)
        source.append(torch.full((len(records),), k))
        index.append(torch.from_numpy(records.astype(np.int64)))
        count.append(torch.from_numpy(cuts.astype(np.float64)))
        start += len(records)
    return Members(
        member=tuple(member),
        source=torch.cat(source),
        index=torch.cat(index),
        rows=torch.cat(count),
    )


class Pooled(Stream):
    """Batches of rows of all sources alike, every row once an epoch.

    `Batch.source` numbers the record of each row, `Batch.pool` those of the whole batch. The batch
    of step t is a pure function of (seed, t), and the position is one number.
    """

    def __init__(self, sources: Sequence[Rows], found: Members, *, rows: int, seed: int) -> None:
        self.sources, self.found, self.rows, self.seed = sources, found, rows, seed
        self.position = 0
        self._starts = np.cumsum([0, *(len(s) for s in sources)])
        self._orders: dict[int, Tensor] = {}

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        picks = [self._pick(step * self.rows + i) for i in range(self.rows)]
        drawn = torch.stack([self.found.member[k][i] for k, i in picks])
        made = collate(self.sources, picks, [1.0 / self.rows] * self.rows)
        return replace(made, source=drawn, pool=drawn)

    def seen(self, steps: int) -> Tensor:
        """[records], how often rows of each were drawn in so many steps."""
        count = torch.zeros(len(self.found), dtype=torch.long)
        flat = torch.cat(self.found.member)
        epochs, rest = divmod(steps * self.rows, len(flat))
        count += epochs * self.found.rows.long()
        return count.index_add(0, flat[self._order(epochs)[:rest]], torch.ones(rest).long())

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def _pick(self, draw: int) -> tuple[int, int]:
        epoch, place = divmod(draw, int(self._starts[-1]))
        flat = int(self._order(epoch)[place])
        k = int(np.searchsorted(self._starts, flat, side="right")) - 1
        return k, flat - int(self._starts[k])

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = order(f"{self.seed}/examples/{epoch}", int(self._starts[-1]))
        return self._orders[epoch]


def weights_of(x: Tensor, batch: Batch) -> Tensor:
    """[rows], the softmax of the logits of a batch's rows over the whole batch."""
    return (x[batch.source] - x[batch.pool].logsumexp(0)).exp()


def words(numbers: dict[str, float]) -> str:
    """How far the weights of examples are apart, by the numbers of `Members.summary`."""
    return f"from {numbers['least']:.2f} to {numbers['largest']:.2f} times an even weight"
