"""Conversations: messages of any of the usual shapes made into turns of one shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bilevel.problems.llm_reweight.faults import fault, kind, string

ROLES = ("system", "user", "assistant", "tool")

SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""Roles of ShareGPT's `from`, as written by LLaMA-Factory and by those who mix both namings."""

SHAPE = 'a list of {"role", "content"} or {"from", "value"} objects'

PASSED_ON = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Further keys of a message that chat templates of tokenizers read."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message."""

    role: str
    text: str
    trained: bool = False
    more: str = ""
    """What else a template may read, such as tool calls, as the text of a JSON object."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns in order, and the tools that the assistant may call, as the text of a JSON array."""

    turns: tuple[Turn, ...]
    tools: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """The turns as chat templates take them."""
        return [
            {"role": turn.role, "content": turn.text} | json.loads(turn.more or "{}")
            for turn in self.turns
        ]


def conversation(
    messages: object,
    field: str,
    where: str,
    faults: list[str],
    *,
    system: str = "",
    tools: object = None,
) -> Conversation:
    """The conversation in a record's field, its answers trained on, or faults."""
    found = turns(messages, field, where, faults)
    if system and (not found or found[0].role != "system"):
        found.insert(0, Turn(role="system", text=system))
    if found and not faults and not any(turn.trained for turn in found):
        wrong = f"no assistant turn in field '{field}' (nothing to train on)"
        fix = "add the assistant's answer or remove the record"
        faults.append(fault(where, wrong, "at least one assistant message", fix))
    return Conversation(turns=tuple(found), tools=tool_list(tools, where, faults))


def turns(messages: object, field: str, where: str, faults: list[str]) -> list[Turn]:
    """The messages in a record's field as turns, the assistant's marked as trained on."""
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else kind(messages)
        fix = "give the turns of the conversation or remove the record"
        faults.append(fault(where, f"{found} in field '{field}'", SHAPE, fix))
        return []
    made = [_turn(m, f"{field}[{i}]", where, faults) for i, m in enumerate(messages)]
    return [turn for turn in made if turn is not None]


def untrained(found: Sequence[Turn]) -> list[Turn]:
    """The same turns, none of them trained on."""
    return [replace(turn, trained=False) for turn in found]


def _turn(message: object, what: str, where: str, faults: list[str]) -> Turn | None:
    read = _role_and_content(message, what, where, faults)
    if read is None or not isinstance(message, dict):
        return None
    role, content = read
    trained = role == "assistant"
    more = {key: message[key] for key in PASSED_ON if message.get(key) is not None}
    if message.get("from") == "function_call":
        calls, content = _calls_in_text(content, what, where, faults), ""
    else:
        calls = _calls(message.get("tool_calls"), f"{what}.tool_calls", where, faults)
    if calls:
        more["tool_calls"] = calls
    missing = content is None or content == "" or content == []
    if missing and (calls or role in ("system", "tool")):
        if role == "system":
            return None
        text = ""
    elif missing and (message.get("tool_calls") or message.get("from") == "function_call"):
        return None  # told above
    else:
        text = _content(content, f"{what}.content", where, faults, trained)
    extra = json.dumps(more, ensure_ascii=False) if more else ""
    return Turn(role=role, text=text, trained=trained, more=extra)


def _role_and_content(
    message: object, what: str, where: str, faults: list[str]
) -> tuple[str, object] | None:
    fix = "give every message a role and a content"
    if not isinstance(message, dict):
        faults.append(fault(where, f"{kind(message)} in {what}", SHAPE, fix))
        return None
    if None in message:
        faults.append(twice(message, what, where))
        return None
    if message.get("role") is not None and ("content" in message or message.get("tool_calls")):
        role, known, content = message["role"], {r: r for r in ROLES}, message.get("content")
        fix = "rename the role (human is user, gpt is assistant)"
    elif message.get("from") is not None and "value" in message:
        role, known, content = message["from"], SHAREGPT, message["value"]
        fix = "rename the role (user is human, assistant is gpt)"
    else:
        found = f"keys {', '.join(message) or '(none)'} in {what}"
        faults.append(fault(where, found, SHAPE, fix))
        return None
    if not isinstance(role, str) or role not in known:
        faults.append(fault(where, f"role {role!r:.40} in {what}", f"one of {_list(known)}", fix))
        return None
    return known[role], content


def twice(value: Mapping[Any, Any], what: str, where: str) -> str:
    """The sentence about a key that an object has twice; the reader kept it under None."""
    found = f"the key {value[None]!r:.60} twice" + (f" in {what}" if what else "")
    return fault(where, found, "every key once in an object", "remove one of the two")


def _list(names: Mapping[str, str]) -> str:
    return ", ".join(names)


def _content(content: object, what: str, where: str, faults: list[str], trained: bool) -> str:
    """Return a message's text, given as a string or as a list of text parts."""
    if not isinstance(content, list):
        return string(content, what, where, faults, trained=trained)
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
            return string(part["text"], f"{what}[{number}].text", where, faults)
        texts.append(part["text"])
    return string("".join(texts), what, where, faults, trained=trained)


def _calls(calls: object, what: str, where: str, faults: list[str]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what chat templates take."""
    if calls is None or calls == []:
        return []
    made = [_call(call) for call in calls] if isinstance(calls, list) else [None]
    if any(call is None for call in made):
        at = f"{what}[{made.index(None)}]" if isinstance(calls, list) else what
        wrong = calls[made.index(None)] if isinstance(calls, list) else calls
        expected = 'calls such as {"function": {"name": ..., "arguments": {...}}}'
        fix = "write name and arguments of every call, the arguments as a JSON object"
        faults.append(fault(where, f"{kind(wrong)} in {at} that is no call", expected, fix))
        return []
    return [call for call in made if call is not None]


def _call(call: object) -> dict[str, Any] | None:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        return None
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    identity = {"id": call["id"]} if isinstance(call, dict) and call.get("id") else {}
    function = {"name": inner["name"], "arguments": arguments}
    return identity | {"type": "function", "function": function}


def _calls_in_text(
    content: object, what: str, where: str, faults: list[str]
) -> list[dict[str, Any]]:
    """The calls of ShareGPT's function_call, whose value is the text of one or of a list."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        value = [content]
    return _calls(value if isinstance(value, list) else [value], f"{what}.value", where, faults)


def tool_list(tools: object, where: str, faults: list[str]) -> str:
    """Descriptions of tools, given as a list or as the text of one."""
    value = tools
    if isinstance(tools, str) and tools.strip():
        try:
            value = json.loads(tools)
        except (ValueError, RecursionError):
            value = None
    if (not value and not isinstance(tools, str)) or tools == "":
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        fix = "write them as a JSON list of objects with a name"
        found = f"{kind(tools)} in field 'tools'"
        faults.append(fault(where, found, "a list of descriptions of tools", fix))
        return ""
    wrapped = [t if "function" in t else {"type": "function", "function": t} for t in value]
    return json.dumps(wrapped, ensure_ascii=False) if wrapped else ""
