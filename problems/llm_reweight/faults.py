"""The sentences about broken files: where, what was found, what was expected, what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence

SHOWN = 5
"""How many faults of one file are written out; the others are counted."""


def fault(where: str, found: str, expected: str, fix: str) -> str:
    """Return the one sentence that says what came, what was expected and what to do."""
    return f"{where}: found {found}, expected {expected}; fix: {fix}."


def first(faults: Sequence[str], path: str) -> list[str]:
    """The first faults of a file, and one sentence that counts the others."""
    more = len(faults) - SHOWN
    return [*faults[:SHOWN], *([f"{path}: and {more} more."] if more > 0 else [])]


def place(path: str, index: int, line: int | None) -> str:
    """Where a record stands: its line if it has one, else its number."""
    return f"{path}:{line}" if line is not None else f"{path}: record {index} (counting from 0)"


def kind(value: object) -> str:
    """Return a JSON value in a few words, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value!r:.40}"
    if isinstance(value, str):
        return f"the string {value!r:.60}" if value.strip() else "an empty string"
    return "a list" if isinstance(value, list | tuple) else "an object"


def malformed(
    text: str, path: str, error: Exception, *, line: int | None = None, last: bool = True
) -> str:
    """Say where JSON stops being JSON, and whether the file was cut off there."""
    array = line is None
    expected = "one JSON array" if array else "one complete JSON object on each line"
    if not isinstance(error, json.JSONDecodeError):
        fix = "simplify the record or remove it"
        where = path if array else f"{path}:{line}"
        return fault(where, f"JSON that cannot be read ({error})", expected, fix)
    where = f"{path}:{error.lineno if array else line}"
    body = text.rstrip()
    extra = error.msg == "Extra data"
    ends = error.pos >= len(body) or not body.endswith("]" if array else "}")
    if last and not extra and body.startswith(("{", "[")) and ends:
        what = "a JSON array" if array else "a last line"
        fix = "write the file again, it was cut off, or remove the unfinished record"
        return fault(where, f"{what} that stops at column {error.colno} (truncated)", expected, fix)
    found = f"malformed JSON at column {error.colno} ({error.msg})"
    fix = "correct it there or remove the record"
    if extra:
        fix = "put every record on its own line, without commas between records"
    return fault(where, found, expected, fix)


def string(
    value: object, what: str, where: str, faults: list[str], *, trained: bool = False
) -> str:
    """Return a field that must hold text, adding a fault where it does not."""
    if not isinstance(value, str) or not value.strip():
        empty = isinstance(value, str)
        note = " (nothing to train on)" if empty and trained else ""
        fix = (
            "fill it in or remove the record"
            if empty or value is None
            else "write the value as a string in quotes"
        )
        faults.append(fault(where, f"{kind(value)} in {what}{note}", "a non-empty string", fix))
        return ""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        faults.append(
            fault(
                where,
                f"half of a surrogate pair at character {error.start} of {what}",
                "text that UTF-8 can hold",
                "remove the broken \\ud800-\\udfff escape or write both halves",
            )
        )
    return value


def optional(value: object, what: str, where: str, faults: list[str]) -> str:
    """Return a field that may be absent, null or empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return string(value, what, where, faults)
