"""torchopt: implicit gradients of a module's solve, and differentiable optimizers."""

from __future__ import annotations

import numpy as np
import torch
import torchopt
from losses import Net, Task, load  # noqa: F401 - for the worker
from torchopt.nn import ImplicitMetaGradientModule

torch.set_num_threads(1)

METHODS = {"aid": "implicit", "itd": "unrolled"}


def start(task: Task, method: str, inner: int, products: int) -> Run:
    return Run(task, inner, products, method)


def implicit(task: Task, at: torch.nn.Parameter, inner: int, products: int) -> torch.nn.Module:
    solve = torchopt.linear_solve.solve_cg(maxiter=products, rtol=0.0, atol=0.0)

    class Lower(ImplicitMetaGradientModule, linear_solve=solve):
        def __init__(self, at: torch.Tensor) -> None:
            super().__init__()
            self.at = at
            self.y = torch.nn.ParameterList(p.clone() for p in task.y0)

        def objective(self) -> torch.Tensor:
            return task.lower(self.at, list(self.y))

        def solve(self) -> Lower:
            own = list(self.parameters())
            optimizer = torch.optim.SGD(own, lr=task.lower_lr)
            with torch.enable_grad():
                for _ in range(inner):
                    optimizer.zero_grad()
                    self.objective().backward(inputs=own)
                    optimizer.step()
            return self

    return Lower(at)


class Run:
    def __init__(self, task: Task, inner: int, products: int, method: str) -> None:
        self.task, self.inner, self.method = task, inner, method
        self.at = torch.nn.Parameter(task.x0.clone())
        self.upper = torch.optim.SGD([self.at], lr=task.upper_lr)
        if method == "aid":
            self.lower = implicit(task, self.at, inner, products)
        else:
            self.net = Net(task)
            self.optimizer = torchopt.MetaSGD(self.net, lr=task.lower_lr)

    def step(self) -> None:
        if self.method == "aid":
            solved = self.lower.solve()
            loss = self.task.upper(self.at, list(solved.y))
        else:
            for _ in range(self.inner):
                self.optimizer.step(self.net("lower", self.at))
            loss = self.net("upper", self.at)
        self.upper.zero_grad()
        loss.backward()
        self.upper.step()
        if self.method == "aid":
            torchopt.stop_gradient(self.lower)
        else:
            torchopt.stop_gradient(self.net)
            torchopt.stop_gradient(self.optimizer)

    def x(self) -> np.ndarray:
        return self.at.detach().numpy().copy()


def script(train, labels, valid, valid_labels, lr, steps):  # user: begin
    from torch.nn.functional import cross_entropy

    x = torch.nn.Parameter(train.new_zeros(len(train)))
    linear_solve = torchopt.linear_solve.solve_cg(maxiter=20)

    class Lower(ImplicitMetaGradientModule, linear_solve=linear_solve):
        def __init__(self, x):
            super().__init__()
            self.x = x
            self.y = torch.nn.Parameter(train.new_zeros(train.shape[1], 10))

        def objective(self):
            losses = cross_entropy(train @ self.y, labels, reduction="none")
            return (self.x.sigmoid() * losses).mean() + 0.0025 * self.y.square().sum()

        def solve(self):
            optimizer = torch.optim.SGD([self.y], lr=lr)
            with torch.enable_grad():
                for _ in range(100):
                    optimizer.zero_grad()
                    self.objective().backward(inputs=[self.y])
                    optimizer.step()
            return self

    lower, optimizer = Lower(x), torch.optim.SGD([x], lr=300.0)
    for _ in range(steps):
        loss = cross_entropy(valid @ lower.solve().y, valid_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torchopt.stop_gradient(lower)
    return x.detach()  # user: end
