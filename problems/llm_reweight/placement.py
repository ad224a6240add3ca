"""How a model computes: where, in which precision, with which attention, how sparingly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from bilevel import InputError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What "auto" stands for on this machine, and whether blocks are computed again in backward."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    attention: Attention = "auto"
    checkpointing: bool = False
    by_engine: bool = False
    """Whether the model stays on the CPU, for an engine to move its shards to `device`."""


def resolve(
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    checkpointing: bool = False,
) -> Placement:
    """The placement of options: a GPU if there is one, and bfloat16 on a GPU that computes in it.

    Raises:
        InputError: If options ask for what this machine does not have, or contradict each other.
    """
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    faults = []
    if where == "cuda" and not torch.cuda.is_available():
        faults.append(
            "problem.device=cuda, but torch finds no such device; install a build of torch for "
            "CUDA and its driver, or use problem.device=auto."
        )
    half = (
        where == "cuda" and not faults and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    number = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and half) else torch.float32
    if attention == "flash_attention_2":
        faults += _no_flash(where, number)
    if faults:
        raise InputError(faults)
    return Placement(device=where, dtype=number, attention=attention, checkpointing=checkpointing)


def place(model: Any, placement: Placement) -> nn.Module:
    """Put a model of transformers where and how it shall compute; returns it.

    Buffers keep their type: the frequencies of rotary positions are float32 in any model, and
    rounded to bfloat16 they turn position 1,000 by up to 1.8 radians too far.

    Raises:
        InputError: If its code cannot do that.
    """
    if placement.by_engine:
        model.home = placement.device
    else:
        model.to(placement.device)
    for p in model.parameters():
        p.data = p.data.to(placement.dtype)
    _set_attention(model, placement)
    if placement.checkpointing:
        _set_checkpointing(model)
    return model


def _no_flash(device: str, dtype: torch.dtype) -> list[str]:
    from transformers.utils.import_utils import is_flash_attn_2_available

    needs = {
        "the package flash-attn": is_flash_attn_2_available(),
        "problem.device=cuda": device == "cuda",
        "problem.dtype=bfloat16": dtype == torch.bfloat16,
    }
    missing = [name for name, there in needs.items() if not there]
    if not missing:
        return []
    return [
        f"problem.attention=flash_attention_2 needs {' and '.join(missing)}; add that, or use "
        "problem.attention=auto."
    ]


def _set_attention(model: Any, placement: Placement) -> None:
    """Set what is asked for; with "auto" flash attention where it works, else the model's own."""
    wanted = placement.attention
    if wanted == "auto" and _no_flash(placement.device, placement.dtype):
        return
    try:
        model.set_attn_implementation("flash_attention_2" if wanted == "auto" else wanted)
    except (ValueError, ImportError) as error:
        if wanted != "auto":
            raise InputError(
                f"problem.attention={wanted} cannot be used with {type(model).__name__} "
                f"({' '.join(str(error).split())[:200]}); use problem.attention=auto."
            ) from None


def _set_checkpointing(model: Any) -> None:
    """Keep only the inputs of each block, with everything random off: both copies see one network.

    Only the modules that hold the switch are put in training mode, without which it has no effect.
    """
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"problem.checkpointing=true cannot be used with {type(model).__name__}, which has no "
            "blocks to compute again; leave it out."
        )
    # renamed within version 5 of transformers, the old name goes in version 6
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    # its hooks let the embedding's output require gradients, which only reentrant checkpoints need:
    # with a frozen embedding the backward pass would not stop at the first block that trains
    model.disable_input_require_grads()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
