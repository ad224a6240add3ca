"""What a run must share with another to go on from its state."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from bilevel.problems.llm_reweight.model import identity

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

HELD = ("sources", "target", "target_weight", "test", "model", "dtype")
"""Options that stand below by what they lead to."""
FREE = (
    *("allow_overlap", "on_bad_record"),  # decide whether a run begins
    *("verdict", "export", "transfer", "compare", "compare_tokens"),  # after the last step
    *("device", "attention", "checkpointing", "loss_chunk"),  # change rounding only
)
"""Options that may change."""


def of(problem: LLMReweight) -> dict[str, Any]:
    """The options, with the content of files and of the model in the place of their paths."""
    own = {
        field.name: getattr(problem, field.name)
        for field in fields(problem)
        if field.name not in (*HELD, *FREE) and not field.name.startswith("verdict_")
    }
    own |= {"targets": problem.target_weights} if len(problem.target_weights) > 1 else {}
    own |= {"order": problem.names, "model": identity(problem.model)}
    own["dtype"] = str(problem.placement.dtype).removeprefix("torch.")
    return own | {f"file of {source.name}": source.identity for source in problem.data.files}
