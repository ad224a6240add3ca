"""Steps of random models with 0.5 to 34 billion parameters on one GPU, against plan and plain ones.

Run: python benchmarks/scale.py   (benchmarks/results/scale.json and .md, saved after every row)

Every row makes a model of a published shape at random on the device, in bfloat16, and takes a few
steps on random tokens: plain fine-tuning, or the bilevel steps of `scalebio` with two copies. The
rows that tell the most come first; the whole takes at most nine minutes. What cannot run says why.
`python benchmarks/scale.py --device cpu --shapes tiny --results build` tries the code on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch

import bilevel
from bilevel.cards import CARDS, Card
from bilevel.footprint import Footprint, work
from bilevel.problems.llm_reweight import LLMReweight
from bilevel.problems.llm_reweight.placement import Placement, place
from bilevel.problems.llm_reweight.shapes import config
from bilevel.problems.llm_reweight.tokens import Batch
from bilevel.solvers.penalty import scalebio

LENGTH = 1025
"""Tokens of a row, of which all but the last are predicted from."""
SOURCES = 2
SHAPES = {
    "tiny": LLMReweight(model="tiny", max_length=33, batch=4, target_batch=2, micro_batch=2),
    "0.5B": LLMReweight(
        model="qwen-2.5-0.5b", max_length=LENGTH, batch=8, target_batch=2, micro_batch=2
    ),
    "3B": LLMReweight(
        model="llama-3.2-3b", max_length=LENGTH, batch=8, target_batch=2, micro_batch=2
    ),
    "8B": LLMReweight(
        model="llama-3-8b", max_length=LENGTH, batch=8, target_batch=2, micro_batch=2
    ),
    "34B": LLMReweight(model="yi-34b", max_length=LENGTH, batch=4, target_batch=1, micro_batch=2),
}
MEMORIES = {
    "full": bilevel.Full(),
    "lisa 1": bilevel.LISA(gamma=1, period=3),  # a switch among the timed steps
    "lisa 2": bilevel.LISA(gamma=2, period=3),
    "lora 16": bilevel.LoRA(rank=16),
    "states 1": bilevel.LISA(gamma=1, period=3, offload="states"),
    "idle 4": bilevel.LISA(gamma=4, period=3, offload="idle"),
}
PLAIN = ("full", "lisa 1", "lora 16")
FIRST = (
    *("0.5B lora 16", "0.5B lisa 1", "0.5B full", "8B lisa 1", "8B lora 16", "34B lora 16"),
    *("34B states 1", "34B lisa 1", "8B states 1", "3B lisa 1", "3B lora 16", "3B full"),
)
"""Shapes and memories whose rows are run before all others, in this order, should time run out."""
WARM_UP, STEPS, LEAST = 2, 5, 3
"""Steps before the timed ones, timed steps, and how many of these are enough."""
SOLVER = scalebio(warmup=0, lower_lr=1e-5)
ON_HOST = ("what is away from the device, pinned", "libraries")
"""The parts of a plan that a row takes in host memory: nothing is loaded or saved."""
COLUMNS = ["case", "parameters", "train", "planned GB", "measured GB", "measured / planned"]
COLUMNS += ["seconds", "MFU", *(f"x plain {memory}" for memory in PLAIN), "outcome"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row."""

    shape: str
    memory: str
    plain: bool
    """Whether it is fine-tuning of one copy, for comparison."""

    @property
    def name(self) -> str:
        return f"{self.shape} {'plain' if self.plain else 'bilevel'} {self.memory}"

    @property
    def problem(self) -> LLMReweight:
        """The options of the losses: checkpointed, the loss in chunks of their default size."""
        return dataclasses.replace(SHAPES[self.shape], dtype="bfloat16", checkpointing=True)

    def footprint(self, **changes: Any) -> Footprint:
        """The plan of a step."""
        problem = dataclasses.replace(self.problem, **changes)
        memory = MEMORIES[self.memory]
        does = work(SOLVER, problem.number(memory), memory)
        if self.plain:
            does = dataclasses.replace(does, copies=1, upper=0, lower=1)
        return problem.footprint(does, memory, bilevel.Single(), 1, WARM_UP + STEPS)

    @property
    def operations(self) -> float:
        """Operations of a step, without those that checkpoints and chunks of the loss repeat."""
        return self.footprint(checkpointing=False, loss_chunk=2**40).flops


CASES = [
    Case(shape=shape, memory=memory, plain=plain)
    for shape in SHAPES
    for plain in (True, False)
    for memory in (PLAIN if plain else MEMORIES)
]


def urgency(case: Case) -> tuple[int, bool]:
    """What sorts cases as they are run; of equals the plain one first, for comparison."""
    label = f"{case.shape} {case.memory}"
    return FIRST.index(label) if label in FIRST else len(FIRST), not case.plain


