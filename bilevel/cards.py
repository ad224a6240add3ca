"""Accelerator cards: what a plan needs of them, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from bilevel.errors import InputError


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
    """The card of that name, any case.

    Raises:
        InputError: If there is none; names the nearest.

    >>> find("H100").usable
    83700000000.0
    """
    key = name.lower()
    if key in CARDS:
        return CARDS[key]
    near = get_close_matches(key, CARDS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"unknown device {name!r}; {hint}Choices: {', '.join(CARDS)}.")
