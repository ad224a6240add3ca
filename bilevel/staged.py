"""The lower level by traces: descent on y, second derivatives, steps that can be pulled back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bilevel.compiled import Compiled
from bilevel.errors import InputError
from bilevel.launch import Launcher
from bilevel.linear import norm
from bilevel.oracle import Curvature, Oracle, Vector
from bilevel.problem import Problem, constrained
from bilevel.solver import State, finite_loss
from bilevel.trace import Traced
from bilevel.tree import leaves, with_leaves
from bilevel.variable import Variable, is_module

RETRACED = 8
"""Traces of one run: more would cost more than they save."""
_UNSEEN = object()

Step = Callable[[Vector, Vector], Sequence[Tensor]]
"""(s, grad_y g) -> what is traced: the gradient itself, or the next s."""
Kind = TypeVar("Kind", Traced, Compiled)


class Staged(Generic[Kind]):
    """F(x, s) = step(s, grad_y g(x, y)) with y the first leaves of s, traced once for a run.

    Args:
        problem: Of g.
        state: Of x and y, which must be trees of tensors.
        step: From s and the gradient to F.
        kind: How F is run.

    Raises:
        InputError: If x or y is a module.
    """

    def __init__(self, problem: Problem, state: State, step: Step, kind: type[Kind]) -> None:
        self._problem, self._state, self._step, self._kind = problem, state, step, kind
        self._x, self._y = state.variables["x"], state.variables["y"]
        if is_module(self._x.value) or is_module(self._y.value):
            raise InputError(
                f"engine={kind.engine} needs x and y to be trees of tensors, not modules."
            )
        self._traced: list[Kind] = []
        self._batch: Any = _UNSEEN

    def renew(self) -> None:
        """Forget where x was."""
        self._batch = _UNSEEN

    def at(self, s: Vector, batch: Any) -> Kind:
        """The trace, at the present x and a batch.

        Raises:
            InputError: If the loss cannot be traced, or batches change in more than numbers.
        """
        if batch is not self._batch:
            x = leaves(self._x.value)
            fit = next((t for t in self._traced if t.fits(batch)), None)
            if fit is None and len(self._traced) == RETRACED:
                raise InputError(
                    f"engine={self._kind.engine} needs batches that are trees of tensors of few "
                    f"shapes, and this is the {RETRACED + 1}th kind; use engine=autograd."
                )
            if not self._traced:
                with torch.no_grad():  # what a first call keeps, such as data, must be no trace's
                    part = self._problem.split(batch)[0]
                    self._problem.lower(self._x.value, self._y.value, part)
            if fit is None:
                fit = self._kind(self._function, x, s, batch)
            else:
                self._traced.remove(fit)
            self._traced.append(fit)
            fit.at(x, batch)
            self._batch = batch
        return self._traced[-1]

    def _function(self, x: Vector, s: Vector, batch: Any) -> tuple[Tensor, Sequence[Tensor]]:
        def loss(y: Vector) -> Tensor:
            parts = self._problem.split(batch)
            return torch.stack([self._loss(x, y, part).reshape(()) for part in parts]).sum()

        g, value = torch.func.grad_and_value(loss)(s[: len(leaves(self._y.value))])
        return value, self._step(s, g)

    def _loss(self, x: Vector, y: Vector, part: Any) -> Tensor:
        def at(x: Any) -> Tensor:
            return with_leaves(lambda y: self._problem.lower(x, y, part), self._y.value, y)

        return with_leaves(at, self._x.value, x)


def staged(problem: Problem, state: State, step: Step, kind: type[Kind]) -> Staged[Kind]:
    """The one of a run, at the x of now."""
    found = state.derived.get("staged") or Staged(problem, state, step, kind)
    state.derived["staged"] = found
    found.renew()
    return found


def descend(
    lower: Staged[Traced], problem: Problem, launcher: Launcher, state: State, *, steps: int
) -> None:
    """As `bilevel.descent.descend` to rounding; what is not finite is found at the last step."""
    x, y = state.variables["x"], state.variables["y"]
    own = leaves(y.value)
    lr = plain_step(y)
    for left in reversed(range(steps)):
        batch = next(state.streams["lower"])
        at = lower.at(own, batch)
        g = at.values(own)
        if not left:
            loss = at.scalar(own)
            state.lower = finite_loss("lower", loss, problem, x, y, batch)
            state.numbers["lower_gradient"] = norm(g)
        if lr is None:
            y.clear()
            y.gather(g)
            launcher.step([y])
        else:
            with torch.no_grad():
                for p, slope in zip(own, g, strict=True):
                    p.add_(slope, alpha=-lr)
    state.counts["lower_grad"] += steps


class StagedCurvature(Curvature):
    """H and J' at a point through one recorded trace.

    Args:
        lower: Whose step is the gradient itself.
        oracle: Counts; building this counts as one `lower_grad`.
        x: Upper variable.
        y: Lower variable.
        batch: Of the lower loss.
    """

    def __init__(self, lower: Staged[Traced], oracle: Oracle, x: Any, y: Any, batch: Any) -> None:
        self._oracle, self._place = oracle, (x, y, batch)
        own = leaves(y)
        self._traced = lower.at(own, batch)
        self.gradient, self._saved = self._traced.record([p.detach() for p in own])
        self.value = float(self._traced.scalar(own))
        oracle.count("lower_grad")

    def hvp(self, v: Vector) -> Vector:
        self._oracle.count("hvp")
        return self._traced.pull_s(self._saved, v)

    def cross(self, v: Vector) -> Vector:
        self._oracle.count("cross")
        return self._traced.pull_x(self._saved, v)

    def push(self, u: Vector) -> Vector:
        return self._oracle.curvature(*self._place).push(u)

    def both(self, v: Vector) -> tuple[Vector, Vector]:
        self._oracle.count("hvp")
        self._oracle.count("cross")
        return self._traced.pull(self._saved, v)


def plain_step(y: Variable) -> float | None:
    """The step size where y moves by its gradient alone, None where by anything else."""
    groups = y.optimizer.param_groups
    if type(y.optimizer) is not torch.optim.SGD or len(groups) > 1 or y.project or y.holder:
        return None
    group = groups[0]
    changed = [k for k in ("momentum", "weight_decay", "nesterov", "maximize") if group[k]]
    return None if changed else float(group["lr"])


def faults(problem: Problem, engine: str) -> list[str]:
    """Why an engine cannot be used, as sentences."""
    if engine != "autograd" and constrained(problem, "lower"):
        return [f"engine={engine} needs a lower level without constraints; use engine=autograd."]
    return []
