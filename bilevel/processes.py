"""Several processes of one run: how they find each other, add up, and notice differences."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel.errors import InputError


class ProcessError(InputError):
    """What one process alone can tell, so that it must say it itself."""


def expected() -> int:
    """How many processes the starter (torchrun, accelerate launch) says there are; 1 without it.

    Raises:
        ProcessError: If what it says is no number.
    """
    return _told("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else _told("RANK", 0)


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else expected()


def connect(*, timeout: float) -> None:
    """Join the other processes that the starter's environment names; alone without a starter.

    Args:
        timeout: Seconds after which a process that waits for another gives up.

    Raises:
        InputError: If the processes cannot be joined.
    """
    if dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        local = _told("LOCAL_RANK", 0)
        if local >= torch.cuda.device_count():
            raise ProcessError(
                f"process {rank()} wants GPU {local}, but there are {torch.cuda.device_count()}; "
                "start no more processes on a machine than it has GPUs."
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    alone: dict[str, Any] = {"rank": 0, "world_size": 1, "store": _store()}
    place = {} if "WORLD_SIZE" in os.environ else alone
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **place)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ProcessError(
            f"the {expected()} processes could not join ({reason}); is the port taken "
            "(torchrun --master-port), and was every process started?"
        ) from None
    atexit.register(disconnect)  # a process that ends without it may abort


def _told(name: str, default: int) -> int:
    """A number that the starter leaves in the environment."""
    word = os.environ.get(name, str(default))
    if not word.isdecimal():
        raise ProcessError(
            f"the environment has {name}={word!r}, expected the number that torchrun or "
            "accelerate launch sets; unset it to run one process."
        )
    return int(word)


def _store() -> Any:
    return vars(dist)["HashStore"]()  # in memory, so no port is taken; unknown to type checkers


def disconnect() -> None:
    """Leave the other processes, if any were joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(numbers: Sequence[float]) -> list[float]:
    """Each number summed over the processes."""
    together = torch.tensor(list(numbers), dtype=torch.float64)
    dist.all_reduce(together)
    return together.tolist()


def add_gradients(leaves: Sequence[Tensor]) -> None:
    """Replace the gradient of every leaf by its sum over the processes, all in one message.

    Args:
        leaves: The same on every process, of one dtype and device. A leaf without a gradient on
            every process keeps none.
    """
    if not leaves:
        return
    has = leaves[0].new_tensor([float(p.grad is not None) for p in leaves])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    *sums, has = summed([*grads, has])
    for leaf, g, any_ in zip(leaves, sums, has.tolist(), strict=True):
        leaf.grad = g if any_ else None


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over the processes of tensors of one dtype and device, all in one message."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t).clone() for part, t in zip(parts, tensors, strict=True)]


def broadcast(text: str) -> str:
    """The text that the first process has."""
    body = text.encode() if rank() == 0 else b""
    size = torch.tensor(len(body))
    dist.broadcast(size, src=0)
    data = torch.zeros(int(size), dtype=torch.uint8)
    if rank() == 0:
        data = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else data
    if size > 0:
        dist.broadcast(data, src=0)
    return bytes(data.tolist()).decode()


def sent(tensor: Tensor) -> Tensor:
    """The tensor that the first process gives; others give one of its shape and type."""
    dist.broadcast(tensor, src=0)
    return tensor


def on_main(function: Callable[[], str], told: Callable[[str], str] = broadcast) -> str:
    """What a function of the first process returns, or the input error it raises, everywhere.

    Args:
        function: Called by that process alone.
        told: Gives every process the text of the first.
    """
    answer: dict[str, Any] = {}
    if rank() == 0:
        try:
            answer = {"text": function()}
        except InputError as error:
            answer = {"faults": error.faults}
    answer = json.loads(told(json.dumps(answer)))
    if "faults" in answer:
        raise InputError(answer["faults"])
    return answer["text"]


def same(what: str, text: str) -> None:
    """Check that all processes hold the same.

    Raises:
        InputError: On every process, if they do not.
    """
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    least, most = torch.tensor(number), torch.tensor(number)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if least != most:
        raise InputError(
            f"{what} differs between the {count()} processes; give all of them the same files, "
            "options and versions."
        )
