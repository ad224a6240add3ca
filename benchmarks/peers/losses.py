"""The tasks' losses in PyTorch, which every PyTorch library gets as they are; knows no library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Task:
    """Two losses of x and of y, a list of tensors; their start, and the step sizes of both."""

    data: dict[str, Tensor]
    options: dict[str, Any]
    x0: Tensor
    y0: list[Tensor]

    @property
    def lower_lr(self) -> float:
        return self.options["lower_lr"]

    @property
    def upper_lr(self) -> float:
        return self.options["upper_lr"]

    def lower(self, x: Tensor, y: list[Tensor]) -> Tensor:
        d, decay = self.data, self.options["decay"]
        if self.options["family"] == "quadratic":
            chain = (y[0][1:] - y[0][:-1]).square().sum() / 8
            pull = (y[0] * d["b"]).view(-1, len(x)).sum(0) @ x
            return 0.5 * (d["d"] * y[0].square()).sum() + chain - pull
        if self.options["family"] == "fewshot":
            losses = self._heads("support", x, y[0])
            return len(y[0]) * losses + 0.5 * decay * y[0].square().sum()
        if self.options["family"] == "cleaning":
            losses = cross_entropy(logits(d["train"], y), d["labels"], reduction="none")
            return (x.sigmoid() * losses).mean() + 0.5 * decay * sum(p.square().sum() for p in y)
        loss = cross_entropy(logits(d["train"], y), d["labels"])
        rest = sum(p.square().sum() for p in y[1:])
        return loss + 0.5 * (x.exp() @ y[0].square().sum(1)) + 0.5 * decay * rest

    def upper(self, x: Tensor, y: list[Tensor]) -> Tensor:
        if self.options["family"] == "quadratic":
            return 0.5 * (y[0] - self.data["c"]).square().mean()
        if self.options["family"] == "fewshot":
            return self._heads("query", x, y[0])
        return cross_entropy(logits(self.data["valid"], y), self.data["valid_labels"])

    def _heads(self, rows: str, x: Tensor, heads: Tensor) -> Tensor:
        """The mean loss of all tasks' heads [tasks, width, ways] on features that x makes."""
        features = torch.tanh(self.data[rows] @ x.view(-1, heads.shape[1]))
        return cross_entropy((features @ heads).flatten(0, 1), self.data[f"{rows}_labels"])


class Net(torch.nn.Module):
    """y as a module that returns a loss at x, for libraries that want modules."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.size = task, len(task.y0)
        for i, p in enumerate(task.y0):
            self.register_parameter(f"y{i}", torch.nn.Parameter(p.clone()))

    def forward(self, level: str, x: Tensor) -> Tensor:
        y = [getattr(self, f"y{i}") for i in range(self.size)]
        return getattr(self.task, level)(x, y)


class Upper(torch.nn.Module):
    """x as a module."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(x0.clone())

    def forward(self) -> Tensor:
        return self.x


def logits(rows: Tensor, y: list[Tensor]) -> Tensor:
    """Of a softmax regression, or with a layer of tanh below it."""
    return rows @ y[0] if len(y) == 1 else torch.tanh(rows @ y[0]) @ y[1]


def load(path: Path | str) -> Task:
    """The task in a file of `tasks.py`."""
    arrays = dict(np.load(path))
    options = json.loads(str(arrays.pop("options")))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    y0 = [tensors.pop(name) for name in sorted(tensors) if name.startswith("y0_")]
    return Task(data=tensors, options=options, x0=tensors.pop("x0"), y0=y0)
