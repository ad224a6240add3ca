"""What a baseline is: weights of the sources, found within a budget of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bilevel import InputError
from bilevel.fields import out_of_range

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.baselines.lab import Lab


@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer of a search; what it cost is counted by the lab."""

    weights: dict[str, float]
    """Share of each source, all of them adding up to 1."""
    note: str = ""
    """In words, what else the search has seen."""


class Method(ABC):
    """A way to weights, as a frozen dataclass whose fields are its options."""

    @abstractmethod
    def search(self, lab: Lab) -> Found:
        """The weights, found with no more than about `lab.budget` tokens."""

    def check(self, names: list[str]) -> list[str]:
        """Every reason why it cannot run on sources of these names, as sentences."""
        return []


def normalized(names: list[str], values: list[float]) -> dict[str, float]:
    """Non-negative values as weights; uniform where all are zero.

    >>> normalized(["a", "b"], [3.0, 1.0])
    {'a': 0.75, 'b': 0.25}
    """
    total = sum(values)
    if not total > 0:
        return dict.fromkeys(names, 1 / len(names))
    return {name: value / total for name, value in zip(names, values, strict=True)}


def require(method: Method, **ranges: str) -> None:
    """Check fields against ranges by name, see `bilevel.fields.RANGES`.

    Raises:
        InputError: With every fault.
    """
    if faults := out_of_range(type(method).__name__.lower(), method, **ranges):
        raise InputError(faults)
