"""Fields of a dataclass as options: values read by annotation, and the words that document them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import numbers
import shlex
import textwrap
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal

BOOLEANS: dict[str, bool] = {
    **{word: True for word in ("true", "yes", "on", "1")},
    **{word: False for word in ("false", "no", "off", "0")},
}

RANGES: dict[str, Callable[[Any], bool]] = {
    "positive": lambda value: value > 0,
    "non-negative": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 1)": lambda value: 0 < value < 1,
}


def read(hint: Any, value: Any) -> Any:
    """The value of a field annotated `hint`, from a word of the command line or a YAML value.

    A list may be written as words separated by spaces, and a mapping {a: b} stands for 'a=b'.

    Raises:
        ValueError: If it cannot be read.

    >>> read(tuple[str, ...], "a 'b c'"), read(tuple[str, ...], {"a": "b c"})
    (('a', 'b c'), ('a=b c',))
    >>> read(bool, "No"), read(float, "1e-3"), read(Literal["x", 1], "1")
    (False, 0.001, 1)
    >>> read(tuple[Literal["x", "y"], ...], "x,y")
    ('x', 'y')
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _pick({str(choice): choice for choice in inside}, value)
    if origin in (typing.Union, types.UnionType):
        return _first(inside, value)
    if origin in (tuple, list):
        if isinstance(value, str) and typing.get_origin(inside[0]) is Literal:
            value = value.replace(",", " ")  # names of our own hold no commas
        items = shlex.split(value) if isinstance(value, str) else value
        if isinstance(items, dict):
            items = [f"{name}={item}" for name, item in items.items()]
        if not isinstance(items, list):
            raise ValueError("not a list")
        hints = inside if origin is tuple and inside[-1] is not ... else inside[:1] * len(items)
        return origin(read(h, item) for h, item in zip(hints, items, strict=True))
    if isinstance(value, dict | list):
        raise ValueError("one value expected")
    if hint is types.NoneType:
        return _pick({"none": None, "null": None, "": None}, value)
    if hint is bool:
        return _pick(BOOLEANS, value)
    if inspect.isabstract(hint):
        raise ValueError("no word stands for it")
    made = hint(str(value))
    if isinstance(made, float) and math.isnan(made):
        raise ValueError("not a number")
    return made


def describe(hint: Any) -> str:
    """What a field annotated `hint` takes, in words.

    >>> describe(float | None)
    'a number or none'
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in inside if not inspect.isabstract(part))
    if origin in (tuple, list):
        if typing.get_origin(inside[0]) is Literal:
            return f"some of {', '.join(map(str, typing.get_args(inside[0])))}, with commas between"
        return "words separated by spaces, in quotes where a word holds spaces"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words[types.NoneType] = "none"
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def written(value: Any) -> str:
    """A value as one would write it on the command line.

    >>> written(("a", "b c")), written(True), written(1e-3), written(None)
    ("a 'b c'", 'true', '0.001', 'none')
    """
    if isinstance(value, tuple | list):
        return shlex.join(map(written, value))
    if isinstance(value, Enum):
        return written(value.value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def documentation(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and its ancestors, where source is at hand."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        for field, below in itertools.pairwise(getattr(tree, "body", [])):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def mistyped(kind: str, options: Any) -> list[str]:
    """A sentence for each field whose value is not what its annotation says; none for no dataclass.

    Annotations other than numbers, text, booleans, `Literal`, None, abstract classes, and tuples,
    lists and unions of these are not looked at.

    Args:
        kind: As in `out_of_range`.
        options: The dataclass.
    """
    if not dataclasses.is_dataclass(options):
        return []
    hints = typing.get_type_hints(type(options))
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return [
        f"{kind}.{name} must be {words}, got {value!r}."
        for name, value in values.items()
        if not _is(hints[name], value)
        for several in [typing.get_origin(hints[name]) in (tuple, list)]
        for words in ["a tuple or list" if several else describe(hints[name])]
    ]


def out_of_range(kind: str, options: object, **ranges: str) -> list[str]:
    """A sentence for each field that is not in its range, or of another type than it should be.

    Args:
        kind: "problem" or "solver", as on the command line.
        options: The dataclass.
        ranges: For each field one key of `RANGES`.

    >>> from types import SimpleNamespace
    >>> out_of_range("problem", SimpleNamespace(rows=0), rows="at least 1")
    ['problem.rows must be at least 1, got 0.']
    """
    if faults := mistyped(kind, options):
        return faults
    return [
        f"{kind}.{name} must be {words}, got {getattr(options, name)}."
        for name, words in ranges.items()
        if not RANGES[words](getattr(options, name))
    ]


def _is(hint: Any, value: Any) -> bool:
    """Whether a value is of an annotated type, as far as that is known."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str | int) and value in inside
    if origin in (typing.Union, types.UnionType):
        return any(_is(part, value) for part in inside)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and all(_is(inside[0], item) for item in value)
    number = {int: numbers.Integral, float: numbers.Real}.get(hint)
    if number:  # of numpy too
        return isinstance(value, number) and not isinstance(value, bool)
    known = hint in (bool, str, types.NoneType) or inspect.isabstract(hint)
    return isinstance(value, hint) if known else True


def _pick(choices: dict[str, Any], value: Any) -> Any:
    for name, choice in choices.items():
        if name in (str(value), str(value).lower()):
            return choice
    raise ValueError(f"not among {', '.join(choices)}")


def _first(hints: tuple[Any, ...], value: Any) -> Any:
    for hint in hints:
        try:
            return read(hint, value)
        except ValueError:
            continue
    raise ValueError("fits none")
