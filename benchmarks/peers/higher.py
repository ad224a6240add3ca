"""higher: the inner loop as a differentiable copy of a module and its optimizer."""

from __future__ import annotations

import higher
import numpy as np
import torch
from losses import Net, Task, load  # noqa: F401 - for the worker

torch.set_num_threads(1)

METHODS = {"itd": "unrolled"}


def start(task: Task, method: str, inner: int, products: int) -> Run:
    return Run(task, inner)


class Run:
    def __init__(self, task: Task, inner: int) -> None:
        self.net, self.inner = Net(task), inner
        self.lower = torch.optim.SGD(self.net.parameters(), lr=task.lower_lr)
        self.at = task.x0.clone().requires_grad_()
        self.upper = torch.optim.SGD([self.at], lr=task.upper_lr)

    def step(self) -> None:
        self.upper.zero_grad()
        with higher.innerloop_ctx(self.net, self.lower) as (net, lower):
            for _ in range(self.inner):
                lower.step(net("lower", self.at))
            self.at.grad = torch.autograd.grad(net("upper", self.at), self.at)[0]
            end = [p.detach() for p in net.parameters()]
        self.upper.step()
        with torch.no_grad():
            for p, e in zip(self.net.parameters(), end, strict=True):
                p.copy_(e)

    def x(self) -> np.ndarray:
        return self.at.detach().numpy().copy()


def script(train, labels, valid, valid_labels, lr, steps):  # user: begin
    from torch.nn.functional import cross_entropy

    x = train.new_zeros(len(train)).requires_grad_()
    net = torch.nn.Linear(train.shape[1], 10, bias=False, dtype=train.dtype)
    torch.nn.init.zeros_(net.weight)
    lower = torch.optim.SGD(net.parameters(), lr=lr)
    upper = torch.optim.SGD([x], lr=300.0)
    for _ in range(steps):
        with higher.innerloop_ctx(net, lower) as (copy, differentiable):
            for _ in range(100):
                losses = cross_entropy(copy(train), labels, reduction="none")
                decay = 0.0025 * sum(p.square().sum() for p in copy.parameters())
                differentiable.step((x.sigmoid() * losses).mean() + decay)
            loss = cross_entropy(copy(valid), valid_labels)
            x.grad = torch.autograd.grad(loss, x)[0]
            net.load_state_dict(copy.state_dict())
        upper.step()
    return x.detach()  # user: end
