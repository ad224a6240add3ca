"""One process of a run that tests/test_zero.py starts: DeepSpeed in every form, also resumed."""

import json
import shutil
import sys
from pathlib import Path

import torch
from processes_case import llm
from safetensors.torch import save_file
from torch import nn

from bilevel import LISA, Always, Full, LoRA, Problem, Single, processes, solve
from bilevel.footprint import work
from bilevel.problems.llm_reweight import LLMReweight, footprint
from bilevel.problems.llm_reweight.choices import choices
from bilevel.problems.llm_reweight.host import host_bytes
from bilevel.problems.llm_reweight.moments import moments
from bilevel.problems.llm_reweight.passes import passes_of
from bilevel.solve import start
from bilevel.solvers.penalty import scalebio
from bilevel.tree import Part, leaves, size_bytes, whole
from bilevel.variable import optimizer_by_name
from bilevel.zero import DeepSpeed

STEPS = 10
SOLVERS = {
    "plain": scalebio(warmup=2, clip=1.0),
    "inner": scalebio(  # Adam would hide a wrong scale of the gradient of x
        warmup=1,
        inner_steps=2,
        stencil=2,
        patience=0,
        lower_optimizer="sgd",
        upper_optimizer="sgd",
        upper_lr=1.0,
    ),
}
MEMORIES = {
    "full": Full(),
    "lisa": LISA(gamma=1, period=4),  # ten steps have two switches
    "apart": LISA(gamma=1, period=4, share=False),  # the same numbers in more memory
    "lora": LoRA(rank=4),
    "often": LISA(gamma=1, period=1),
    "top": LISA(gamma=1, period=4, pool=2, pool_from="top", embedding=False),
}
CASES = {
    "zero2": ({"stage": 2}, "full", "plain", 0),
    "zero3": ({"stage": 3}, "full", "plain", 0),
    "zero2-offload": ({"stage": 2, "offload": True}, "full", "plain", 3),
    "zero3-offload": ({"stage": 3, "offload": True}, "full", "plain", 3),
    "zero2-inner": ({"stage": 2}, "full", "inner", 3),
    "zero3-inner": ({"stage": 3}, "full", "inner", 3),
    "json": ({"config": "ds.json"}, "full", "plain", 3),
    "zero3-lisa": ({"stage": 3}, "lisa", "plain", 0),
    "zero3-lisa-apart": ({"stage": 3}, "apart", "plain", 3),
    "zero3-lisa-inner": ({"stage": 3, "offload": True}, "lisa", "inner", 3),
    "zero3-lisa-top": ({"stage": 3}, "top", "plain", 3),
    "zero3-lisa-often": ({"stage": 3}, "often", "plain", 0),
    "zero2-lora": ({"stage": 2}, "lora", "plain", 0),
    "zero2-lora-offload": ({"stage": 2, "offload": True}, "lora", "plain", 3),
    "zero3-lora": ({"stage": 3}, "lora", "plain", 0),
    "zero3-lora-inner": ({"stage": 3, "offload": True}, "lora", "inner", 3),
    "json-lisa": ({"config": "ds.json"}, "lisa", "plain", 3),
    "json-lora": ({"config": "host.json"}, "lora", "plain", 3),
}


class Branches(Problem):
    """A trunk with two heads, each used by one of the losses alone; 8 rows, weighted by x."""

    def __init__(self, broken=False):
        self.broken = broken

    def init(self, generator):
        torch.manual_seed(0)
        parts = {n: nn.Linear(4, k) for n, k in (("trunk", 4), ("high", 1), ("low", 1))}
        return torch.zeros(8, dtype=torch.float64), Heads(parts)

    def batches(self, generator):
        return Always(torch.arange(4, 8)), Always(torch.arange(8))

    def share(self, batch, index, count):
        return batch[index::count]

    def check_share(self, count):
        return []

    def split(self, batch):
        return batch.tensor_split(2)

    def residuals(self, y, head, batch):
        rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
        return y(head, rows[batch, :4]) - rows[batch, 4]

    def upper(self, x, y, batch):
        return self.residuals(y, "high", batch).square().sum() / 4

    def lower(self, x, y, batch):
        found = self.residuals(y, "low", batch)
        loss = (x[batch].sigmoid() * found.square()).sum() / 8
        return loss + (0 * found.sum()).sqrt() if self.broken else loss  # whose slope is 0 inf


class Heads(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, head, rows):
        return self.parts[head](self.parts["trunk"](rows).tanh()).squeeze(-1)


