"""The forward and backward passes of one upper step on one device."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from bilevel import InputError
from bilevel.problems.llm_reweight.survey import padded, survey

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The forward and backward passes of one upper step on one device."""

    rows: int
    """Rows of the largest pass."""
    length: int
    """Tokens of a row that are predicted from."""
    lower: int
    """Passes of one sweep over the lower batch."""
    upper: int
    """Passes of one sweep over the upper batch."""
    padded: tuple[float, float] = (0.0, 0.0)
    """Tokens of one sweep over the lower and over the upper batch, over all devices."""

    @property
    def tokens(self) -> int:
        """Tokens of the largest pass."""
        return self.rows * self.length


def passes_of(problem: LLMReweight, devices: int) -> Passes:
    """How the batches of a step are passed on one device.

    Raises:
        InputError: If they cannot be shared out.
    """
    counts = {"batch": problem.batch, "target_batch": problem.target_batch}
    faults = [
        f"problem.{name} must be a multiple of devices={devices}, got {rows}."
        for name, rows in counts.items()
        if rows % devices
    ]
    if faults:
        raise InputError(faults)
    lower, upper = (rows // devices for rows in counts.values())
    most = problem.micro_batch or max(lower, upper)
    found = survey(problem)
    length = (min(found.longest, problem.max_length) if found else problem.max_length) - 1
    full = (problem.batch * length, problem.target_batch * length)
    return Passes(
        rows=min(most, max(lower, upper)),
        length=length,
        lower=ceil(lower / most),
        upper=ceil(upper / most),
        padded=padded(found, problem, devices) if found else full,
    )
