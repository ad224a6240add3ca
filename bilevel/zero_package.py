"""DeepSpeed itself: whether it is there, how processes join it, and how they leave."""

from __future__ import annotations

import logging
import os
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist

from bilevel import processes

OLDEST = (0, 19, 8)  # the first with managed_gradient_accumulation


def package() -> Any:
    """DeepSpeed, which is not there for everyone, type checkers among them."""
    return import_module("deepspeed")


def package_faults() -> list[str]:
    """Why DeepSpeed cannot be used, as sentences."""
    install = "pip install 'bilevel[deepspeed]'"
    if find_spec("deepspeed") is None:
        return [f"launcher=deepspeed needs the package deepspeed, not installed: {install}."]
    found = metadata.version("deepspeed")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return [f"launcher=deepspeed needs deepspeed {oldest} or newer, found {found}: {install}."]
    return []


def join() -> None:
    """Let DeepSpeed use the processes that are joined already.

    Raises:
        ProcessError: If starter, torch and DeepSpeed count them differently.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed wants without a starter too
    deepspeed = package()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of optimizers of torch
    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:  # on CPUs: compiled for a minute, to add up small tensors faster
        deepspeed.ops.__compatible_ops__[builder.NAME] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    counts = {
        "WORLD_SIZE": processes.expected(),
        "torch.distributed": processes.count(),
        "deepspeed.comm": deepspeed.comm.get_world_size(),
    }
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} ({name})" for name, count in counts.items())
        raise processes.ProcessError(
            f"the number of processes is not clear: {said}; start all with torchrun, and leave "
            "WORLD_SIZE alone."
        )


def leave() -> None:
    """Let DeepSpeed forget the processes, also the groups of them that it keeps."""
    if dist.is_initialized() and package().comm.is_initialized():
        package().comm.destroy_process_group()
