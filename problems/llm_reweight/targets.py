"""Several targets with weights of their own: their names, weights, and rows of a batch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from bilevel import InputError
from bilevel.problems.llm_reweight.bounds import numbers
from bilevel.problems.llm_reweight.records import name_paths
from bilevel.problems.llm_reweight.tokens import Rows, Stratified

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

ALONE = "target"
"""The name of a target that was given none."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target of f(y) = sum_t w_t (mean loss of y on the rows of target t), sum_t w_t = 1."""

    name: str
    weight: float
    """w_t."""
    rows: Rows
    test: Rows
    """What verdicts are measured on."""


def named(given: Any, *, alone: str = ALONE, option: str = "target") -> dict[str, Any]:
    """What an option gives, by name: paths, or records in memory; what has no name is `alone`.

    A word is the path of one file if there is such a file, or if it holds no name=path.

    Raises:
        InputError: With everything that is wrong with names and entries.
    """
    if isinstance(given, Mapping):
        return dict(given)
    entries = _entries(given)
    return {alone: given} if entries is None else dict(name_paths(entries, option))


def is_one(given: Any) -> bool:
    """Whether an option gives one path, or records, rather than a list of names and paths."""
    return not isinstance(given, Mapping) and _entries(given) is None


def weights(problem: LLMReweight) -> dict[str, float]:
    """w_t of each target, from what `target_weight` says of it, 1 where that says nothing.

    Raises:
        InputError: With everything that is wrong with targets and weights.
    """
    names = list(named(problem.target))
    faults: list[str] = []
    if len(names) == 1 and problem.target_weight:
        raise InputError(
            "problem.target_weight shares out the upper loss among several targets, but there is "
            f"one, {names[0]!r}; leave it out."
        )
    given, everywhere = numbers("target_weight", problem.target_weight, names, faults)
    if everywhere is not None:
        faults.append("problem.target_weight must be name=number, got a bare number.")
    wrong = [f"{name}={value:g}" for name, value in given.items() if not 0 < value < float("inf")]
    if wrong:
        faults.append(
            f"problem.target_weight must be positive and finite, got {', '.join(wrong)}; leave out "
            "a target that should not count."
        )
    if not names:
        faults.append("problem.target holds no target; give one, as name=path.")
    if faults:
        raise InputError(faults)
    total = sum(given.get(name, 1.0) for name in names)
    return {name: given.get(name, 1.0) / total for name in names}


def option_faults(problem: LLMReweight) -> list[str]:
    """What is wrong with the names and the weights, and with the batch, as sentences."""
    try:
        count = len(weights(problem))
    except InputError as error:
        return list(error.faults)
    if 0 < problem.target_batch < count:
        return [
            "problem.target_batch must be at least the number of targets, "
            f"{count}, got {problem.target_batch}."
        ]
    return []


def tests(given: Any, targets: Sequence[str]) -> dict[str, Any]:
    """The test set of each target that is given one, by the name of the target.

    Raises:
        InputError: If there is one for no target, or one without a name for several.
    """
    if not given:
        return {}
    single = len(targets) == 1
    found = named(given, alone=targets[0] if single else "", option="test")
    if "" in found:
        raise InputError(
            f"problem.test is one set for {len(targets)} targets; name the target of each, as "
            f"'{targets[0]}=path'."
        )
    faults = []
    for name in found:
        if name not in targets:
            near = get_close_matches(name, targets, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(targets)}."
            faults.append(f"problem.test: no target is called {name!r}; {hint}")
    if faults:
        raise InputError(faults)
    return found


def test_name(target: str, targets: Sequence[str]) -> str:
    """What the test set of a target is called in messages."""
    return "test" if list(targets) == [ALONE] else f"test of {target}"


def allot(weights: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """The rows n_t of each target in a batch, which make sum_t w_t^2 / n_t least.

    That is the variance of sum_t w_t (mean loss of n_t rows) where rows of all targets are spread
    alike. Every target has one row at least and none more than it holds. Given one by one to where
    the sum falls most, by w_t^2 / (n_t (n_t + 1)), which is best since the terms are convex.

    Args:
        weights: w_t by name.
        sizes: Rows that each target holds.
        total: Rows of the batch.

    >>> allot({"a": 0.5, "b": 0.25, "c": 0.25}, {"a": 90, "b": 90, "c": 1}, 9)
    {'a': 5, 'b': 3, 'c': 1}
    """
    counts = dict.fromkeys(weights, 1)
    for _ in range(total - len(counts)):
        open_ = [name for name in counts if counts[name] < sizes[name]]
        if not open_:
            break
        gain = {name: weights[name] ** 2 / (counts[name] * (counts[name] + 1)) for name in open_}
        counts[min(open_, key=lambda name: (-gain[name], name))] += 1
    return counts


def shared_out(targets: Sequence[Target], total: int) -> list[int]:
    """`allot` for targets."""
    sizes = {target.name: len(target.rows) for target in targets}
    return list(allot({target.name: target.weight for target in targets}, sizes, total).values())


def stream(targets: Sequence[Target], *, rows: int, seed: int) -> Stratified:
    """Batches with the same number of rows of a target each, whose shares add up to its weight.

    So the loss of a batch is right on average for any weights, and a small target counts as much
    as its weight says.
    """
    return Stratified(
        [target.rows for target in targets],
        rows=shared_out(targets, rows),
        weights=[target.weight for target in targets],
        seed=seed,
    )


def _entries(given: Any) -> Sequence[str] | None:
    """The entries of a list of names and paths; None for one path, and for records."""
    if isinstance(given, str):
        if os.path.exists(given):
            return None
        try:
            words = shlex.split(given)
        except ValueError:
            return None
        several = len(words) > 1 and all(map(os.path.isfile, words))
        return words if several or any("=" in word for word in words) else None
    listed = isinstance(given, list | tuple) and len(given) > 0
    return given if listed and all(isinstance(entry, str) for entry in given) else None
