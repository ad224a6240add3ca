"""How a launcher shares out what a step needs among devices, and what buffers that takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bilevel import InputError, Launcher, Memory, Single, zero_config
from bilevel.fsdp import DDP, FSDP2
from bilevel.problems.llm_reweight.shapes import Shape
from bilevel.zero import DeepSpeed, memory_faults

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.choices import Choices

WIDE = 4
"""Bytes of a number in float32, in which losses, norms and reductions are computed."""
GROUP = 1e9
"""Numbers on a device that ZeRO-3 steps at a time, where a config is silent (`sub_group_size`)."""
LIVE = 1e9
"""Numbers that ZeRO-3 keeps gathered, where a config is silent (`stage3_max_live_parameters`)."""


def launched(
    made: Choices, launcher: Launcher, memory: Memory, devices: int, of: Shape | None
) -> Choices:
    """The choices for one device, with what the launcher adds to them.

    Raises:
        InputError: If the launcher is not known here, or cannot run this.
    """
    kind = type(launcher)  # not isinstance: what extends a launcher may need more
    if kind is Single and devices > 1:
        raise InputError(
            f"launcher=single uses one device, got devices={devices}; use launcher=fsdp2, or "
            "devices=1."
        )
    if kind is Single:
        return made
    if isinstance(launcher, DDP | FSDP2) and kind in (DDP, FSDP2):
        apart = not of.tied if of else True
        made = replace(made, ends_apart=apart, deferred=not launcher.reduces, by_parts=True)
    if kind is DDP:
        return replace(made, buffered=1)
    if kind is FSDP2:
        made = replace(made, gathers=True, buffered=2, weight_shards=devices)
        return replace(made, **_shards(devices))
    if kind is DeepSpeed and isinstance(launcher, DeepSpeed):
        return _deepspeed(made, launcher, memory, devices, of)
    raise InputError(f"launcher={kind.__name__.lower()} cannot be planned yet.")


def _deepspeed(
    made: Choices, launcher: DeepSpeed, memory: Memory, devices: int, of: Shape | None
) -> Choices:
    config = zero_config.read(launcher.config)
    stage = zero_config.stage_of(config, launcher.stage)
    if faults := memory_faults(memory, stage):
        raise InputError(faults)
    wide = made.gradient == WIDE
    settled = zero_config.filled(
        config,
        stage=launcher.stage,
        offload=launcher.offload,
        dtype=torch.float32 if wide else torch.bfloat16,
        width=of.width if of else None,
        most=made.trained(of) if of else 1,
    )
    zero = settled["zero_optimization"]
    made = replace(
        made,
        **_shards(devices),
        weight_shards=devices if stage == 3 else 1,
        gathers=stage == 3,
        weights_on_host=stage == 3 and _is_on_host(zero, "offload_param"),
        states_on_host=_is_on_host(zero, "offload_optimizer"),
        saved_whole=True,
    )
    if of is None:
        return made
    apart = made.bases == 1 and not made.rank  # copies share blocks, each gathered by itself
    live = min(of.total, zero.get("stage3_max_live_parameters", LIVE))
    made = replace(made, gathered=of.block + of.embedding if apart else live)
    if stage == 3 and (memory.switches or made.rank):  # on the shards of every parameter
        return replace(made, reduced=made.largest(of))
    twice = stage == 2 and zero.get("overlap_comm") is True
    return replace(
        made,
        masters=WIDE * wide,
        buckets=made.learners * zero["reduce_bucket_size"] * made.gradient * (1 + twice),
        stays=stage == 3,
        apart=True,
        stepped=zero.get("sub_group_size", GROUP) if stage == 3 else 0.0,
        reduced=made.largest(of),
    )


def _shards(devices: int) -> dict[str, Any]:
    return {"gradient_shards": devices, "state_shards": devices}


def _is_on_host(zero: dict[str, Any], part: str) -> bool:
    return zero.get(part, {}).get("device") == "cpu"
