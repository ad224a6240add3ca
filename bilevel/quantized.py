"""Frozen linear layers in four bits, held and multiplied by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from bilevel.errors import InputError

Quantization = Literal["none", "nf4", "fp4"]

BLOCK = 64
"""Numbers in a row with one scale."""
BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * 256)
"""Of a number: four bits, a byte of scale for 64 of them, a float32 scale for 256 such bytes."""


def missing(kind: Quantization) -> list[str]:
    """Why linear layers cannot be quantized here, as sentences."""
    if kind == "none" or find_spec("bitsandbytes") is not None:
        return []
    return [
        f"memory.quantization={kind} needs the package bitsandbytes, which is not installed: "
        "pip install 'bilevel[quantized]'."
    ]


def quantize(module: nn.Module, layers: Mapping[str, nn.Module], kind: Quantization) -> None:
    """Put four-bit layers in the place of linear layers of a module, one by one, frozen.

        W ~ s_j q_ij,    q of the 16 values of `kind`, one scale s for 64 numbers in a row

    The scales are quantized to a byte in turn. Products are computed with s q in the type that W
    had. Layers of which a row is no multiple of 64 numbers stay as they are: bitsandbytes 0.50
    gives them wrong scales on processors with AVX-512. Where the module has a `home`, all of it
    moves there, each of these layers as it is quantized, so that the device never holds more of
    them than one in full.

    Reference: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023,
    sections 2 and 3 (nf4, double quantization).

    Args:
        module: Is changed in place, and marked for peft as quantized.
        layers: Its linear layers by path; of torch, or of transformers with W transposed.
        kind: The values.

    Raises:
        InputError: If bitsandbytes is not installed, or no layer can be quantized.
    """
    if faults := missing(kind):
        raise InputError(faults)
    fitting = {path: layer for path, layer in layers.items() if _columns(layer) % BLOCK == 0}
    if not fitting:
        found = ", ".join(map(str, sorted({_columns(layer) for layer in layers.values()})))
        raise InputError(
            f"memory.quantization={kind} needs linear layers with a multiple of {BLOCK} inputs, "
            f"but those of {type(module).__name__} have {found}; leave it out."
        )
    device = getattr(module, "home", None) or next(module.parameters()).device
    for path, layer in fitting.items():
        module.set_submodule(path, _quantized(layer, kind, device))
    module.to(device)
    marked: Any = module
    marked.is_loaded_in_4bit = True  # as transformers does, for peft


@contextmanager
def on_the_host() -> Iterator[None]:
    """Within the block models stay in host memory, with their device as `home`."""
    token = _HOST.set(True)
    try:
        yield
    finally:
        _HOST.reset(token)


def stays_on_the_host() -> bool:
    """Whether a model that is made now shall leave moving it to others."""
    return _HOST.get()


_HOST = ContextVar("host", default=False)


def _columns(layer: Any) -> int:
    """Numbers in a row of W."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]


def _quantized(layer: Any, kind: Quantization, device: torch.device | str) -> nn.Module:
    kinds: Any = import_module("bitsandbytes").nn
    weight = layer.weight.detach()
    weight = weight if isinstance(layer, nn.Linear) else weight.T.contiguous()
    outputs, inputs = weight.shape
    found = kinds.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=weight.dtype, quant_type=kind, device="meta"
    )
    options = {"quant_type": kind, "compress_statistics": True}
    found.weight = kinds.Params4bit(weight, requires_grad=False, **options, module=found)
    found.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), False)
    # on processors with AVX512-BF16 bitsandbytes 0.50 would repack what it evaluates, for a product
    # that no gradient passes through, also not in the training that follows
    found.support_avx512bf16_for_cpu = False
    return found.to(device)
