"""betty (package betty-ml): problems of their own, tied by an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from losses import Net, Task, Upper, load  # noqa: F401 - for the worker

torch.set_num_threads(1)

METHODS = {"cg": "implicit", "neumann": "implicit", "darts": "first order"}


class Outer(ImplicitProblem):
    def training_step(self, batch: Any) -> torch.Tensor:
        return self.inner("upper", self.module())

    def get_batch(self) -> None:
        return None


class Inner(ImplicitProblem):
    def training_step(self, batch: Any) -> torch.Tensor:
        return self.module("lower", self.outer())

    def get_batch(self) -> None:
        return None


def start(task: Task, method: str, inner: int, products: int) -> Run:
    return Run(task, method, inner, products)


class Run:
    def __init__(self, task: Task, method: str, inner: int, products: int) -> None:
        settings = {
            "cg": {"cg_iterations": products, "cg_alpha": 1.0},
            "neumann": {"neumann_iterations": products, "neumann_alpha": task.lower_lr},
            "darts": {},
        }
        lower = Config(type=method, unroll_steps=inner, **settings[method])
        net, top = Net(task), Upper(task.x0)
        self.inner, self.top = inner, top
        outer = Outer(
            name="outer",
            config=Config(),
            module=top,
            optimizer=torch.optim.SGD(top.parameters(), lr=task.upper_lr),
        )
        below = Inner(
            name="inner",
            config=lower,
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=task.lower_lr),
        )
        dependencies = {"u2l": {outer: [below]}, "l2u": {below: [outer]}}
        self.engine = Engine(
            problems=[outer, below], config=EngineConfig(), dependencies=dependencies
        )

    def step(self) -> None:
        self.engine.train()
        for _ in range(self.inner):
            self.engine.global_step += 1
            self.engine.train_step()

    def x(self) -> np.ndarray:
        return self.top.x.detach().numpy().copy()


def script(train, labels, valid, valid_labels, lr, steps):  # user: begin
    from torch.nn.functional import cross_entropy

    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(train.new_zeros(len(train)))

        def forward(self):
            return self.x.sigmoid()

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return cross_entropy(self.inner(batch[0]), batch[1])

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            losses = cross_entropy(self.module(batch[0]), batch[1], reduction="none")
            return (self.outer() * losses).mean() + 0.0025 * self.module.weight.square().sum()

    weights = Weights()
    net = torch.nn.Linear(train.shape[1], 10, bias=False, dtype=train.dtype)
    torch.nn.init.zeros_(net.weight)
    outer = Outer(
        name="outer",
        config=Config(),
        module=weights,
        optimizer=torch.optim.SGD(weights.parameters(), lr=300.0),
        train_data_loader=[(valid, valid_labels)],
    )
    inner = Inner(
        name="inner",
        config=Config(type="neumann", unroll_steps=100, neumann_iterations=20, neumann_alpha=lr),
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=lr),
        train_data_loader=[(train, labels)],
    )
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    config = EngineConfig(train_iters=100 * steps)
    Engine(problems=[outer, inner], config=config, dependencies=dependencies).run()
    return weights.x.detach()  # user: end
