"""This library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from losses import Task, load  # noqa: F401 - for the worker

import bilevel
from bilevel.solve import start as begin
from bilevel.solvers.implicit import AID
from bilevel.solvers.unrolled import ITD

torch.set_num_threads(1)

METHODS = {
    "aid": "implicit",
    "aid traced": "implicit",
    "aid compiled": "implicit, compiled",
    "itd": "unrolled",
    "itd traced": "unrolled",
    "itd compiled": "unrolled, compiled",
    "aid 6+3": "few steps",
}


def start(task: Task, method: str, inner: int, products: int) -> Run:
    shared: dict[str, Any] = {
        "inner_steps": inner,
        "lower_lr": task.lower_lr,
        "upper_optimizer": "sgd",
        "upper_lr": task.upper_lr,
    }
    if method == "aid 6+3":
        return Run(task, AID(**shared | {"inner_steps": 6, "linear_steps": 3}))
    name, *engine = method.split()
    shared |= {"engine": engine[0]} if engine else {}
    if name == "aid":
        return Run(task, AID(linear_steps=products, linear_tolerance=0.0, **shared))
    return Run(task, ITD(**shared))


class Run:
    def __init__(self, task: Task, solver: bilevel.Solver) -> None:
        self.problem = bilevel.Functions(task.upper, task.lower, task.x0, task.y0)
        self.solver, self.launcher = solver, bilevel.Single()
        self.state = begin(self.problem, solver)

    def step(self) -> None:
        self.state = self.solver.step(self.problem, self.launcher, self.state)

    def x(self) -> np.ndarray:
        return self.state.variables["x"].value.detach().numpy().copy()


def script(train, labels, valid, valid_labels, lr, steps):  # user: begin
    from torch.nn.functional import cross_entropy

    def lower(x, y):
        losses = cross_entropy(train @ y, labels, reduction="none")
        return (x.sigmoid() * losses).mean() + 0.0025 * y.square().sum()

    def upper(x, y):
        return cross_entropy(valid @ y, valid_labels)

    x0, y0 = train.new_zeros(len(train)), train.new_zeros(train.shape[1], 10)
    solver = AID(inner_steps=100, lower_lr=lr, upper_optimizer="sgd", upper_lr=300.0)
    return bilevel.minimize(upper, lower, x0, y0, solver=solver, steps=steps).x  # user: end
