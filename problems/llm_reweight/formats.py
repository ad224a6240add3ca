"""The record formats of training files: which one a record is in, and how it becomes text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Segments = tuple[tuple[str, bool], ...]
"""Pieces of text in order, each with whether its tokens are trained on."""

Schema = tuple[str, tuple[str, ...]]
"""A format's name and the keys that a record must have."""

SCHEMAS: tuple[Schema, ...] = (
    ("messages", ("messages",)),
    ("alpaca", ("instruction", "output")),
    ("prompt_completion", ("prompt", "completion")),
    ("prompt_completion", ("question", "answer")),
    ("prompt_completion", ("query", "response")),
    ("prompt_completion", ("input", "output")),
    ("text", ("text",)),
)
"""In the order tried: the first whose keys a record has is the record's schema."""

ROLES = ("system", "user", "assistant", "tool")

ACCEPTED = (
    "the keys of one format: text {text}; prompt_completion {prompt, completion}, "
    "{question, answer}, {query, response} or {input, output}; alpaca {instruction, output} "
    "with optional input and system; messages {messages}"
)


def detect(record: Mapping[str, Any]) -> Schema | None:
    """Return the schema of a record, told by its keys, or None where no format has such keys."""
    for schema in SCHEMAS:
        name, keys = schema
        if name == "prompt_completion" and keys == ("input", "output") and "instruction" in record:
            continue
        if all(key in record for key in keys):
            return schema
    return None


def describe(schema: Schema) -> str:
    """Return a schema in words, such as `text {text}`."""
    return f"{schema[0]} {{{', '.join(schema[1])}}}"


def fault(where: str, found: str, expected: str, fix: str) -> str:
    """Return the one sentence that says what came, what was expected and what to do."""
    return f"{where}: found {found}, expected {expected}; fix: {fix}."


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
    return "a list" if isinstance(value, list) else "an object"


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


def render(schema: Schema, record: Mapping[str, Any], where: str) -> tuple[Segments, list[str]]:
    """Return a record's text, or no text and the faults that keep it from being used."""
    faults: list[str] = []
    name, keys = schema
    if name == "messages":
        pieces = _messages(record["messages"], where, faults)
    elif name == "alpaca":
        pieces = _alpaca(record, where, faults)
    elif name == "prompt_completion":
        prompt = _string(record[keys[0]], f"field '{keys[0]}'", where, faults)
        completion = _string(record[keys[1]], f"field '{keys[1]}'", where, faults, trained=True)
        pieces = [(prompt, False), (completion, True)]
    else:
        pieces = [(_string(record["text"], "field 'text'", where, faults, trained=True), True)]
    return ((), faults) if faults else (_merge(pieces), faults)


def _string(
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


def _optional(record: Mapping[str, Any], key: str, where: str, faults: list[str]) -> str:
    """Return a field that may be absent, null or empty."""
    value = record.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return _string(value, f"field '{key}'", where, faults)


def _alpaca(record: Mapping[str, Any], where: str, faults: list[str]) -> list[tuple[str, bool]]:
    instruction = _string(record["instruction"], "field 'instruction'", where, faults)
    system = _optional(record, "system", where, faults)
    extra = _optional(record, "input", where, faults)
    output = _string(record["output"], "field 'output'", where, faults, trained=True)
    head = f"{system}\n\n" if system else ""
    middle = f"Input:\n{extra}\n\n" if extra else ""
    return [(f"{head}Instruction:\n{instruction}\n\n{middle}Response:\n", False), (output, True)]


def _messages(messages: object, where: str, faults: list[str]) -> list[tuple[str, bool]]:
    shape = 'a list of {"role", "content"} objects'
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else kind(messages)
        fix = "give the turns of the conversation or remove the record"
        faults.append(fault(where, f"{found} in field 'messages'", shape, fix))
        return []
    pieces: list[tuple[str, bool]] = []
    answered = False
    for number, message in enumerate(messages):
        what = f"messages[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            keys = f"keys {', '.join(message) or '(none)'}" if isinstance(message, dict) else ""
            found = f"{keys or kind(message)} in {what}"
            faults.append(fault(where, found, shape, "give every message a role and a content"))
            answered = True  # what this turn is cannot be told, so do not also call it missing
            continue
        role = message["role"]
        if role not in ROLES:
            found = f"role {role!r:.40} in {what}"
            fix = "rename the role (human is user, gpt is assistant)"
            faults.append(fault(where, found, f"one of {', '.join(ROLES)}", fix))
            answered = True
            continue
        trained = role == "assistant"
        answered = answered or trained
        content = _content(message["content"], f"{what}.content", where, faults, trained)
        pieces.append((f"<|im_start|>{role}\n", False))
        pieces.append((f"{content}<|im_end|>", trained))
        pieces.append(("\n", False))
    if not answered:
        found = "no assistant turn in field 'messages' (nothing to train on)"
        fix = "add the assistant's answer or remove the record"
        faults.append(fault(where, found, "at least one assistant message", fix))
    return pieces


def _content(content: object, what: str, where: str, faults: list[str], trained: bool) -> str:
    """Return a message's text, given as a string or as a list of text parts."""
    if not isinstance(content, list):
        return _string(content, what, where, faults, trained=trained)
    texts: list[str] = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
            is_typed = isinstance(part, dict) and "type" in part
            found = f"type {part['type']!r:.40}" if is_typed else kind(part)
            expected = '{"type": "text", "text": ...} parts'
            fix = "keep text parts only or give the content as a string"
            faults.append(fault(where, f"{found} in {what}[{number}]", expected, fix))
            return ""
        if not isinstance(part["text"], str):
            return _string(part["text"], f"{what}[{number}].text", where, faults)
        texts.append(part["text"])
    return _string("".join(texts), what, where, faults, trained=trained)


def _merge(pieces: list[tuple[str, bool]]) -> Segments:
    """Join neighbors that are both trained on, or both not."""
    merged: list[tuple[str, bool]] = []
    for text, trained in pieces:
        if merged and merged[-1][1] == trained:
            merged[-1] = (merged[-1][0] + text, trained)
        else:
            merged.append((text, trained))
    return tuple(merged)
