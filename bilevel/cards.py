"""Accelerator cards: what a plan needs of them, from data sheets, or of this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch

from bilevel.errors import InputError

SIZE = 1024
"""Of the square matrices whose product is timed."""
SLOW = 10e9
"""Bytes per second of the paths of a machine that no data sheet describes: a low guess."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One accelerator; bytes and seconds with SI prefixes (GB = 1e9 bytes)."""

    name: str
    usable: float
    """Bytes of memory that a process can take, less than what is printed on the box."""
    flops: float
    """Dense bfloat16 operations per second, without sparsity, from the data sheet."""
    bandwidth: float
    """Bytes per second between its memory and its processor, from the data sheet."""
    link: float
    """Bytes per second and direction to the other cards of its machine."""
    host: float
    """Bytes per second and direction to the memory of its machine, pinned: PCIe x16."""
    source: str
    """Where the numbers are from."""
    kind: str = "cuda"
    """The type of torch's device: cuda or cpu."""
    half: bool = True
    """Whether it computes in bfloat16."""


CARDS = {
    card.name: card
    for card in (
        Card(
            name="a40",
            usable=48.3e9,  # 46,068 MiB by nvidia-smi: error correction takes the rest of 48 GiB
            flops=149.7e12,
            bandwidth=696e9,
            link=25e9,  # PCIe 4 x16, 31.5e9 less protocol; pairs with a bridge have 56e9
            host=25e9,
            source="NVIDIA A40 data sheet; usable: 46,068 MiB as nvidia-smi shows",
        ),
        Card(
            name="a100-40",
            usable=42.3e9,  # 40,326 MiB that CUDA gives of 40,960
            flops=312e12,
            bandwidth=1555e9,
            link=300e9,
            host=25e9,  # PCIe 4
            source="NVIDIA A100 data sheet (SXM4, NVLink 3); usable: 39.4 GiB that CUDA gives",
        ),
        Card(
            name="a100-80",
            usable=84.9e9,  # 79.1 GiB that CUDA gives of 80
            flops=312e12,
            bandwidth=2039e9,
            link=300e9,
            host=25e9,  # PCIe 4
            source="NVIDIA A100 data sheet (SXM4, NVLink 3); usable: 79.1 GiB that CUDA gives",
        ),
        Card(
            name="h100",
            usable=83.7e9,  # 78 GiB, the low end of what CUDA gives of 80
            flops=989e12,
            bandwidth=3350e9,
            link=450e9,
            host=50e9,  # PCIe 5, 63e9 less protocol
            source="NVIDIA H100 data sheet (SXM5, NVLink 4); usable: 78 GiB",
        ),
        Card(
            name="h200",
            usable=149e9,  # 139 GiB: the 141 on the box are GiB too
            flops=989e12,
            bandwidth=4800e9,
            link=450e9,
            host=50e9,  # PCIe 5, 63e9 less protocol
            source="NVIDIA H200 data sheet (SXM5, NVLink 4); usable: 139 GiB",
        ),
    )
}


def find(name: str) -> Card:
    """The card of that name, any case; 'here' is what this machine has.

    Raises:
        InputError: If there is none; names the nearest.

    >>> find("H100").usable
    83700000000.0
    """
    key = name.lower()
    if key == "here":
        return here()
    if key in CARDS:
        return CARDS[key]
    near = get_close_matches(key, CARDS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"unknown device {name!r}; {hint}Choices: here, {', '.join(CARDS)}.")


def here() -> Card:
    """The accelerator of this machine, or its processors; what no data sheet says is measured."""
    if not torch.cuda.is_available():
        rate = product_rate("cpu", torch.float32)
        words = f"this machine: its memory, and {rate / 1e9:.0f} GFLOP/s of one product in float32"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Card(
            name="here",
            usable=float(memory),
            flops=rate,
            bandwidth=SLOW,
            link=SLOW,
            host=SLOW,
            source=words,
            kind="cpu",
            half=False,
        )
    shown = torch.cuda.get_device_name()
    half = torch.cuda.is_bf16_supported(including_emulation=False)
    usable = float(torch.cuda.get_device_properties(0).total_memory)
    words = f"this machine's {shown}: its memory as CUDA gives it"
    known = [card for name, card in CARDS.items() if name.partition("-")[0] in shown.lower()]
    if known:
        near = min(known, key=lambda card: abs(card.usable - usable))
        return replace(
            near, name="here", usable=usable, half=half, source=f"{words}; {near.source}"
        )
    rate = product_rate("cuda", torch.bfloat16 if half else torch.float32)
    words += f", and {rate / 1e12:.0f} TFLOP/s of one product"
    return Card(
        name="here",
        usable=usable,
        flops=rate,
        bandwidth=SLOW,
        link=SLOW,
        host=SLOW,
        source=words,
        half=half,
    )


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of one product of two square matrices, the best of three."""
    a = torch.ones(SIZE, SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best
