"""Cost of one bilevel step against one plain fine-tuning step on the same training tokens.

Run: python benchmarks/step_cost.py   (writes benchmarks/results/step_cost.json and .md)

Rows, all interleaved in one run on a tiny Llama, medians over the rounds:
plain (full and LISA), ours (full and LISA, target batch a quarter of the train batch), the
published scheme (three separate sweeps, equal batches), and the same passes written by hand
without the library, which shows what the library adds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import record
import torch
from torch.utils.flop_counter import FlopCounterMode

import bilevel
from bilevel.problems.llm_reweight.model import example_losses, tiny_model
from bilevel.problems.llm_reweight.tokens import Batch, Rows, Stratified
from bilevel.solvers.penalty import scalebio


class Weights(bilevel.Problem):
    """Two sources of random tokens and a target, rows of one length."""

    def __init__(self, options: argparse.Namespace, target: int) -> None:
        self.options, self.target = options, target

    def init(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.nn.Module]:
        return torch.zeros(2, dtype=torch.float64), model(self.options)

    def batches(self, generator: torch.Generator) -> tuple[bilevel.Stream, bilevel.Stream]:
        rows = [random_rows(name, self.options) for name in ("a", "b", "target")]
        upper = Stratified(rows[2:], rows=[self.target], seed=0)
        return upper, Stratified(rows[:2], rows=[self.options.rows // 2] * 2, seed=0)

    def lower(self, x: torch.Tensor, y: torch.nn.Module, batch: Batch) -> torch.Tensor:
        weights = x.softmax(0)[batch.source] * batch.share
        return (weights * example_losses(y, batch).double()).sum()

    def upper(self, x: torch.Tensor, y: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return (batch.share * example_losses(y, batch).double()).sum()


def model(options: argparse.Namespace) -> torch.nn.Module:
    return tiny_model(512, layers=options.layers, width=options.width, seed=0)


def random_rows(name: str, options: argparse.Namespace) -> Rows:
    generator = torch.Generator().manual_seed(len(name))
    ids = torch.randint(512, (64, options.length), generator=generator).tolist()
    marks = (False, *[True] * (options.length - 1))
    rows = tuple(map(tuple, ids))
    return Rows(name=name, ids=rows, trained=(marks,) * 64, records=tuple(range(64)))


def ours(options: argparse.Namespace, target: int, memory: bilevel.Memory) -> Callable[[], None]:
    """A bilevel step of the library."""
    problem, solver, launcher = Weights(options, target), scalebio(warmup=0), bilevel.Single()
    state = solver.init(problem, memory, launcher, torch.Generator().manual_seed(0))

    def step() -> None:
        solver.step(problem, launcher, state)

    return step


def by_hand(
    options: argparse.Namespace, memory: bilevel.Memory, passes: list[tuple[str, int]]
) -> Callable[[], None]:
    """Plain torch: a forward and backward for each (model, rows) of `passes`, then AdamW steps."""
    launcher, make = bilevel.Single(), bilevel.optimizer_by_name("adamw", 1e-3)
    copies = {n: launcher.variable(n, model(options), make) for n in {n for n, _ in passes}}
    first = next(iter(copies.values())).value
    active = memory.init(first, torch.Generator().manual_seed(0))
    count = 0
    streams = [
        Stratified([random_rows("a", options)], rows=[rows], seed=i)
        for i, (_, rows) in enumerate(passes)
    ]

    def step() -> None:
        nonlocal count
        active.before_step(count, list(copies.values()))
        for (name, _), stream in zip(passes, streams, strict=True):
            example_losses(copies[name].value, next(stream)).mean().backward()
        for copy in copies.values():
            copy.step()
        count += 1

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    n, quarter = options.rows, options.rows // 4
    full, lisa = bilevel.Full(), bilevel.LISA(gamma=1, period=1)
    cases = {
        "plain full": by_hand(options, full, [("y", n)]),
        "plain LISA": by_hand(options, lisa, [("y", n)]),
        "ours full": ours(options, quarter, full),
        "ours LISA": ours(options, quarter, lisa),
        "by hand full": by_hand(options, full, [("y", quarter), ("y", n), ("z", n)]),
        "by hand LISA": by_hand(options, lisa, [("y", quarter), ("y", n), ("z", n)]),
        "three equal sweeps full": by_hand(options, full, [("y", n), ("y", n), ("z", n)]),
        "three equal sweeps LISA": by_hand(options, lisa, [("y", n), ("y", n), ("z", n)]),
    }
    seconds = measure(cases, options.rounds)
    base = seconds["plain full"]
    rows = [
        {
            "case": name,
            "median ms": 1e3 * statistics.median(times),
            "quartile spread ms": 1e3 * quartile_spread(times),
            "ratio": statistics.median(a / b for a, b in zip(times, base, strict=True)),
            "operations": flops(cases[name]) / flops(cases["plain full"]),
        }
        for name, times in seconds.items()
    ]
    record.write(
        "step_cost",
        "Cost of a step",
        [
            f"{vars(options)}; medians of the interleaved rounds.",
            "Ratio and operations are relative to a plain full step.",
        ],
        rows,
        ["case", "median ms", "quartile spread ms", "ratio", "operations"],
    )


def measure(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round; the cases of a round run one after the other."""
    for step in cases.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, step in cases.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def quartile_spread(times: list[float]) -> float:
    """The distance between the first and third quartile."""
    first, _, third = statistics.quantiles(times, n=4)
    return third - first


def flops(step: Callable[[], None], steps: int = 12) -> float:
    """Mean floating-point operations of a step, counted by torch (matrix products)."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            step()
    return counter.get_total_flops() / steps


if __name__ == "__main__":
    main()
