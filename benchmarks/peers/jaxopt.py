"""jaxopt: solvers that jax compiles and differentiates, implicitly or through their steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
from jaxopt.linear_solve import solve_cg

jax.config.update("jax_enable_x64", True)

METHODS = {"aid": "implicit, compiled", "itd": "unrolled, compiled"}


@dataclass
class Task:
    """The same as in losses.py, in jax."""

    data: dict[str, Any]
    options: dict[str, Any]
    x0: Any
    y0: list[Any]

    @property
    def lower_lr(self) -> float:
        return self.options["lower_lr"]

    def lower(self, y: list[Any], x: Any) -> Any:
        d, decay = self.data, self.options["decay"]
        if self.options["family"] == "quadratic":
            chain = jnp.square(y[0][1:] - y[0][:-1]).sum() / 8
            pull = (y[0] * d["b"]).reshape(-1, len(x)).sum(0) @ x
            return 0.5 * (d["d"] * jnp.square(y[0])).sum() + chain - pull
        if self.options["family"] == "fewshot":
            losses = self._heads("support", x, y[0])
            return len(y[0]) * losses + 0.5 * decay * jnp.square(y[0]).sum()
        losses = entropy(logits(d["train"], y), d["labels"])
        if self.options["family"] == "cleaning":
            norm = sum(jnp.square(p).sum() for p in y)
            return (jax.nn.sigmoid(x) * losses).mean() + 0.5 * decay * norm
        rest = sum(jnp.square(p).sum() for p in y[1:])
        strength = jnp.exp(x) @ jnp.square(y[0]).sum(1)
        return losses.mean() + 0.5 * strength + 0.5 * decay * rest

    def upper(self, y: list[Any], x: Any) -> Any:
        if self.options["family"] == "quadratic":
            return 0.5 * jnp.square(y[0] - self.data["c"]).mean()
        if self.options["family"] == "fewshot":
            return self._heads("query", x, y[0])
        return entropy(logits(self.data["valid"], y), self.data["valid_labels"]).mean()

    def _heads(self, rows: str, x: Any, heads: Any) -> Any:
        features = jnp.tanh(self.data[rows] @ x.reshape(-1, heads.shape[1]))
        scores = (features @ heads).reshape(-1, heads.shape[2])
        return entropy(scores, self.data[f"{rows}_labels"]).mean()


def logits(rows: Any, y: list[Any]) -> Any:
    return rows @ y[0] if len(y) == 1 else jnp.tanh(rows @ y[0]) @ y[1]


def entropy(scores: Any, labels: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], axis=1)[:, 0]


def load(path: Path | str) -> Task:
    arrays = dict(np.load(path))
    options = json.loads(str(arrays.pop("options")))
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    y0 = [arrays.pop(name) for name in sorted(arrays) if name.startswith("y0_")]
    return Task(data=arrays, options=options, x0=arrays.pop("x0"), y0=y0)


def start(task: Task, method: str, inner: int, products: int) -> Run:
    return Run(task, method, inner, products)


class Run:
    def __init__(self, task: Task, method: str, inner: int, products: int) -> None:
        solver = jaxopt.GradientDescent(
            task.lower,
            stepsize=task.lower_lr,
            maxiter=inner,
            tol=0.0,
            acceleration=False,
            implicit_diff_solve=partial(solve_cg, maxiter=products, tol=0.0, atol=0.0),
        )

        def unrolled(y: Any, x: Any) -> Any:
            state = solver.init_state(y, x)
            body = lambda pair, _: (tuple(solver.update(*pair, x)), None)  # noqa: E731
            return jax.lax.scan(body, (y, state), None, length=inner)[0][0]

        def loss(x: Any, y: Any) -> Any:
            y = solver.run(y, x).params if method == "aid" else unrolled(y, x)
            return task.upper(y, x), y

        @jax.jit
        def step(x: Any, y: Any) -> Any:
            (_, y), slope = jax.value_and_grad(loss, has_aux=True)(x, y)
            return x - task.options["upper_lr"] * slope, y

        self.compiled, self.at, self.y = step, task.x0, task.y0

    def step(self) -> None:
        self.at, self.y = jax.block_until_ready(self.compiled(self.at, self.y))

    def x(self) -> np.ndarray:
        return np.array(self.at)


def script(train, labels, valid, valid_labels, lr, steps):  # user: begin
    def cross_entropy(scores, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], axis=1)[:, 0]

    def lower(y, x):
        losses = cross_entropy(train @ y, labels)
        return (jax.nn.sigmoid(x) * losses).mean() + 0.0025 * jnp.square(y).sum()

    solve = partial(solve_cg, maxiter=20)
    solver = jaxopt.GradientDescent(
        lower, stepsize=lr, maxiter=100, tol=0.0, acceleration=False, implicit_diff_solve=solve
    )

    def loss(x, y):
        y = solver.run(y, x).params
        return cross_entropy(valid @ y, valid_labels).mean(), y

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    x, y = jnp.zeros(len(train)), jnp.zeros((train.shape[1], 10))
    for _ in range(steps):
        slope, y = gradient(x, y)
        x = x - 300.0 * slope
    return x  # user: end