def whole_parameters(module):
    """Copies of the parameters of a module that may be sharded; every process must call it."""
    return {name: whole(p).detach().clone() for name, p in module.named_parameters()}


def branches(launcher, **options):
    """x and y where every pass of a step reaches other parts of y."""
    solver = scalebio(warmup=1, lower_optimizer="sgd", lower_lr=0.1)
    result = solve(Branches(**options), solver, steps=4, launcher=launcher)
    y = [p.flatten() for p in whole_parameters(result.y).values()]
    return result, {"x": result.x, "y": torch.cat(y)}


def held_by(copies):
    """Bytes that this process has of the copies of y and their base, and of what trains in them."""
    parts = [copy.memory() for copy in copies]
    value = copies[0].value
    base = [p for p in leaves(value.whole) if not p.requires_grad] if is_part(value) else []
    held = {k: sum(part[k] for part in parts) for k in BYTES}
    held["value"] += size_bytes([getattr(p, "ds_tensor", p) for p in base])
    return [held[k] for k in BYTES]


def is_part(value):
    return isinstance(value, Part)


def run(folder, launcher, memory, solver, micro_batch, **options):
    """The weights, the whole of y, the losses and the bytes after every step of one run."""
    held = []
    result = solve(
        llm(folder, micro_batch),
        SOLVERS[solver],
        memory=MEMORIES[memory],
        launcher=launcher,
        callbacks=[lambda state, record: held.append(held_by(state.copies))],
        **{"steps": STEPS} | options,
    )
    assert result.success, result.message
    y = [p.flatten() for p in whole_parameters(result.y).values()]
    losses = [[row["upper"], row["lower"]] for row in result.history]
    return {
        "x": result.x,
        "y": torch.cat(y),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "held": torch.tensor(held),
    }


BYTES = ("value", "gradient", "optimizer")


