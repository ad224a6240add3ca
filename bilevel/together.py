"""What all launchers of several processes do alike: share out, add up, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bilevel import processes
from bilevel.launch import Launcher
from bilevel.memory import Memory
from bilevel.problem import Problem


class Together(Launcher):
    """Several processes that each work on a share of every batch; losses are shares of a sum."""

    def parts(self, problem: Problem, batch: Any) -> Sequence[Any]:
        own = batch
        if self.world_size > 1:
            own = problem.share(batch, processes.rank(), self.world_size)
        return problem.split(own)

    def total(self, numbers: Sequence[float]) -> list[float]:
        return processes.total(numbers)

    def told(self, text: str) -> str:
        return processes.broadcast(text)

    @property
    def world_size(self) -> int:
        return processes.count()

    @property
    def is_main(self) -> bool:
        return processes.rank() == 0


def engine_faults(name: str, *, order: int, parallel: bool, constrained: bool) -> list[str]:
    """What no engine of several processes can do, as sentences about the launcher `name`."""
    faults = []
    if order > 1:
        faults.append(
            f"launcher={name} cannot run a solver that takes second derivatives, which do not "
            "pass through sharded modules; use launcher=single, or a first-order solver such "
            "as penalty."
        )
    elif not parallel:
        faults.append(
            f"launcher={name} needs a solver that gathers all gradients through its launcher; "
            "use one of the penalty family, or launcher=single."
        )
    if constrained:
        faults.append(f"launcher={name} cannot project a lower variable; use launcher=single.")
    return faults


def four_bit_faults(name: str, memory: Memory) -> list[str]:
    """Why the launcher `name` cannot hold what a strategy quantizes."""
    if getattr(memory, "quantization", "none") == "none":
        return []
    return [
        f"launcher={name} shares out numbers, not layers of four bits; use launcher=single, or "
        "leave memory.quantization out."
    ]


def process_faults(problem: Problem, wanted: int) -> list[str]:
    """Why the processes that were started are not those wanted, or cannot share out batches.

    Args:
        problem: Whose batches they are.
        wanted: launcher.processes; 0 takes any number.
    """
    count = processes.expected()
    faults = []
    if wanted not in (0, count):
        faults.append(
            f"launcher.processes={wanted}, but {count} were started; start them with "
            "torchrun --nproc-per-node (accelerate launch starts only one on a machine "
            "without GPU)."
        )
    return faults + (problem.check_share(count) if count > 1 else [])


def option_faults(processes: int, timeout: float) -> list[str]:
    """What is wrong with the options of every launcher of several processes."""
    faults = []
    if processes < 0:
        faults.append(f"launcher.processes must be non-negative, got {processes}.")
    if not 0 < timeout < math.inf:
        faults.append(f"launcher.timeout must be positive and finite, got {timeout}.")
    return faults
