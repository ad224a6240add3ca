"""Cost of one bilevel step against one plain fine-tuning step on the same training tokens.

Run: python benchmarks/step_cost.py   (writes step_cost and step_memory in benchmarks/results/)

Rows, all interleaved in one run on a tiny Llama, CPU time on one thread, medians over the rounds:
plain (full, LISA, LoRA), ours (the same, and LISA with a pool of the top quarter of the blocks and
a frozen embedding, its trunk passed by each copy and once for both; target batch a quarter of the
train batch), the published scheme (three separate sweeps, equal batches), and the same passes
written by hand without the library, which shows what the library adds. Beside them the operations
that torch counts, and those of the passes by arithmetic, below which no order of them gets. Then
peak memory of LoRA twins against one LoRA fine-tune, see `step_memory.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import record
import step_memory
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import bilevel
from bilevel.problems.llm_reweight import footprint
from bilevel.problems.llm_reweight.choices import Choices
from bilevel.problems.llm_reweight.model import example_losses, tiny_model
from bilevel.problems.llm_reweight.operations import pass_flops
from bilevel.problems.llm_reweight.passes import Passes
from bilevel.problems.llm_reweight.shapes import shape
from bilevel.problems.llm_reweight.tokens import Batch, Rows, Stratified
from bilevel.solvers.penalty import scalebio

KERNELS = {  # torch's counter knows the CUDA kernels only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *a, **kw: sdpa_backward_flop_count(g, q, k, v)
    ),
}


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
    names = sorted({name for name, _ in passes})
    y = launcher.variable("y", memory.prepare(model(options), names), make)
    copies = {"y": y} | {name: launcher.twin(y, name, make) for name in names[1:]}
    active = memory.init(y.value, torch.Generator().manual_seed(0))
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
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--peaks", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, quarter = options.rows, options.rows // 4
    full, lisa, lora = bilevel.Full(), bilevel.LISA(gamma=1, period=1), bilevel.LoRA()
    top = replace(lisa, pool=options.layers // 4, pool_from="top", embedding=False)
    cases = {
        "plain full": by_hand(options, full, [("y", n)]),
        "plain LISA": by_hand(options, lisa, [("y", n)]),
        "plain LoRA": by_hand(options, lora, [("y", n)]),
        "ours full": ours(options, quarter, full),
        "ours LISA": ours(options, quarter, lisa),
        "ours LISA, top quarter, trunk passed by each": ours(
            options, quarter, replace(top, trunk=False)
        ),
        "ours LISA, top quarter, trunk passed once": ours(options, quarter, top),
        "ours LoRA": ours(options, quarter, lora),
        "by hand full": by_hand(options, full, [("y", quarter), ("y", n), ("z", n)]),
        "by hand LISA": by_hand(options, lisa, [("y", quarter), ("y", n), ("z", n)]),
        "three equal sweeps full": by_hand(options, full, [("y", n), ("y", n), ("z", n)]),
        "three equal sweeps LISA": by_hand(options, lisa, [("y", n), ("y", n), ("z", n)]),
    }
    seconds = measure(cases, options.rounds)
    base, plain = seconds["plain full"], flops(cases["plain full"])
    lowest = floors(options)
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        rows.append(
            {
                "case": name,
                "median ms": 1e3 * statistics.median(times),
                "quartile spread ms": 1e3 * quartile_spread(times),
                "ratio": statistics.median(ratios),
                "quartile spread of the ratio": quartile_spread(ratios),
                "operations": flops(cases[name]) / plain,
                "by arithmetic": lowest.get(name),
            }
        )
    record.write(
        "step_cost",
        "Cost of a step",
        [
            f"{vars(options)}; CPU time of one thread, medians of the interleaved rounds.",
            "Ratio, operations (that torch counts) and those by arithmetic are relative to a plain "
            "full step.",
        ],
        rows,
        [key for key in rows[0] if key != "quartile spread of the ratio"],
    )
    rows = step_memory.table(options.peaks)
    record.write(
        "step_memory",
        "Peak memory of LoRA twins",
        [
            f"{step_memory.SIZES}, rank 16, AdamW, float32; target batch a quarter; each figure "
            f"from a process of its own, peaks are medians of {options.peaks}.",
            "Tensors: bytes alive at the peak of a step. Before: what the process held when all "
            "was imported and no model was made.",
        ],
        rows,
        list(rows[0]),
        script="step_cost",
    )


def floors(options: argparse.Namespace) -> dict[str, float]:
    """Operations of the passes that a step needs, by arithmetic, in those of a plain full step.

    Of a train batch of n and a target batch of n / 4 rows: y passes both, z the first. The trunk
    passes each row once, forward only, where it is passed once.
    """
    layers, quarter = options.layers, options.layers // 4
    of = replace(shape("tiny", layers=layers, width=options.width), vocabulary=512)
    passes = Passes(rows=options.rows, length=options.length - 1, lower=1, upper=0)
    lisa = Choices(blocks=1, checkpointing=False)
    top = replace(lisa, ends=("head", "norms"), trunk=layers - quarter, once=True)
    kinds = {"full": replace(lisa, blocks=layers), "LISA": lisa}
    kinds |= {"LoRA": Choices(blocks=0, ends=(), rank=16, checkpointing=False)}
    cost = {name: pass_flops(of, made, passes) for name, made in kinds.items()}
    each = 2.25 * pass_flops(of, top, passes)
    found = {f"plain {name}": one for name, one in cost.items()}
    found |= {f"ours {name}": 2.25 * one for name, one in cost.items()}
    found["ours LISA, top quarter, trunk passed by each"] = each
    found["ours LISA, top quarter, trunk passed once"] = each - footprint.trunk_flops(
        of, top, passes
    )
    for name in ("full", "LISA"):
        found[f"by hand {name}"] = found[f"ours {name}"]
        found[f"three equal sweeps {name}"] = 3 * cost[name]
    return {name: one / cost["full"] for name, one in found.items()}


def measure(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each case in each round; the cases of a round run one after the other."""
    for step in cases.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, step in cases.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return seconds


def quartile_spread(times: list[float]) -> float:
    """The distance between the first and third quartile."""
    first, _, third = statistics.quantiles(times, n=4)
    return third - first


def flops(step: Callable[[], None], steps: int = 12) -> float:
    """Mean floating-point operations of a step, counted by torch in its matrix products."""
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        for _ in range(steps):
            step()
    return counter.get_total_flops() / steps


if __name__ == "__main__":
    main()
