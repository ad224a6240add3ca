"""SAMA: the inverse curvature taken from the optimizer's own step, products by differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.descent import begin, converged, descend, move_upper, plus
from bilevel.errors import InputError
from bilevel.launch import Launcher
from bilevel.linear import norm
from bilevel.memory import Memory
from bilevel.oracle import Oracle, Vector
from bilevel.problem import Problem
from bilevel.result import Status
from bilevel.solver import Solver, State, free_lower, require
from bilevel.tree import dot, leaves, snapshot
from bilevel.variable import optimizer_by_name


@dataclass(frozen=True, kw_only=True)
class SAMA(Solver):
    """`inner_steps` steps on y, then the hypergradient through the last of them, to first order.

        v = du/dq grad_y f,    dF ~= grad_x f - [grad_x g(x, y + e v) - grad_x g(x, y - e v)] / 2e

    where u(q) is the optimizer's step on a gradient q, u = lr q for sgd, and e = alpha / |v|. The
    derivative du/dq is elementwise, at the state that the last step has left. One upper step costs
    `inner_steps` + 2 gradients of g and one of f; no second derivatives.

    Reference: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing, Making Scalable Meta Learning
    Practical, 2023 (2310.05674). Deviations: the bias corrections of Adam are differentiated too;
    y is not moved along v afterwards. It inherits the bias of the identity, and may point uphill.
    """

    order: ClassVar[int] = 1

    inner_steps: int = 1
    """Steps on y for one step of x, from where it was."""
    alpha: float = 1.0
    """|e v|, how far from y the two gradients are taken."""
    upper_optimizer: str = "adam"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_optimizer: str = "sgd"
    """The optimizer of y: sgd, adam or adamw."""
    lower_lr: float = 1e-1
    """Step size of y."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        require(self, inner_steps="at least 1", alpha="positive", tolerance="non-negative")
        if self.lower_optimizer.lower() not in DERIVATIVES:
            raise InputError(
                "sama knows the derivative of the steps of sgd, adam and adamw, got "
                f"lower_optimizer={self.lower_optimizer}; choose one of them."
            )

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        upper = optimizer_by_name(self.upper_optimizer, self.upper_lr)
        lower = optimizer_by_name(self.lower_optimizer, self.lower_lr)
        return begin(problem, memory, launcher, generator, upper=upper, lower=lower)

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        x, y = state.variables["x"], state.variables["y"]
        state.memory.before_step(state.step, [y])
        q: Vector = []
        descend(problem, launcher, state, steps=self.inner_steps, last=q)
        oracle = Oracle(problem, state.counts)
        upper = oracle.upper(x.value, y.value, next(state.streams["upper"]))
        derivative = DERIVATIVES[self.lower_optimizer.lower()]
        triples = zip(leaves(y.value), q, upper.y, strict=True)
        v = [r * derivative(y.optimizer, p, g) if p.requires_grad else 0 * r for p, g, r in triples]
        state.vectors["v"] = v
        state.numbers["lower_error"] = abs(float(dot(v, q)))
        state.upper = upper.value
        cross = self._cross(oracle, state, v)
        move_upper(launcher, state, plus(upper.x, cross, -1.0))
        state.step += 1
        return state

    def terminate(self, state: State) -> Status | None:
        return converged(state, self.tolerance)

    def check(self, problem: Problem) -> list[str]:
        return free_lower(problem, "sama needs")

    def _cross(self, oracle: Oracle, state: State, v: Vector) -> Vector:
        """J'v by the central difference; y is put back bit for bit."""
        x, y = state.variables["x"], state.variables["y"]
        batch, here = next(state.streams["lower"]), snapshot(y.value)
        e = self.alpha / max(norm(v), 1e-30)  # v = 0 gives two equal gradients, hence 0
        found: list[Vector] = []
        try:
            for sign in (1.0, -1.0):
                y.assign(plus(here, v, sign * e))
                found.append(oracle.lower(x.value, y.value, batch).x)
        finally:
            y.assign(here)
        return [(a - b) / (2 * e) for a, b in zip(*found, strict=True)]


def _sgd(optimizer: torch.optim.Optimizer, leaf: Tensor, q: Tensor) -> Tensor:
    return torch.full_like(q, optimizer.param_groups[0]["lr"])


def _adam(optimizer: torch.optim.Optimizer, leaf: Tensor, q: Tensor) -> Tensor:
    """d/dq of lr m / (sqrt(s) + eps), where m and s hold the shares (1 - beta1) q, (1 - beta2) q^2.

    The second term is 0 where s is, as q and m are there.
    """
    group, state = optimizer.param_groups[0], optimizer.state.get(leaf)
    if not state:  # the leaf never had a gradient
        return torch.zeros_like(q)
    beta1, beta2 = group["betas"]
    first, second = (1 - beta ** float(state["step"]) for beta in (beta1, beta2))
    m, root = state["exp_avg"] / first, (state["exp_avg_sq"] / second).sqrt()
    width = root + group["eps"]
    bend = torch.where(root > 0, m * (1 - beta2) * q / (second * root * width), 0.0)
    return group["lr"] / width * ((1 - beta1) / first - bend)


DERIVATIVES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adam,  # its decay does not depend on the gradient
}
"""du/dq by the name of the optimizer, from it, the leaf and the last gradient of that."""
