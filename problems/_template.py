"""A problem to copy: find the ridge penalty that fits validation data best.

Copy this file to a folder of your own as my_problem.py, change the four marked places, and run

    python -m bilevel.run problem=my_problem:Template

Here it runs as problem=bilevel.problems._template:Template.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import InputError, Problem, resolve


# Frozen: nothing of a problem changes while a solver runs. Its fields are the options of the
# command line, each with a default and a line below it for --help.
@dataclass(frozen=True, kw_only=True)
class Template(Problem):
    """g = |A y - a|^2/(2n) + e^x |y|^2/2 and f = |V y - v|^2/(2n).

    Say here what x and y are and what a user must know: is the lower loss strongly convex in y,
    are there constraints, which step sizes suit it, where does the data come from.
    """

    # What the command line takes when nothing else is given; leave out what is not needed.
    default_solver: ClassVar[str] = "aid"
    default_steps: ClassVar[int] = 100
    solver_options: ClassVar[dict[str, Any]] = {"upper_lr": 0.05}

    # 1. Your options.
    rows: int = 30
    """Training rows n, and as many validation rows."""
    features: int = 10
    """Entries of y."""
    data_seed: int = 0
    """Of the random data."""

    def __post_init__(self) -> None:
        # Say what was expected, what came, and collect all faults before raising once.
        faults = [
            f"problem.{name} must be at least 1, got {getattr(self, name)}."
            for name in ("rows", "features")
            if getattr(self, name) < 1
        ]
        if faults:
            raise InputError(faults)

    # 2. Your data, read once. Losses must be pure: draw everything random here, from data_seed.
    @cached_property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A and V [rows, features], a and v [rows]."""
        generator = torch.Generator().manual_seed(self.data_seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        true = normal(self.features)
        A, V = normal(self.rows, self.features), normal(self.rows, self.features)
        return A, A @ true + normal(self.rows), V, V @ true + normal(self.rows)

    # 3. Where x and y start: a tensor, a nest of dicts and lists of tensors, or a module. New
    # tensors at every call, for solvers change them in place; draw from the generator if at all.
    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.zeros((), dtype=torch.float64)
        return x, torch.zeros(self.features, dtype=torch.float64)

    # 4. Your two losses, scalars. `batch` is None unless you also write `batches`.
    def lower(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        A, a, _, _ = self.data
        return 0.5 * (A @ y - a).square().mean() + 0.5 * x.exp() * y @ y

    def upper(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        _, _, V, v = self.data
        return 0.5 * (V @ y - v).square().mean()

    # All below is optional.

    def project_upper(self, x: Tensor) -> Tensor:
        # The nearest point of the set that x must stay in.
        return x.clamp(-10.0, 5.0)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        # Numbers to log at every step besides the two losses; keep it cheap.
        return {"strength": float(x.detach().exp())}

    def finish(self, result: Any, out: Path) -> list[str]:
        # The lines that close a run; write pictures and files into `out`. Judge by `resolve`, which
        # solves the lower level at the final x: the solver's own y may have seen the upper loss.
        solved = resolve(self, result.x)
        return [f"strength {float(result.x.exp()):.4f}, validation loss {solved.upper:.4f}"]
