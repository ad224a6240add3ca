"""hypertorch (package hypergrad): hypergradients of a fixed point map."""

from __future__ import annotations

import hypergrad
import numpy as np
import torch
from hypergrad.diff_optimizers import GradientDescent
from losses import Task, load  # noqa: F401 - for the worker

torch.set_num_threads(1)

METHODS = {"aid": "implicit", "itd": "unrolled"}


def start(task: Task, method: str, inner: int, products: int) -> Run:
    return Run(task, method, inner, products)


class Run:
    def __init__(self, task: Task, method: str, inner: int, products: int) -> None:
        self.method, self.inner, self.products = method, inner, products
        self.at = task.x0.clone().requires_grad_()
        self.upper = torch.optim.SGD([self.at], lr=task.upper_lr)
        self.y = [p.clone().requires_grad_() for p in task.y0]
        self.loss = lambda y, x: task.upper(x[0], y)
        self.phi = GradientDescent(lambda y, x: task.lower(x[0], y), task.lower_lr)

    def step(self) -> None:
        y, unrolled = self.y, self.method == "itd"
        for _ in range(self.inner):
            y = self.phi(y, [self.at], create_graph=unrolled)
            if not unrolled:
                y = [p.detach().requires_grad_() for p in y]
        self.upper.zero_grad()
        if unrolled:
            hypergrad.reverse_unroll(y, [self.at], self.loss)
        else:
            hypergrad.CG(y, [self.at], self.products, self.phi, self.loss, tol=0.0)
        self.upper.step()
        self.y = [p.detach().requires_grad_() for p in y]

    def x(self) -> np.ndarray:
        return self.at.detach().numpy().copy()


def script(train, labels, valid, valid_labels, lr, steps):  # user: begin
    from torch.nn.functional import cross_entropy

    def lower(y, x):
        losses = cross_entropy(train @ y[0], labels, reduction="none")
        return (x[0].sigmoid() * losses).mean() + 0.0025 * y[0].square().sum()

    def upper(y, x):
        return cross_entropy(valid @ y[0], valid_labels)

    x = train.new_zeros(len(train)).requires_grad_()
    y = [train.new_zeros(train.shape[1], 10).requires_grad_()]
    optimizer = torch.optim.SGD([x], lr=300.0)
    phi = GradientDescent(lower, lr)
    for _ in range(steps):
        for _ in range(100):
            y = [p.detach().requires_grad_() for p in phi(y, [x], create_graph=False)]
        optimizer.zero_grad()
        hypergrad.CG(y, [x], 20, phi, upper)
        optimizer.step()
    return x.detach()  # user: end
