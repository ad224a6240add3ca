"""What is wrong with the options, as sentences, before a model is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bilevel import InputError
from bilevel.problems.llm_reweight import exports, model, targets, weighting

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight


def option_faults(problem: LLMReweight) -> list[str]:
    """Everything that is wrong with the options and with the files they name."""
    faults = out_of_range(problem) + exports.unknown(problem.export)
    faults += weighting.options_faults(problem) + targets.option_faults(problem)
    try:
        problem.placement  # noqa: B018, read for what it raises
    except InputError as error:
        faults += error.faults
    if problem.model != "tiny":
        faults += model.check_folder(problem.model)
    if problem.transfer:
        faults += _transfer_faults(problem)
    if problem.compare and problem.weigh == "examples":
        faults.append(
            "problem.compare holds weights of sources against each other; leave it out where "
            "problem.weigh=examples."
        )
    by_source = problem.weigh != "examples" and not weighting.is_plain(problem)
    if problem.sources or problem.target or by_source or problem.compare:
        try:
            if problem.compare:
                from bilevel.problems.llm_reweight.baselines import comparison

                comparison.chosen(problem.compare, problem.names)
            if 0 < problem.batch < len(problem.names) and problem.weigh != "examples":
                faults.append(
                    "problem.batch must be at least the number of sources, "
                    f"{len(problem.names)}, got {problem.batch}."
                )
            if by_source:
                problem.weighting  # noqa: B018, read for what it raises
        except InputError as error:
            faults += error.faults
    return list(dict.fromkeys(faults))


def out_of_range(problem: LLMReweight) -> list[str]:
    """Every option that no data and no machine could make right, as sentences."""
    least = {"batch": 1, "target_batch": 1, "max_length": 2, "layers": 1, "micro_batch": 0}
    least |= {"verdict_steps": 1, "verdict_seeds": 1, "loss_chunk": 0, "compare_tokens": 0}
    least |= {"held_megabytes": 1}
    faults = [
        f"problem.{name} must be at least {bound}, got {getattr(problem, name)}."
        for name, bound in least.items()
        if getattr(problem, name) < bound
    ]
    if not 0 < problem.verdict_lr < math.inf:
        faults.append(f"problem.verdict_lr must be positive, got {problem.verdict_lr}.")
    if problem.width < 16 or problem.width % 16:
        faults.append(f"problem.width must be a multiple of 16, got {problem.width}.")
    return faults


def share_faults(problem: LLMReweight, count: int) -> list[str]:
    """Why `count` processes cannot share out the batches evenly."""
    try:
        each = problem.weigh == "examples"
        whole = problem.batch if each else problem.batch // len(problem.names) * len(problem.names)
        rows = {"batch": whole}
    except InputError:  # told by check
        return []
    rows["target_batch"] = problem.target_batch
    return [
        f"problem.{name}={getattr(problem, name)} gives {found} rows, which {count} processes "
        f"cannot share out evenly; make it a multiple of {count}"
        + (" in whole rows of each source." if name == "batch" else ".")
        for name, found in rows.items()
        if found % count
    ]


def _transfer_faults(problem: LLMReweight) -> list[str]:
    from bilevel.problems.llm_reweight import verdict

    other = verdict.another(problem, problem.transfer)
    faults = out_of_range(other) if other.model == "tiny" else []
    if other.model != "tiny":
        faults += model.check_folder(other.model)
    if problem.weigh == "examples":
        faults.append("it judges weights of sources; leave it out where examples are weighed.")
    return [f"of problem.transfer={problem.transfer}: {fault}" for fault in faults]
