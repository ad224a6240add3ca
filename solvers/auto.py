"""A solver chosen by what the problem can give, with the reason said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch

from bilevel import plugins
from bilevel.check import probe
from bilevel.launch import Launcher
from bilevel.linear import norm
from bilevel.memory import Full, Memory
from bilevel.oracle import Curvature, Oracle, Vector
from bilevel.problem import Always, Problem, constrained
from bilevel.result import Status
from bilevel.solver import Solver, State, require
from bilevel.tree import leaves
from bilevel.variable import is_module

log = logging.getLogger("bilevel")

LARGE = 1_000_000  # entries of y: above, the graph of a gradient costs more memory than a second y
POWER = 30  # products for the largest curvature: known to a tenth, and the step has a factor of two
FLAT = 1e-6  # smallest over largest curvature below which H is taken for singular

CHOICES = ("penalty", "aid")
"""What is chosen from; a state holds the index."""


@dataclass(frozen=True)
class Choice:
    """A solver's name, its options and why."""

    name: str
    reason: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """`aid` where the lower level is smooth, strongly convex and exact; else `penalty`.

    Looks at the start (x0, y0): constraints on y, modules and sizes, changing batches, second
    derivatives, and the extreme eigenvalues mu and L of H by power iteration. Where those are
    known, the step of y is 1/(2L), and its number for each step of x is 2 L/mu, 10 to 100.
    `choose` says what and why; the command line prints it, and the log has it.

    >>> from bilevel.problems.quadratic import Quadratic
    >>> print(Auto().choose(Quadratic()).reason)
    aid: 5 lower variables, exact losses, curvature of g in y from 1 to 10.
    """

    order: ClassVar[int] = 1  # takes second derivatives only where they are there

    upper_optimizer: str = "adam"
    """A torch.optim optimizer for x."""
    upper_lr: float = 1e-2
    """Step size of x."""
    lower_lr: float = 0.0
    """Step size of y; 0 takes 1/(2L) where L can be had, and 0.1 elsewhere."""
    inner_steps: int = 0
    """Steps on y for one of x; 0 takes 2 L/mu, from 10 to 100, where that can be had, or 10."""
    tolerance: float = 0.0
    """Stop when the largest change of an entry of x in one step is below this; 0 never stops."""

    def __post_init__(self) -> None:
        require(
            self, upper_lr="positive", **dict.fromkeys(("lower_lr", "inner_steps"), "non-negative")
        )

    def choose(self, problem: Problem, memory: Memory | None = None) -> Choice:
        """The solver for a problem; costs a few gradients and products at the start."""
        x, y = problem.init(torch.Generator().manual_seed(0))
        size = sum(p.numel() for p in leaves(y))
        streams = problem.batches(torch.Generator().manual_seed(0))
        if constrained(problem, "lower"):
            return Choice("penalty", "penalty: the lower variables are constrained.")
        if memory is not None and not isinstance(memory, Full):
            return Choice("penalty", "penalty: the memory strategy trains parts of y at a time.")
        if is_module(y) or size > LARGE:
            words = "the lower variable is a module" if is_module(y) else f"y has {size:,} entries"
            return Choice("penalty", f"penalty: {words}; it needs first derivatives only.")
        if not all(isinstance(stream, Always) for stream in streams):
            return Choice("penalty", "penalty: the losses change from batch to batch.")
        if faults := probe(problem, order=2):
            return Choice("penalty", f"penalty: {faults[0]}")
        bend = Oracle(problem, {}).curvature(x, y, problem.whole()[1])
        low, high = _extremes(bend)
        steps = {"lower_lr": 0.5 / high} if high > 0 else {}
        span = f"curvature of g in y from {low:.3g} to {high:.3g}"
        if not low > FLAT * high:
            return Choice(
                "penalty", f"penalty: g is not strongly convex at the start, {span}.", steps
            )
        steps["inner_steps"] = int(min(100, max(10, 2 * high / low)))
        return Choice("aid", f"aid: {size} lower variables, exact losses, {span}.", steps)

    def notes(self, problem: Problem) -> list[str]:
        return [f"solver=auto chooses {self.choose(problem).reason}"]

    def init(
        self, problem: Problem, memory: Memory, launcher: Launcher, generator: torch.Generator
    ) -> State:
        choice = self.choose(problem, memory)
        log.info("solver=auto chooses %s", choice.reason)
        numbers = {
            "choice": float(CHOICES.index(choice.name)),
            "lower_lr": self.lower_lr or choice.options.get("lower_lr", 0.1),
            "inner_steps": float(self.inner_steps or choice.options.get("inner_steps", 10)),
        }
        state = self._chosen(numbers).init(problem, memory, launcher, generator)
        state.numbers |= numbers
        return state

    def step(self, problem: Problem, launcher: Launcher, state: State) -> State:
        return self._chosen(state.numbers).step(problem, launcher, state)

    def terminate(self, state: State) -> Status | None:
        return self._chosen(state.numbers).terminate(state)

    def _chosen(self, numbers: dict[str, float]) -> Solver:
        return _made(
            CHOICES[int(numbers["choice"])],
            self.upper_optimizer,
            self.upper_lr,
            numbers["lower_lr"],
            int(numbers["inner_steps"]),
            self.tolerance,
        )


@lru_cache(maxsize=32)
def _made(
    name: str,
    upper_optimizer: str,
    upper_lr: float,
    lower_lr: float,
    inner_steps: int,
    tolerance: float,
) -> Solver:
    make: Callable[..., Solver] = plugins.find("solver", name)
    return make(
        upper_optimizer=upper_optimizer,
        upper_lr=upper_lr,
        lower_lr=lower_lr,
        inner_steps=inner_steps,
        tolerance=tolerance,
    )


def _extremes(bend: Curvature) -> tuple[float, float]:
    """The smallest and largest eigenvalue of H: by power iterations on H, and on high I - H."""
    high = _power(bend.hvp, bend.gradient)
    if high <= 0:  # the largest in size is negative
        return high, 0.0

    def flipped(v: Vector) -> Vector:
        return [high * p - h for p, h in zip(v, bend.hvp(v), strict=True)]

    return high - _power(flipped, bend.gradient), high


def _power(product: Callable[[Vector], Vector], like: Vector) -> float:
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(t.shape, generator=generator).to(t) for t in like]
    value = 0.0
    for _ in range(POWER):
        size = norm(v)
        if size == 0:
            return 0.0
        v = [t / size for t in v]
        image = product(v)
        value = float(sum((a * b).sum() for a, b in zip(v, image, strict=True)))
        v = image
    return value
