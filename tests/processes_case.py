"""One process of a run that tests/test_processes.py starts: every launcher with every memory."""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from bilevel import LISA, Always, Full, Launcher, LoRA, Problem, processes, solve
from bilevel.footprint import work
from bilevel.fsdp import DDP, FSDP2
from bilevel.lora import Adapter
from bilevel.problems.llm_reweight import LLMReweight, footprint
from bilevel.problems.llm_reweight.choices import choices
from bilevel.problems.llm_reweight.moments import moments
from bilevel.problems.llm_reweight.passes import passes_of
from bilevel.solve import start
from bilevel.solvers.penalty import VPBGD, Penalty, RecursivePenalty, scalebio
from bilevel.tree import Part, leaves, local, size_bytes, whole

LAUNCHERS = {"fsdp2": FSDP2(), "ddp": DDP()}
MEMORIES = {"full": Full(), "lisa": LISA(gamma=1, period=4), "lora": LoRA(rank=4)}
MEMORIES["parts"] = LISA(gamma=1, period=4, stepping="parts")
MEMORIES["top"] = LISA(gamma=1, period=4, pool=2, pool_from="top", embedding=False)
SOLVERS = {
    "scalebio": scalebio(warmup=2, clip=1.0),
    "penalty": Penalty(  # Adam would turn rounding of small gradients into whole steps
        inner_steps=2,
        warmup=1,
        prox=1.0,
        penalty=10.0,
        growth=1.02,
        upper_optimizer="sgd",
        upper_lr=0.02,
        lower_lr=0.01,
    ),
    "vpbgd": VPBGD(inner_steps=2, rise=3),
    "recursive": RecursivePenalty(warmup=1),
    "tree": Penalty(inner_steps=3, warmup=1, upper_optimizer="sgd", upper_step="normalized"),
    "tied": scalebio(warmup=1),
    "targets": scalebio(warmup=2, clip=1.0),
    "tree-joint": VPBGD(inner_steps=2, rise=3),
}
CASES = [
    *((launcher, memory, "scalebio", 0) for launcher in LAUNCHERS for memory in MEMORIES),
    ("fsdp2", "full", "scalebio", 3),
    ("fsdp2", "lisa", "scalebio", 2),
    ("ddp", "lisa", "scalebio", 3),
    ("fsdp2", "top", "scalebio", 2),
    ("fsdp2", "lora", "scalebio", 3),
    *(("fsdp2", "full", solver, 0) for solver in ("penalty", "vpbgd", "recursive")),
    *(("ddp", "full", solver, 0) for solver in ("tree", "tree-joint")),
    *(("fsdp2", memory, "tied", 0) for memory in ("full", "lisa")),
    ("fsdp2", "full", "targets", 0),
    ("ddp", "lisa", "targets", 3),
]
STEPS = 10


class Rows(Problem):
    """Weighted least squares with one weight per row, y a dict, all rows in every batch."""

    def init(self, generator):
        y = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
        return torch.zeros(8, dtype=torch.float64), y

    def batches(self, generator):
        return Always(torch.arange(4, 8)), Always(torch.arange(8))

    def share(self, batch, index, count):
        return batch[index::count]

    def check_share(self, count):
        return []

    def residuals(self, y, batch):
        rows = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return rows[batch, :3] @ y["a"] + y["b"] - rows[batch, 4]

    def upper(self, x, y, batch):
        return self.residuals(y, batch).square().sum() / 4

    def lower(self, x, y, batch):
        return (x[batch].sigmoid() * self.residuals(y, batch).square()).sum() / 8


class Tied(Problem):
    """A small Llama in float64 whose embedding is its head."""

    def init(self, generator):
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
        shape |= {"vocab_size": 64, "num_attention_heads": 2}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False, tie_word_embeddings=True))
        return torch.zeros(2, dtype=torch.float64), model.double()

    def batches(self, generator):
        return Always(torch.arange(4)), Always(torch.arange(4))

    def share(self, batch, index, count):
        return batch[index::count]

    def check_share(self, count):
        return []

    def loss(self, y, rows, factor):
        ids = ((torch.arange(24).view(1, 24) + 7 * rows[:, None]) * factor) % 64
        logits = y(input_ids=ids[:, :-1]).logits.flatten(0, 1)
        sums = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        return sums / 92

    def lower(self, x, y, batch):
        return x.softmax(0) @ torch.stack([self.loss(y, batch, 3), self.loss(y, batch, 5)])

    def upper(self, x, y, batch):
        return self.loss(y, batch, 3)