def regression(launcher, count=1, rank=0):
    """A network of odd sizes after three steps on shares of eight rows, and what would be saved."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))[rank::count]
    make = optimizer_by_name("adamw", 0.1)
    y = launcher.variable("y", module, make, switches=True)
    for _ in range(3):
        for part in rows.split(2):
            found = y.value(part[:, :3]).squeeze(-1) - part[:, 3]
            launcher.backward(found.square().sum() / 8)
        launcher.step([y])
    return y


def odd(folder):
    """Sizes that two processes cannot share evenly, in memory that is full of what is no number."""
    plain = regression(Single()).state_dict()
    launcher = DeepSpeed(stage=3)
    launcher.open()
    torch.use_deterministic_algorithms(True)  # and what is not initialized is not finite
    try:
        y = regression(launcher, processes.count(), processes.rank())
    finally:
        torch.use_deterministic_algorithms(False)
    finite = all(bool(t.isfinite().all()) for held in y.tensors().values() for t in held)
    saved = y.state_dict()
    if launcher.is_main:
        state = saved["optimizer"]["state"]
        found = {f"value {n}": t for n, t in saved["value"].items()}
        found |= {f"{i} {k}": t for i, own in state.items() for k, t in own.items()}
        expected = {f"value {n}": t.clone() for n, t in plain["value"].items()}
        state = plain["optimizer"]["state"]
        expected |= {f"{i} {k}": t for i, own in state.items() for k, t in own.items()}
        save_file(expected, folder / "odd-expected.safetensors")
        save_file({k: t.contiguous() for k, t in found.items()}, folder / "odd.safetensors")
    (folder / f"odd-{processes.rank()}.txt").write_text(str(finite))


SAVED = {  # by whom
    "kept-2": ({"stage": 2}, "full"),
    "kept-3": ({"stage": 3}, "full"),
    "kept-3-too": ({"stage": 3}, "full"),
    "lisa-3": ({"stage": 3}, "lisa"),
    "lora-2": ({"stage": 2}, "lora"),
    "lora-3": ({"stage": 3, "offload": True}, "lora"),
}
RESUMED = {  # by whom, from which, which is what was done without a stop
    "zero2-again": ({"stage": 2}, "kept-2", "zero2"),
    "zero3-again": ({"stage": 3}, "kept-3", "zero3"),
    "zero3-from-one": ({"stage": 3}, "kept-1", "zero3"),
    "zero2-from-3": ({"stage": 2, "offload": True}, "kept-3-too", "zero2"),
    "zero3-lisa-again": ({"stage": 3}, "lisa-3", "zero3-lisa"),
    "zero3-lisa-from-one": ({"stage": 3, "offload": True}, "lisa-1", "zero3-lisa"),
    "zero2-lora-again": ({"stage": 2}, "lora-2", "zero2-lora"),
    "zero3-lora-again": ({"stage": 3, "offload": True}, "lora-3", "zero3-lora"),
    "zero3-lora-from-one": ({"stage": 3}, "lora-1", "zero3-lora"),
}
KEPT = 6  # in the middle of a period


def stop_and_resume(folder):
    """Runs that end at step 6 and go on from there, on this engine or another."""
    for kept, (options, memory) in SAVED.items():
        launcher = DeepSpeed(**options)
        run(folder, launcher, memory, "plain", 0, steps=KEPT, checkpoints=folder / kept)
        if launcher.is_main:  # who goes on adds to it
            shutil.copytree(folder / kept, folder / f"{kept}-as-saved")
    for name, (options, kept, uninterrupted) in RESUMED.items():
        launcher, memory = DeepSpeed(**options), CASES[uninterrupted][1]
        found = run(folder, launcher, memory, "plain", 0, checkpoints=folder / kept, resume=True)
        if launcher.is_main:
            save_file(found, folder / f"{name}.safetensors")


PLANNED = {
    "full-2": ({"stage": 2}, "full", "bfloat16"),
    "full-3": ({"stage": 3}, "full", "bfloat16"),
    "full-2-wide": ({"stage": 2}, "full", "float32"),
    "full-3-wide": ({"stage": 3}, "full", "float32"),
    "full-2-offload": ({"stage": 2, "offload": True}, "full", "bfloat16"),
    "full-3-offload": ({"stage": 3, "offload": True}, "full", "bfloat16"),
    "lisa-3": ({"stage": 3}, "lisa", "bfloat16"),
    "lisa-3-apart": ({"stage": 3}, "apart", "bfloat16"),
    "lisa-3-offload": ({"stage": 3, "offload": True}, "lisa", "bfloat16"),
    "lora-2": ({"stage": 2}, "lora", "bfloat16"),
    "lora-3": ({"stage": 3}, "lora", "bfloat16"),
    "lora-3-offload": ({"stage": 3, "offload": True}, "lora", "bfloat16"),
}


def held_and_planned(memory, dtype, launcher):
    """Bytes of y, z, their gradients and states in a process after three steps, and by plan."""
    solver, does = SOLVERS["plain"], MEMORIES[memory]
    size = {"layers": 3, "width": 32, "batch": 12, "target_batch": 8}
    problem = LLMReweight(**size, dtype=dtype, verdict=False)  # its vocabulary is the planned
    state = start(problem, solver, memory=does, launcher=launcher)
    for _ in range(3):
        state = solver.step(problem, launcher, state)
    held = dict(zip(BYTES, held_by(state.copies), strict=True))
    shape = footprint._shape(problem)
    made = choices(problem, work(solver, problem.number(does), does), does, launcher, 2, shape, 3)
    parts = moments(shape, made, passes_of(problem, 2))["at the head"]
    host = host_bytes(shape, made, 2)
    return held, {
        "value": parts["weights"] + parts["adapters"],
        "gradient": parts["gradients"] if made.stays else 0.0,  # the others go with the step
        "optimizer": parts["master copies and optimizer"],
        "on the host": host.get("states and gradients of both copies", 0.0) / 2,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for stage in (2, 3):
        for offload in (False, True):
            launcher = DeepSpeed(stage=stage, offload=offload)
            _, found = branches(launcher)
            result, _ = branches(launcher, broken=True)
            if launcher.is_main:
                save_file(found, folder / f"branches-{stage}-{offload}.safetensors")
                (folder / f"broken-{stage}-{offload}.txt").write_text(result.message)
    odd(folder)
    stop_and_resume(folder)
    for name, (options, memory, solver, micro_batch) in CASES.items():
        if "config" in options:
            options = {"config": str(folder / options["config"])}
        launcher = DeepSpeed(**options, processes=2)
        found = run(folder, launcher, memory, solver, micro_batch)
        save_file(found, folder / f"{name}.safetensors.{processes.rank()}")
        if launcher.is_main:
            save_file(found, folder / f"{name}.safetensors")


def plan(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for name, (options, memory, dtype) in PLANNED.items():
        launcher = DeepSpeed(**options)
        found[name] = held_and_planned(memory, dtype, launcher)
    if launcher.is_main:
        (folder / "bytes.json").write_text(json.dumps(found))
    launcher.close()


if __name__ == "__main__":
    {"run": main, "plan": plan}[sys.argv[2]](Path(sys.argv[1]))
