"""How much of a step is spent outside the losses and their derivatives?

Run: python benchmarks/overhead.py   (writes benchmarks/results/overhead.json and .md)

Softmax regression on the digits of scikit-learn, one regularization strength for each feature: 640
lower variables, 900 rows, the small problem where the library's own Python weighs most. The clock
runs inside both losses, `backward` and `autograd.grad`; the rest of the step is the overhead. Every
figure is the median of the repeats, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import record
import torch
from sklearn.datasets import load_digits

import bilevel
from bilevel import plugins
from bilevel.solve import start

SOLVERS = ("penalty", "f2sa", "aid", "itd", "soba")
OPTIONS: dict[str, Any] = {"soba": {"lower_lr": 0.1}}


class Clock:
    """Seconds spent inside wrapped functions, counted once where they call each other."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            self._depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - begun

        return timed


def problem(clock: Clock) -> bilevel.Functions:
    digits = load_digits()
    rows = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    loss = torch.nn.functional.cross_entropy

    def upper(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(rows[900:] @ y, labels[900:])

    def lower(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(rows[:900] @ y, labels[:900]) + (x.exp()[:, None] * y.square()).sum()

    x0, y0 = torch.full((64,), -4.0), torch.zeros(64, 10)
    return bilevel.Functions(clock.wrap(upper), clock.wrap(lower), x0, y0)


def measure(name: str, steps: int) -> dict[str, float]:
    clock = Clock()
    made, solver = problem(clock), plugins.find("solver", name)(**OPTIONS.get(name, {}))
    launcher, state = bilevel.Single(), start(made, solver)
    for _ in range(12):  # past the warm-up of x
        state = solver.step(made, launcher, state)
    with (
        mock.patch("torch.autograd.grad", clock.wrap(torch.autograd.grad)),
        mock.patch("torch.Tensor.backward", clock.wrap(torch.Tensor.backward)),
    ):
        clock.seconds, begun = 0.0, time.perf_counter()
        for _ in range(steps):
            state = solver.step(made, launcher, state)
        total = time.perf_counter() - begun
    return {"ms a step": 1e3 * total / steps, "overhead": 1 - clock.seconds / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SOLVERS}
    for _ in range(options.repeats):  # interleaved, so that a slow moment hits all alike
        for name in SOLVERS:
            found[name].append(measure(name, options.steps))
    rows = []
    for name, runs in found.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        spread = [run["overhead"] for run in runs]
        rows.append({"solver": name, **medians, "least": min(spread), "most": max(spread)})
    notes = ["`overhead` is the share of a step outside losses and derivatives; goal 0.10."]
    record.write(
        "overhead",
        "Time outside the losses",
        notes,
        rows,
        ["solver", "ms a step", "overhead", "least", "most"],
    )


if __name__ == "__main__":
    main()
