"""The user's own DeepSpeed JSON made into what an engine gets; contradictions are named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from bilevel.errors import InputError
from bilevel.problem import Problem
from bilevel.variable import optimizer_by_name

AUTO = "auto"

BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

REFUSED = {
    "amp": "computes in other numbers than problem.dtype says; use bf16",
    "torch_autocast": "computes in other numbers than problem.dtype says; use bf16",
    "compression_training": "changes the model while it trains",
    "progressive_layer_drop": "makes losses random, so that copies of y see different ones",
    "data_efficiency": "chooses the data, which is what is being learned",
    "curriculum_learning": "chooses the data, which is what is being learned",
    "elasticity": "changes the number of processes while training",
    "tensor_parallel": "splits layers over processes that here share out the rows",
    "zero_optimization.zenflow": "takes the steps of a part of the parameters later",
    "zero_optimization.zero_quantized_weights": "rounds what is gathered",
    "zero_optimization.zero_quantized_gradients": "rounds gradients",
}
"""Parts of a config that cannot be switched on, and why."""

BUCKET = 500_000_000
"""Numbers of the buffer in which every engine gathers gradients, where a config is silent."""

FIXED: dict[str, Any] = {
    "managed_gradient_accumulation": False,  # a step of ours may have any number of passes
    "zero_force_ds_cpu_optimizer": False,  # the optimizer is torch's, offloaded or not
}
"""What the engine needs to have; the config may say the same or nothing."""


def read(path: str) -> dict[str, Any]:
    """The config in a JSON file; without a path, what `accelerate launch` was given, if anything.

    Raises:
        InputError: If it cannot be read, or is not an object, or there are two.
    """
    started = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if path and started and Path(path).resolve() != Path(started).resolve():
        raise InputError(
            f"launcher.config={path}, but accelerate launch was given {started}; leave one out."
        )
    path = path or started
    if not path:
        return _accelerate(os.environ)
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"launcher.config={path} cannot be read: {error}.") from None
    if not isinstance(body, dict):
        raise InputError(
            f"launcher.config={path} must hold a JSON object, got {type(body).__name__}."
        )
    return body


def stage_of(config: dict[str, Any], wanted: int) -> int:
    """The stage of a config, or the one that is wanted where it does not say; 3 if neither does."""
    found = _section(config, "zero_optimization").get("stage", AUTO)
    return found if found in (2, 3) else wanted or 3


def contradictions(
    config: dict[str, Any],
    problem: Problem,
    *,
    stage: int,
    offload: bool,
    options: Mapping[str, Any],
    count: int,
) -> list[str]:
    """Sentences on each value of a config that says another thing than the options of the run.

    Args:
        config: As read.
        problem: Whose batches are trained on.
        stage: launcher.stage.
        offload: launcher.offload.
        options: The solver's, by name.
        count: Processes.
    """
    zero = _section(config, "zero_optimization")
    faults = _batches(config, problem, count)
    faults += _optimizer(_section(config, "optimizer"), options)
    faults += _scheduler(_section(config, "scheduler"))
    clip = config.get("gradient_clipping", AUTO)
    if clip not in (AUTO, options.get("clip", 0.0)):
        faults.append(_two("gradient_clipping", clip, f"solver.clip={options.get('clip', 0.0)}"))
    faults += _sharding(zero, stage, offload)
    faults += [
        f"launcher.config has {key}={_at(config, key)}, expected {value}; leave it out."
        for key, value in FIXED.items()
        if _at(config, key) not in (None, AUTO, value)
    ]
    faults += [
        f"launcher.config switches {key} on, which {why}; leave it out."
        for key, why in REFUSED.items()
        if _is_on(_at(config, key))
    ]
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return faults + numbers(config, known.get(getattr(problem, "dtype", "")))


def numbers(config: dict[str, Any], dtype: torch.dtype | None) -> list[str]:
    """Sentences on what a config says of the numbers of parameters.

    Args:
        config: As read.
        dtype: Of the parameters, None before they are there.
    """
    faults = []
    if _section(config, "fp16").get("enabled", AUTO) not in (AUTO, False):
        faults.append(
            "launcher.config has fp16.enabled=true, whose loss scale skips steps of y but not of "
            "x; use bf16."
        )
    if dtype is None:
        return faults
    own = str(dtype).removeprefix("torch.")
    if dtype not in (torch.float32, torch.bfloat16):
        faults.append(
            f"launcher=deepspeed trains float32 or bfloat16, got {own}; set problem.dtype."
        )
    wanted = _section(config, "bf16").get("enabled", AUTO)
    if wanted not in (AUTO, dtype == torch.bfloat16):
        faults.append(_two("bf16.enabled", wanted, f"problem.dtype={own}"))
    return faults


def filled(
    config: dict[str, Any],
    *,
    stage: int,
    offload: bool,
    dtype: torch.dtype,
    width: int | None,
    most: int,
) -> dict[str, Any]:
    """What an engine gets: the config with our values where it says "auto", or nothing.

    "auto" is what accelerate makes of it: the sizes of buckets follow the width of the model.

    Args:
        config: As read, without contradictions.
        stage: launcher.stage.
        offload: launcher.offload.
        dtype: Of the parameters.
        width: Of the model, None if it does not tell.
        most: Numbers that train, more than which no buffer of gradients needs.

    Raises:
        InputError: If an "auto" is left that stands for nothing we know.
    """
    settled = stage_of(config, stage)
    own = deepcopy(
        {k: v for k, v in config.items() if k not in ("optimizer", "scheduler", *BATCHES)}
    )
    own |= FIXED | {"zero_allow_untested_optimizer": True}
    own |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    own["gradient_clipping"] = 0.0  # silent, DeepSpeed clips at 1.0 (its pull request 8068)
    own["bf16"] = _section(own, "bf16") | {"enabled": dtype == torch.bfloat16}
    if dtype == torch.bfloat16:
        own["bf16"]["check_grad_overflow"] = True  # else it steps along gradients not finite
    own["fp16"] = {"enabled": False}
    own.setdefault("steps_per_print", 2**31)
    zero = own["zero_optimization"] = dict(_section(own, "zero_optimization"))
    zero["stage"] = settled
    if offload:
        zero["offload_optimizer"] = _section(zero, "offload_optimizer") | {"device": "cpu"}
    _set_buckets(zero, width, most)
    for key in ("steps_per_print", "communication_data_type"):
        if own.get(key) == AUTO:
            del own[key]
    left = [path for path, value in _walk(own) if value == AUTO]
    if left:
        raise InputError(
            f'launcher.config has "auto" for {", ".join(left)}, which nothing here decides; write '
            "a value, or leave it out."
        )
    return own


def _set_buckets(zero: dict[str, Any], width: int | None, most: int) -> None:
    """The sizes of buckets that are "auto", for a model of this width with so many numbers."""
    sizes = {
        "reduce_bucket_size": 1.0,
        "stage3_prefetch_bucket_size": 0.9,
        "stage3_param_persistence_threshold": 10.0 / (width or 1),
    }
    for key, share in sizes.items():
        if zero.get(key) == AUTO:
            del zero[key]
            if width:
                zero[key] = int(share * width * width)
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", BUCKET)), most)


def _accelerate(env: Mapping[str, str]) -> dict[str, Any]:
    """What accelerate's own YAML says of DeepSpeed, as `accelerate launch` hands it on."""
    if env.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return {}
    said = {
        part: env.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE", "none")
        for part in ("offload_optimizer", "offload_param")
    }
    zero: dict[str, Any] = {k: {"device": device} for k, device in said.items() if device != "none"}
    zero["stage"] = int(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")) or AUTO
    clip = env.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    numbers = env.get("ACCELERATE_MIXED_PRECISION", "no")
    return {
        "zero_optimization": zero,
        "gradient_clipping": AUTO if clip == "none" else float(clip),
        **({numbers: {"enabled": True}} if numbers in ("bf16", "fp16") else {}),
    }


def _sharding(zero: dict[str, Any], stage: int, offload: bool) -> list[str]:
    """What stage and offload of a config contradict, given those of the launcher."""
    faults = []
    wanted = zero.get("stage", AUTO)
    if wanted != AUTO and stage and wanted != stage:
        faults.append(_two("zero_optimization.stage", wanted, f"launcher.stage={stage}"))
    elif wanted not in (AUTO, 2, 3):
        faults.append(
            f"launcher.config has zero_optimization.stage={wanted}, expected 2 or 3; use "
            "launcher=ddp where nothing is to be sharded."
        )
    for part in ("offload_optimizer", "offload_param"):
        device = _section(zero, part).get("device", "none")
        if device == "nvme":
            faults.append(
                f"launcher.config has zero_optimization.{part}.device=nvme, which cannot be saved "
                "in checkpoints; use cpu."
            )
    device = _section(zero, "offload_optimizer").get("device", AUTO)
    if offload and device not in (AUTO, "cpu"):
        key = "zero_optimization.offload_optimizer.device"
        faults.append(_two(key, device, "launcher.offload=true"))
    return faults


def _batches(config: dict[str, Any], problem: Problem, count: int) -> list[str]:
    given = {key: config[key] for key in BATCHES if config.get(key, AUTO) != AUTO}
    if not given:
        return []
    own = (
        {f.name: getattr(problem, f.name) for f in fields(problem)} if is_dataclass(problem) else {}
    )
    if not isinstance(own.get("batch"), int):
        return [
            f"launcher.config has {key}={value}, but {type(problem).__name__} has no batch of "
            'rows to compare it with; write "auto".'
            for key, value in given.items()
        ]
    rows = own["batch"] // count
    micro = min(own.get("micro_batch") or rows, rows)
    ours: dict[str, int] = dict(
        zip(BATCHES, (own["batch"], micro, -(-rows // max(micro, 1))), strict=True)
    )
    said = f"problem.batch={own['batch']}, problem.micro_batch={own.get('micro_batch', 0)}"
    return [
        _two(key, value, f"{said} and {count} processes, which make it {ours[key]}")
        for key, value in given.items()
        if value != ours[key]
    ]


def _optimizer(section: dict[str, Any], options: Mapping[str, Any]) -> list[str]:
    """The optimizer is made by us; a config may say the same of it."""
    name, lr = options.get("lower_optimizer"), options.get("lower_lr")
    if not section or name is None or lr is None:
        return []
    kind = section.get("type", AUTO)
    if str(kind).lower() not in (AUTO, name.lower()):
        return [_two("optimizer.type", kind, f"solver.lower_optimizer={name}")]
    ours = optimizer_by_name(name, lr)([torch.zeros(1, requires_grad=True)]).defaults
    known = ours | {"torch_adam": True, "adam_w_mode": name.lower() == "adamw"}
    faults = []
    for key, value in _section(section, "params").items():
        if value == AUTO:
            continue
        own = known.get(key)
        same = tuple(value) == tuple(own or ()) if isinstance(value, list) else value == own
        if not same:
            said = f"solver.lower_lr={lr}" if key == "lr" else f"solver.lower_optimizer={name}"
            more = "" if key == "lr" else f", which steps with {key}={own}"
            faults.append(_two(f"optimizer.params.{key}", value, said + more))
    return faults


def _scheduler(section: dict[str, Any]) -> list[str]:
    """Steps of y have one size; a warm-up that is all "auto" says no other."""
    plain = section.get("type", "WarmupLR") == "WarmupLR"
    if plain and all(value == AUTO for value in _section(section, "params").values()):
        return []
    return [
        f"launcher.config has scheduler {section.get('type')}, but solver.lower_lr is the step "
        "size of every step; leave it out."
    ]


def _two(key: str, value: Any, other: str) -> str:
    return (
        f'launcher.config has {key}={value}, but the run has {other}; write "auto" or change one.'
    )


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def _at(config: dict[str, Any], path: str) -> Any:
    *outer, last = path.split(".")
    for key in outer:
        config = _section(config, key)
    return config.get(last)


def _is_on(value: Any) -> bool:
    return bool(value.get("enabled", True)) if isinstance(value, dict) else bool(value)


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}" if path else key)
    else:
        yield path, value