@dataclass(frozen=True, kw_only=True)
class Stage(bilevel.Problem):
    """The losses of a data-weighting problem on random tokens, with a random model."""

    losses: Any = None
    """An `LLMReweight`, of which no data is read."""
    device: str = "cpu"

    def init(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.nn.Module]:
        return torch.zeros(SOURCES, dtype=torch.float64), random_model(self.losses, self.device)

    def upper(self, x: torch.Tensor, y: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self.losses.upper(x, y, batch)

    def lower(self, x: torch.Tensor, y: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self.losses.lower(x, y, batch)

    def split(self, batch: Batch) -> Sequence[Batch]:
        return self.losses.split(batch)

    def batches(self, generator: torch.Generator) -> tuple[bilevel.Stream, bilevel.Stream]:
        upper = self._rows(self.losses.target_batch, 1, generator)
        return bilevel.Always(upper), bilevel.Always(
            self._rows(self.losses.batch, SOURCES, generator)
        )

    def _rows(self, count: int, sources: int, generator: torch.Generator) -> Batch:
        entries = config(self.losses.model).vocab_size
        ids = torch.randint(entries, (count, self.losses.max_length), generator=generator)
        return Batch(
            ids=ids,
            trained=torch.ones_like(ids, dtype=torch.bool),
            source=torch.arange(count) % sources,
            share=torch.full((count,), sources / count, dtype=torch.float64),
            labels=("random",) * count,
        )


def random_model(problem: LLMReweight, device: str) -> torch.nn.Module:
    """A model of that shape, made on the device in bfloat16; its buffers are those of any other."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)  # transformers draws from the generator of the device
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(problem.model), dtype=torch.bfloat16)
    options = {"device": device, "dtype": torch.bfloat16, "checkpointing": problem.checkpointing}
    return place(model.eval(), Placement(**options))


def bilevel_step(stage: Stage, memory: bilevel.Memory) -> Callable[[], None]:
    """A step of the solver on two copies."""
    launcher = bilevel.Single()
    state = SOLVER.init(stage, memory, launcher, torch.Generator().manual_seed(0))

    def step() -> None:
        SOLVER.step(stage, launcher, state)

    return step


def plain_step(stage: Stage, memory: bilevel.Memory) -> Callable[[], None]:
    """A step of AdamW on one copy and the same training rows, by the same memory strategy."""
    generator, launcher = torch.Generator().manual_seed(0), bilevel.Single()
    x, model = stage.init(generator)
    value = memory.prepare(model, ["y"])
    make = bilevel.optimizer_by_name(SOLVER.lower_optimizer, SOLVER.lower_lr)
    y = launcher.variable("y", value, memory.optimizer(make, generator))
    active = memory.init(value, generator)
    _, rows = stage.batches(generator)
    count = 0

    def step() -> None:
        nonlocal count
        active.before_step(count, [y])
        for part in stage.split(next(rows)):
            launcher.backward(stage.lower(x, y.value, part))
        launcher.step([y])
        count += 1

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows that were asked for; returns 0, or 1 if one has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=[*SHAPES][1:])
    parser.add_argument("--only", default="", help="text that the name of a row must have")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all rows")
    parser.add_argument("--row-seconds", type=float, default=200.0, help="for one row")
    parser.add_argument("--host", type=float, default=110.0, help="GB of host memory for a row")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder")
    options = parser.parse_args(arguments)
    # read when the device is first used; without it what is freed cannot serve larger tensors
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    cases = [c for c in CASES if c.shape in options.shapes and options.only in c.name]
    names = [case.name for case in cases]
    begun = time.monotonic()
    end = begun + options.seconds
    rows: list[dict[str, Any]] = []
    for case in sorted(cases, key=urgency):
        left = min(options.row_seconds, end - time.monotonic())
        rows.append(attempt(case, options.device, left, host=options.host * 1e9))
        compare(rows)
        shown = sorted(rows, key=lambda row: names.index(row["case"]))
        text = record.save("scale", *described(shown), COLUMNS, folder=options.results)
        now = time.monotonic() - begun
        print(f"{now:.0f} s, {case.name}: {rows[-1]['outcome']}", flush=True)
    print(text if rows else "no such row")
    return int(any(row["outcome"].startswith("failed") for row in rows))


def described(rows: list[dict[str, Any]]) -> tuple[str, list[str], list[dict[str, Any]]]:
    """Title, notes and rows of the results."""
    notes = [
        "Random weights in bfloat16 with float32 masters, random tokens, checkpoints in every "
        "block; medians of the steps after two.",
        "GB are 1e9 bytes at the peak of a step: measured by torch.cuda.max_memory_allocated, "
        "planned by bilevel.plan without its allowance for context and slack.",
        "MFU counts what a step needs, nothing that checkpoints compute again, against the dense "
        "bfloat16 operations of the card's data sheet. Parameters and what of them trains in one "
        "copy are in billions.",
        "x plain: seconds over those of a step of AdamW on one copy and the same training rows. "
        "LISA draws anew every third step; the plan is that of step "
        f"{WARM_UP + STEPS}.",
    ]
    return "Scale", notes, rows


def attempt(case: Case, device: str, seconds: float, *, host: float = math.inf) -> dict[str, Any]:
    """The row of a case, run if it can be."""
    try:
        plan = case.footprint()
    except bilevel.InputError as error:  # fewer blocks than are to train at a time
        return {"case": case.name, "outcome": f"not run: {error}"}
    slack = plan.moments[plan.peak]["context and slack"]
    row: dict[str, Any] = {
        "case": case.name,
        "parameters": sum(plan.parameters.values()) / 1e9,
        "train": plan.trained / 1e9,
        "planned GB": (plan.total - slack) / 1e9,
    }
    if reason := obstacle(case, plan, device, seconds, host=host):
        return row | {"outcome": f"not run: {reason}"}
    try:
        with limited(seconds):
            found = measured(case, device, time.monotonic() + seconds / 2)
    except Exception as error:  # whatever a row raises, the others go on
        first = (str(error).splitlines() or [""])[0]
        return row | {"outcome": f"failed: {type(error).__name__}: {first[:200]}"}
    finally:
        gc.collect()
        if device == "cuda":
            give_back()
    if "measured GB" in found:
        found["measured / planned"] = found["measured GB"] / row["planned GB"]
    if device == "cuda" and (card := card_here()):
        found["MFU"] = case.operations / found["seconds"] / card.flops
        found["card"] = card.name
    return row | found | {"outcome": "run"}


def obstacle(
    case: Case, plan: Footprint, device: str, seconds: float, *, host: float = math.inf
) -> str:
    """Why a case cannot run on so many bytes of host memory; empty if it can."""
    if device == "cpu":
        return "" if case.shape == "tiny" else "needs a GPU, and --device=cpu was asked for"
    if not torch.cuda.is_available():
        return "no GPU"
    there = torch.cuda.get_device_properties(0).total_memory
    if plan.total > there:
        return f"needs {plan.total / 1e9:.1f} GB by plan, and the card has {there / 1e9:.1f}"
    pinned = sum(plan.host.get(part, 0.0) for part in ON_HOST)
    if pinned > host:
        return f"needs {pinned / 1e9:.1f} GB of host memory by plan, and may take {host / 1e9:.1f}"
    return "" if seconds > 0 else "the time was over"


def give_back() -> None:
    """Free what torch's allocators keep, pinned memory too, which would add up from row to row."""
    torch.cuda.empty_cache()
    newer = getattr(torch.accelerator, "empty_host_cache", None)  # from torch 2.12 on
    (newer or vars(torch._C)["_host_emptyCache"])()


def measured(case: Case, device: str, end: float) -> dict[str, Any]:
    """Seconds of a step and bytes at its peak; no further step is begun after `end`."""
    stage = Stage(losses=case.problem, device=device)
    make = plain_step if case.plain else bilevel_step
    step = make(stage, MEMORIES[case.memory])
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(WARM_UP):
        step()
    wait()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < STEPS and (len(times) < LEAST or time.monotonic() < end):
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    found: dict[str, Any] = {"seconds": statistics.median(times), "times": times}
    if device == "cuda":
        found["measured GB"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def card_here() -> Card | None:
    """The card of `bilevel.cards` that this is, None if it is none of these."""
    name = torch.cuda.get_device_name().lower()
    words = name.replace("-", " ").split()
    if "a100" in words:
        large = torch.cuda.get_device_properties(0).total_memory > 60e9
        return CARDS["a100-80" if large else "a100-40"]
    if "pcie" in words or "nvl" in words:  # fewer operations than the cards of that name there
        return None
    return next((CARDS[word] for word in words if word in CARDS), None)


def compare(rows: list[dict[str, Any]]) -> None:
    """Enter in the last row its ratios to the plain rows of its shape, where both were run."""
    last = rows[-1]
    shape = last["case"].partition(" ")[0]
    for memory in PLAIN:
        base = next((r for r in rows if r["case"] == f"{shape} plain {memory}"), {})
        if "seconds" in last and "seconds" in base:
            last[f"x plain {memory}"] = last["seconds"] / base["seconds"]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Within the block TimeoutError is raised after so many seconds, between two operations."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