def problem_of(folder: Path, solver: str, micro_batch: int) -> Problem:
    if solver.startswith("tree"):
        return Rows()
    problem = llm(folder, micro_batch)
    if solver == "targets":
        paths = (f"near={folder / 'target.jsonl'}", f"other={folder / 'other.jsonl'}")
        problem = replace(problem, target=paths, target_weight=("other=0.5",))
    return Tied() if solver == "tied" else problem


@cache
def llm(folder: Path, micro_batch: int = 0) -> LLMReweight:
    sources = tuple(str(folder / f"{name}.jsonl") for name in ("good", "fair", "bad"))
    return LLMReweight(
        sources=sources,
        target=str(folder / "target.jsonl"),
        layers=3,
        width=32,
        batch=12,
        target_batch=8,
        micro_batch=micro_batch,
        max_length=24,
        verdict=False,
    )


def run(
    folder: Path, launcher: Launcher, memory: str, solver: str, micro_batch: int
) -> dict[str, torch.Tensor]:
    """The weights, the whole of y, and the losses of one run."""
    result = solve(
        problem_of(folder, solver, micro_batch),
        SOLVERS[solver],
        steps=STEPS,
        memory=MEMORIES[memory],
        launcher=launcher,
    )
    if isinstance(result.y, Adapter):
        name = f"{type(launcher).__name__.lower()}-adapter"
        result.y.save_pretrained(folder / name, main=launcher.is_main)
    everything = result.y.whole if isinstance(result.y, Part) else result.y
    flat = torch.cat([whole(p.detach()).flatten() for p in leaves(result.y)])
    losses = [[row["upper"], row["lower"]] for row in result.history]
    return {
        "x": result.x,
        "y": flat,
        "losses": torch.tensor(losses, dtype=torch.float64),
        "held": torch.tensor(sum(local(p).numel() for p in leaves(everything))),
    }


def held_and_planned(launcher: Launcher) -> dict[str, list[float]]:
    """Bytes of weights, gradients and states of all copies in a process, and those of the plan."""
    solver, found = SOLVERS["scalebio"], {}
    size = {"layers": 3, "width": 32, "batch": 12, "target_batch": 8}
    problem = LLMReweight(**size, dtype="bfloat16", verdict=False)  # its vocabulary is the planned
    for name, memory in MEMORIES.items():
        state = start(problem, solver, memory=memory, launcher=launcher)
        for _ in range(3):
            state = solver.step(problem, launcher, state)
        y = state.copies[0].value
        base = [p for p in leaves(y.whole if isinstance(y, Part) else y) if not p.requires_grad]
        own = sum(sum(copy.memory().values()) for copy in state.copies)
        own += size_bytes(base) if isinstance(y, Part) else 0
        shape = footprint._shape(problem)
        does = work(solver, problem.number(memory), memory)
        made = choices(problem, does, memory, launcher, 2, shape, 3)
        parts = moments(shape, made, passes_of(problem, 2))["at the head"]
        plan = sum(parts[n] for n in ("weights", "adapters", "master copies and optimizer"))
        found[name] = [own, plan]
    return found


def switches(folder: Path, launcher: Launcher) -> list[int]:
    """Bytes of optimizer state of all copies after each of eleven draws of LISA's blocks."""
    problem = replace(llm(folder), layers=6)
    memory, solver = LISA(gamma=1, period=1), SOLVERS["scalebio"]
    state, held = start(problem, solver, memory=memory, launcher=launcher), []
    drawn = set()
    for _ in range(11):
        state = solver.step(problem, launcher, state)
        held.append(sum(copy.memory()["optimizer"] for copy in state.copies))
        drawn |= set(state.memory.active)
    assert len(drawn) > 3
    return held


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for case in CASES:
        launcher = LAUNCHERS[case[0]]
        found = run(folder, launcher, *case[1:])
        if launcher.is_main:
            save_file(found, folder / f"{'-'.join(map(str, case))}.safetensors")
    bytes_ = held_and_planned(LAUNCHERS["fsdp2"])
    if LAUNCHERS["fsdp2"].is_main:
        (folder / "bytes.json").write_text(json.dumps(bytes_))
    held = {name: switches(folder, launcher) for name, launcher in LAUNCHERS.items()}
    (folder / f"switches-{processes.rank()}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
