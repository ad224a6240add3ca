"""The record formats of training files: which one a record is in, and what of it is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.problems.llm_reweight.chat import (
    Conversation,
    Turn,
    conversation,
    tool_list,
    turns,
    untrained,
)
from bilevel.problems.llm_reweight.faults import fault, kind, optional, string

Segments = tuple[tuple[str, bool], ...]
"""Pieces of text in order, each with whether its tokens are trained on."""

Schema = tuple[str, tuple[str, ...]]
"""A format's name and the keys that a record must have."""

Content = tuple[Segments, Conversation | None]
"""A record as text, or as a conversation that a template has to write."""

PREFERENCE: Schema = ("preference", ("chosen", "rejected"))

SCHEMAS: tuple[Schema, ...] = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("prompt_completion", ("prompt", "completion")),
    ("prompt_completion", ("question", "answer")),
    ("prompt_completion", ("query", "response")),
    ("prompt_completion", ("input", "output")),
    ("text", ("text",)),
)
"""In the order tried: the first whose keys a record has is the record's schema."""

FIELDS = (
    "system",
    "history",
    "tools",
    *(key for _, keys in (*SCHEMAS, PREFERENCE) for key in keys),
)
"""Every key that means something."""

ACCEPTED = (
    "the keys of one format: text {text}; prompt_completion {prompt, completion}, "
    "{question, answer}, {query, response} or {input, output}; alpaca {instruction, output} "
    "with optional input, system and history; messages {messages}; sharegpt {conversations}"
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the records of a source are taken."""

    columns: tuple[tuple[str, str], ...] = ()
    """Pairs of a key that a format has and the key that records have instead."""
    use_chosen: bool = False
    """Whether the chosen answers of preference sets are wanted."""
    as_chat: bool = False
    """Whether prompts and answers become conversations, for a template to write."""
    skip: bool = False
    """Whether bad records are left out instead of being an error."""
    held: int = 64_000_000
    """Bytes up to which a file is held in memory."""


def detect(record: Mapping[str, Any], *, use_chosen: bool = False) -> Schema | None:
    """Return the schema of a record, told by its keys, or None where no format has such keys."""
    if use_chosen and record.get("chosen") is not None:
        return PREFERENCE
    for schema in SCHEMAS:
        name, keys = schema
        if name == "prompt_completion" and keys == ("input", "output") and "instruction" in record:
            continue
        if all(key in record for key in keys):
            return schema
    return PREFERENCE if all(key in record for key in PREFERENCE[1]) else None


def describe(schema: Schema) -> str:
    """Return a schema in words, such as `text {text}`."""
    return f"{schema[0]} {{{', '.join(schema[1])}}}"


def renamed(record: Mapping[str, Any], columns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The record with its columns under the names of a format.

    >>> renamed({"q": "a", "label": "b"}, (("prompt", "q"), ("completion", "label")))
    {'prompt': 'a', 'completion': 'b'}
    """
    moved = {key for _, key in columns}
    rest = {key: value for key, value in record.items() if key not in moved}
    return rest | {name: record[key] for name, key in columns if key in record}


def render(
    schema: Schema, record: Mapping[str, Any], where: str, reading: Reading | None = None
) -> tuple[Content, list[str]]:
    """Return what a record holds, or nothing and the faults that keep it from being used."""
    faults: list[str] = []
    reading = reading or Reading()
    name, keys = schema
    if name in ("messages", "sharegpt"):
        given = {"system": _system(record, where, faults), "tools": record.get("tools")}
        found: Content = (), conversation(record[keys[0]], keys[0], where, faults, **given)
    elif name == "alpaca":
        found = _alpaca(record, where, faults, reading.as_chat)
    elif name == "prompt_completion":
        found = _pair(record, keys, where, faults, reading.as_chat)
    elif name == "preference":
        found = _chosen(record, where, faults, reading)
    else:
        text = string(record["text"], "field 'text'", where, faults, trained=True)
        found = ((text, True),), None
    return (((), None), faults) if faults else (found, faults)


def merge(pieces: list[tuple[str, bool]]) -> Segments:
    """Join neighbors that are both trained on, or both not; empty ones go."""
    merged: list[tuple[str, bool]] = []
    for text, trained in pieces:
        if merged and merged[-1][1] == trained:
            merged[-1] = (merged[-1][0] + text, trained)
        elif text:
            merged.append((text, trained))
    return tuple(merged)


def _system(record: Mapping[str, Any], where: str, faults: list[str]) -> str:
    return optional(record.get("system"), "field 'system'", where, faults)


def _dialogue(system: str, pairs: list[tuple[str, str]]) -> Conversation:
    found = [Turn(role="system", text=system)] if system else []
    for user, answer in pairs:
        found += [Turn(role="user", text=user), Turn(role="assistant", text=answer, trained=True)]
    return Conversation(turns=tuple(found))


def _alpaca(record: Mapping[str, Any], where: str, faults: list[str], as_chat: bool) -> Content:
    instruction = string(record["instruction"], "field 'instruction'", where, faults)
    system = _system(record, where, faults)
    extra = optional(record.get("input"), "field 'input'", where, faults)
    output = string(record["output"], "field 'output'", where, faults, trained=True)
    history = _history(record.get("history"), where, faults)
    if as_chat:
        last = f"{instruction}\n{extra}" if extra else instruction
        return (), _dialogue(system, [*history, (last, output)])
    pieces = [(f"{system}\n\n", False)] if system else []
    for user, answer in history:
        pieces += [(f"Instruction:\n{user}\n\nResponse:\n", False), (answer, True), ("\n\n", False)]
    middle = f"Input:\n{extra}\n\n" if extra else ""
    pieces.append((f"Instruction:\n{instruction}\n\n{middle}Response:\n", False))
    return merge([*pieces, (output, True)]), None


def _history(value: object, where: str, faults: list[str]) -> list[tuple[str, str]]:
    """The turns before an alpaca record, as pairs of question and answer."""
    if value is None or value == [] or value == "":
        return []
    if not isinstance(value, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        fix = "write it as [[question, answer], ...]"
        found = f"{kind(value)} in field 'history'"
        faults.append(fault(where, found, "a list of pairs of question and answer", fix))
        return []
    return [
        (
            string(user, f"history[{i}][0]", where, faults),
            string(answer, f"history[{i}][1]", where, faults, trained=True),
        )
        for i, (user, answer) in enumerate(value)
    ]


def _pair(
    record: Mapping[str, Any], keys: tuple[str, ...], where: str, faults: list[str], as_chat: bool
) -> Content:
    prompt, completion = (record[key] for key in keys)
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = _turns_of(prompt, keys[0], "user", where, faults)
        answer = _turns_of(completion, keys[1], "assistant", where, faults)
        return (), _joined(untrained(asked), answer, keys[1], record, where, faults)
    prompt = string(prompt, f"field '{keys[0]}'", where, faults)
    completion = string(completion, f"field '{keys[1]}'", where, faults, trained=True)
    if as_chat:
        return (), _dialogue(_system(record, where, faults), [(prompt, completion)])
    return merge([(prompt, False), (completion, True)]), None


def _turns_of(value: object, field: str, role: str, where: str, faults: list[str]) -> list[Turn]:
    """Turns given as a list of messages or as the text of one."""
    if isinstance(value, list):
        return turns(value, field, where, faults)
    trained = role == "assistant"
    text = string(value, f"field '{field}'", where, faults, trained=trained)
    return [Turn(role=role, text=text, trained=trained)]


def _joined(
    before: list[Turn],
    answer: list[Turn],
    field: str,
    record: Mapping[str, Any],
    where: str,
    faults: list[str],
) -> Conversation:
    """A conversation of which only the answer is trained on."""
    if not faults and not any(turn.trained for turn in answer):
        found = f"no assistant turn in field '{field}' (nothing to train on)"
        fix = "add the assistant's answer or remove the record"
        faults.append(fault(where, found, "at least one assistant message", fix))
    whole = [*before, *answer]
    system = _system(record, where, faults)
    if system and (not whole or whole[0].role != "system"):
        whole.insert(0, Turn(role="system", text=system))
    return Conversation(turns=tuple(whole), tools=tool_list(record.get("tools"), where, faults))


def _chosen(record: Mapping[str, Any], where: str, faults: list[str], reading: Reading) -> Content:
    """The chosen answer; what comes before it is the prompt, or what both answers begin with."""
    if not reading.use_chosen:
        expected = "records with one answer each"
        fix = "give problem.use_chosen=true to train on the chosen answers"
        faults.append(fault(where, "a preference set (chosen, rejected)", expected, fix))
        return (), None
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, dict):  # LLaMA-Factory's: the one message that answers `conversations`
        chosen = [chosen]
        prompt = record.get("conversations", record.get("messages", prompt))
    elif prompt is None and isinstance(record.get("instruction"), str):
        asked = [record["instruction"], record.get("input")]
        prompt = "\n".join(part for part in asked if isinstance(part, str) and part)
    if isinstance(chosen, list):
        answer = turns(chosen, "chosen", where, faults)
        same = _same(chosen, rejected) if isinstance(rejected, list) else len(answer) - 1
        same = min(same, len(answer) - 1)
        if same > 0:  # the prompt stands in front of the answer
            before, answer = answer[:same], answer[same:]
        else:
            before = _turns_of(prompt, "prompt", "user", where, faults)
        return (), _joined(untrained(before), answer, "chosen", record, where, faults)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        start = chosen[: _same(chosen, rejected)]
        cut = max(start.rfind(space) for space in " \n\t") + 1
        prompt, chosen = chosen[:cut], chosen[cut:]
    pair = dict(record) | {"prompt": prompt, "chosen": chosen}
    return _pair(pair, ("prompt", "chosen"), where, faults, reading.as_chat)


def _same(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many messages or letters two answers begin with in common."""
    count = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        count += 1
    return count
