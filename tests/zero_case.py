"""One process of a run that tests/test_zero.py starts: DeepSpeed in every form, also resumed."""

import sys
from pathlib import Path

import torch
from processes_case import llm
from safetensors.torch import save_file
from torch import nn

from bilevel import Always, Full, Problem, solve
from bilevel.solvers.penalty import scalebio
from bilevel.zero import DeepSpeed, whole_parameters

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
CASES = {
    "zero2": ({"stage": 2}, "plain", 0),
    "zero3": ({"stage": 3}, "plain", 0),
    "zero2-offload": ({"stage": 2, "offload": True}, "plain", 3),
    "zero3-offload": ({"stage": 3, "offload": True}, "plain", 3),
    "zero2-inner": ({"stage": 2}, "inner", 3),
    "zero3-inner": ({"stage": 3}, "inner", 3),
    "json": ({"config": "ds.json"}, "plain", 3),
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


def branches(launcher, **options):
    """x and y where every pass of a step reaches other parts of y."""
    solver = scalebio(warmup=1, lower_optimizer="sgd", lower_lr=0.1)
    result = solve(Branches(**options), solver, steps=4, launcher=launcher)
    y = [p.flatten() for p in whole_parameters(result.y).values()]
    return result, {"x": result.x, "y": torch.cat(y)}


def run(folder, launcher, solver, micro_batch, **options):
    """The weights, the whole of y, the losses and the bytes of one run."""
    seen = []
    result = solve(
        llm(folder, micro_batch),
        SOLVERS[solver],
        memory=Full(),
        launcher=launcher,
        callbacks=[lambda state, record: seen.append(state)],
        **{"steps": STEPS} | options,
    )
    assert result.success, result.message
    y = [p.flatten() for p in whole_parameters(result.y).values()]
    losses = [[row["upper"], row["lower"]] for row in result.history]
    held = {k: sum(v.memory()[k] for n, v in seen[-1].variables.items() if n != "x") for k in BYTES}
    return {
        "x": result.x,
        "y": torch.cat(y),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "held": torch.tensor([held[k] for k in BYTES]),
    }


BYTES = ("value", "gradient", "optimizer")


RESUMED = {
    "zero2-again": ({"stage": 2}, "kept-2", "plain"),
    "zero3-again": ({"stage": 3}, "kept-3", "plain"),
    "zero3-from-one": ({"stage": 3}, "kept-1", "plain"),
    "zero2-from-3": ({"stage": 2, "offload": True}, "kept-3-too", "plain"),
}
KEPT = 6


def stop_and_resume(folder):
    """Runs that end at step 6 and go on from there, on this engine or another."""
    for stage, kept in ((2, "kept-2"), (3, "kept-3"), (3, "kept-3-too")):
        options = {"steps": KEPT, "checkpoints": folder / kept}
        run(folder, DeepSpeed(stage=stage), "plain", 0, **options)
    for name, (options, kept, solver) in RESUMED.items():
        launcher = DeepSpeed(**options)
        found = run(folder, launcher, solver, 0, checkpoints=folder / kept, resume=True)
        if launcher.is_main:
            save_file(found, folder / f"{name}.safetensors")


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
    stop_and_resume(folder)
    for name, (options, solver, micro_batch) in CASES.items():
        if "config" in options:
            options = {"config": str(folder / options["config"])}
        launcher = DeepSpeed(**options, processes=2)
        found = run(folder, launcher, solver, micro_batch)
        if launcher.is_main:
            save_file(found, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
