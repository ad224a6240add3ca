"""Paths in options, made to hold from any folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bilevel.problems.llm_reweight import targets
from bilevel.problems.llm_reweight.records import name_paths

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

FILE = re.compile(r"(?<=:file=)[^:,]+")
"""The file of a method in problem.compare."""


def rooted(problem: LLMReweight) -> LLMReweight:
    """The problem with whole paths; sources keep their names, and what is no path stays."""
    own = problem.sources
    return replace(
        problem,
        sources=_named(own) if isinstance(own, tuple) else own,
        target=_given(problem.target, "target"),
        test=_given(problem.test, "test"),
        model=problem.model if problem.model == "tiny" else whole(problem.model),
        transfer=whole(problem.transfer),
        compare=tuple(FILE.sub(lambda found: whole(found[0]), word) for word in problem.compare),
    )


def whole(path: str) -> str:
    """A path from the root, where something is there; else as it is."""
    return os.path.abspath(path) if path and os.path.exists(path) else path


def _given(value: Any, option: str) -> Any:
    if not isinstance(value, str | tuple):
        return value  # records
    if isinstance(value, str) and targets.is_one(value):
        return whole(value)
    return _entries(targets.named(value, option=option))


def _named(entries: Sequence[str]) -> tuple[str, ...]:
    return _entries(name_paths(entries))


def _entries(paths: Mapping[str, str]) -> tuple[str, ...]:
    """The entries 'name=path', which are read back as they are."""
    found = []
    for name, path in paths.items():
        plain = "=" not in name and name == name.strip()  # else it is the name of a file
        found.append(f"{name}={whole(path)}" if plain else whole(path))
    return tuple(found)
