"""Plugins by name: entry points of any installed package, or `module:Class` of a file here."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from bilevel.errors import InputError

KINDS = {"problem": "bilevel.problems", "solver": "bilevel.solvers"}


def names(kind: str) -> list[str]:
    """The registered names of a kind, "problem" or "solver"."""
    return sorted(_registered(kind))


def find(kind: str, name: str) -> Any:
    """The class or factory registered as `name`, or found at `module:Class`; imports only that.

    Raises:
        InputError: If there is no such name (the nearest is named) or module.
    """
    if ":" in name:
        return _from_path(kind, name)
    known = _registered(kind)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        choices = ", ".join(sorted(known))
        raise InputError(f"unknown {kind} {name!r}; {hint}Choices: {choices}, or module:Class.")
    try:
        return known[name].load()
    except ImportError as error:
        raise InputError(
            f"{kind}={name} needs a package that is not installed ({error}); "
            "install it, for language models with: pip install 'bilevel[llm]'."
        ) from error


def _registered(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=KINDS[kind])}


def _from_path(kind: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise InputError(f"{kind}={name:.80} is no name of a class; expected module:Class.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{kind}={name} cannot be found: {error}; expected module:Class."
        ) from None
    except SyntaxError as error:
        raise InputError(
            f"{kind}={name}: {error.filename}, line {error.lineno}: {error.msg}."
        ) from None
