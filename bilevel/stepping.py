"""How an optimizer goes through its parameters: all in one call, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.precision import by_parts
from bilevel.variable import OptimizerFactory

Stepping = Literal["whole", "parts"]


def with_step(factory: OptimizerFactory, stepping: Stepping) -> OptimizerFactory:
    """A factory whose optimizers step in the way of that name; for parts see `in_parts`."""
    return in_parts(factory) if stepping == "parts" else factory


def in_parts(factory: OptimizerFactory) -> OptimizerFactory:
    """A factory whose optimizers step one parameter after the other, and free its gradient then.

    What a step needs besides the gradients, such as copies of them in float32 and temporaries,
    exists for one parameter at a time. An optimizer that treats every parameter by itself, as all
    of `torch.optim` do but LBFGS, gives the numbers of a step of all, and the same state.

    >>> p, q = (torch.ones(2, requires_grad=True) for _ in range(2))
    >>> optimizer = in_parts(lambda params: torch.optim.SGD(params, lr=0.5))([p, q])
    >>> p.grad, q.grad = torch.ones(2), torch.ones(2)
    >>> optimizer.step()
    >>> p.tolist(), q.tolist(), p.grad is q.grad is None
    ([0.5, 0.5], [0.5, 0.5], True)
    """

    def build(parameters: list[Tensor]) -> torch.optim.Optimizer:
        optimizer: Any = factory(parameters)
        step: Callable[[], Any] = optimizer.step

        def by_turns() -> None:
            moving = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            if not moving:
                step()  # which counts, and calls hooks
                return
            with by_parts(optimizer):
                for p in moving:
                    with alone(optimizer, p):
                        step()
                    p.grad = None

        optimizer.step = by_turns
        return optimizer

    return build


@contextmanager
def alone(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[None]:
    """Within the block an optimizer with one group of parameters has this one only."""
    (group,) = optimizer.param_groups
    everything = group["params"]
    group["params"] = [parameter]
    try:
        yield
    finally:
        group["params"] = everything


def apart_faults(option: str, instead: str, options: Mapping[str, Any]) -> list[str]:
    """Why the lower optimizer of a solver cannot step one parameter after the other.

    Args:
        option: What wants it to, as on the command line.
        instead: The value of that option that does not.
        options: Of the solver, by name.
    """
    name = str(options.get("lower_optimizer", "sgd"))
    if name.lower() in {known.lower() for known in vars(torch.optim)}:
        return []
    return [
        f"{option} steps one parameter after the other, which the optimizers of torch.optim take, "
        f"got solver.lower_optimizer={name}; use one of these, or {instead}."
    ]
