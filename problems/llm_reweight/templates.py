"""Chat templates: conversations written as text, with what of it is trained on."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bilevel import InputError
from bilevel.problems.llm_reweight.chat import Conversation, Turn
from bilevel.problems.llm_reweight.examples import Example
from bilevel.problems.llm_reweight.formats import Segments, merge

Name = Literal["auto", "tokenizer", "chatml", "llama3", "alpaca", "plain"]

DATE = (
    '{%- macro strftime_now(format) -%}{{ "26 Jul 2024" if format == "%d %b %Y" else "2024-07-26" '
    "}}{%- endmacro -%}"
)
"""Put in front of templates that write today's date: a run must not depend on the day. The date is
the one that Llama 3's template takes where it cannot know it."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How records are written and what of them is trained on."""

    template: Name = "auto"
    train_on_prompt: bool = False
    last_turn_only: bool = False


class Unwritable(ValueError):
    """A conversation that a template cannot write: what was found, expected, and the remedy."""

    def __init__(self, found: str, expected: str, fix: str) -> None:
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(found)


class Template(ABC):
    """What writes conversations."""

    @abstractmethod
    def write(self, chat: Conversation) -> tuple[Segments, bool]:
        """The text of a conversation, and whether the end of its last turn is written with it.

        Raises:
            Unwritable: If it cannot be written.
        """


@dataclass(frozen=True, kw_only=True)
class Named(Template):
    """A template of ours: every turn is a head, the text, an end that is trained with it, a tail.

    Tool calls and descriptions of tools are written as Hermes and Qwen do.
    """

    head: str = ""
    heads: Mapping[str, str] = field(default_factory=dict)
    """Of roles that have another."""
    end: str = ""
    """Of an answer; of other turns only where `ends`."""
    ends: bool = True
    tail: str = ""
    start: str = ""
    system: str = ""
    """What the system says where it says nothing."""
    strip: bool = False

    def write(self, chat: Conversation) -> tuple[Segments, bool]:
        turns = _with_tools(chat)
        if self.system and (not turns or turns[0].role != "system"):
            turns = [Turn(role="system", text=self.system), *turns]
        pieces = [(self.start, False)]
        for turn in turns:
            text = turn.text.strip() if self.strip else turn.text
            end = self.end if self.ends or turn.role == "assistant" else ""
            pieces.append((self.heads.get(turn.role, self.head).format(role=turn.role), False))
            pieces.append((text + end, turn.trained))
            pieces.append((self.tail, False))
        return merge(pieces), True


@dataclass(frozen=True, kw_only=True)
class Own(Template):
    """The tokenizer's own template; what is trained on is found by rendering prefixes.

    The text of turn i is what the first i + 1 messages add to the first i with the generation
    prompt. White space behind it, which templates put between turns, is not trained on.
    """

    tokenizer: Any

    def write(self, chat: Conversation) -> tuple[Segments, bool]:
        messages = chat.messages()
        tools = json.loads(chat.tools) if chat.tools else None
        whole = self._render(messages, tools)
        pieces, done, closed = [], 0, True
        for i, turn in enumerate(chat.turns):
            if not turn.trained:
                continue
            before = self._render(messages[:i], tools, prompt=True)
            until = self._render(messages[: i + 1], tools)
            if not until.startswith(before):
                before = self._render(messages[:i], tools)
            if not (whole.startswith(until) and until.startswith(before) and len(before) >= done):
                raise Unwritable(
                    f"a chat template that writes messages[{i}] otherwise when more follows it",
                    "a text that begins with the text of its first messages",
                    "give problem.last_turn_only=true, or a template of ours such as "
                    "problem.template=chatml",
                )
            end = len(before) + len(until[len(before) :].rstrip())
            pieces += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
            done = end
            text = turn.text.strip()
            closed = turn.more != "" or not whole[len(before) : end].endswith(text)
        if whole[done:].strip():
            closed = True
        tail = whole[done:] if closed else ""
        return merge([*pieces, (tail, False)]), closed

    def _render(self, messages: list[dict], tools: Any, *, prompt: bool = False) -> str:
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
        try:
            template = self.tokenizer.get_chat_template(tools=tools)
            if "strftime_now" in template:
                options["chat_template"] = DATE + template
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates are code of others, which raises anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise Unwritable(
                f"a conversation that the tokenizer's chat template refuses ({reason})",
                "roles in the order that this model knows",
                "change or remove the record, or give problem.template=chatml, llama3, alpaca or "
                "plain",
            ) from None


def named(name: str, *, end: str) -> Template:
    """A template of ours.

    Args:
        name: chatml, llama3, alpaca or plain.
        end: The end token of the tokenizer, for those that have none of their own.

    >>> chat = Conversation(turns=(Turn(role="assistant", text="Yes.", trained=True),))
    >>> named("chatml", end="</s>").write(chat)[0][1]
    ('Yes.<|im_end|>', True)
    """
    if name == "chatml":
        return Named(head="<|im_start|>{role}\n", end="<|im_end|>", tail="\n")
    if name == "llama3":
        head = "<|start_header_id|>{role}<|end_header_id|>\n\n"
        return Named(head=head, end="<|eot_id|>", start="<|begin_of_text|>", strip=True)
    if name == "alpaca":  # the wording of Stanford Alpaca, laid out as by LLaMA-Factory
        heads = {"user": "### Instruction:\n", "assistant": "### Response:\n"}
        says = "Below is an instruction that describes a task. Write a response that appropriately "
        return Named(
            heads=heads | {"tool": "### Input:\n"},
            end=end,
            ends=False,
            tail="\n\n",
            system=says + "completes the request.",
        )
    return Named(end=end, ends=False, tail="\n")


def choose(name: Name, tokenizer: Any) -> Template:
    """The template that the option means for a tokenizer.

    Raises:
        InputError: If it means the tokenizer's own, and that has none.
    """
    if name not in ("auto", "tokenizer"):
        return named(name, end=getattr(tokenizer, "eos_token", None) or "")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the records are conversations, but the tokenizer has no chat template to write them; "
            "choose problem.template=chatml, llama3, alpaca or plain."
        )
    return Own(tokenizer=tokenizer)


def write(example: Example, style: Style, template: Template | None) -> tuple[Segments, bool]:
    """An example as text, and whether its end is written with it.

    Raises:
        Unwritable: If the template cannot write it.
    """
    if example.chat is None or template is None:
        return _restrict(example.segments, style), False
    chat = _last_turn(example.chat) if style.last_turn_only else example.chat
    segments, closed = template.write(chat)
    return _restrict(segments, style), closed


def _restrict(segments: Segments, style: Style) -> Segments:
    """The segments with what the options want trained on."""
    if style.train_on_prompt:
        return merge([(text, True) for text, _ in segments])
    if not style.last_turn_only:
        return segments
    last = max((i for i, (_, trained) in enumerate(segments) if trained), default=-1)
    return merge([(text, i == last) for i, (text, _) in enumerate(segments)])


def _last_turn(chat: Conversation) -> Conversation:
    """The conversation with its last answer alone trained on."""
    last = max((i for i, turn in enumerate(chat.turns) if turn.trained), default=-1)
    turns = (replace(turn, trained=i == last) for i, turn in enumerate(chat.turns))
    return replace(chat, turns=tuple(turns))


def _with_tools(chat: Conversation) -> list[Turn]:
    """The turns with calls in their text, and with the tools described by the system."""
    turns = [replace(turn, text=_with_calls(turn)) for turn in chat.turns]
    if not chat.tools:
        return turns
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in json.loads(chat.tools))
    about = (
        f"# Tools\n\nYou may call these functions:\n<tools>\n{tools}\n</tools>\n\nFor each call, "
        'return within <tool_call></tool_call> tags:\n<tool_call>\n{"name": <function-name>, '
        '"arguments": <args-json-object>}\n</tool_call>'
    )
    if turns and turns[0].role == "system":
        return [replace(turns[0], text=f"{turns[0].text}\n\n{about}"), *turns[1:]]
    return [Turn(role="system", text=about), *turns]


def _with_calls(turn: Turn) -> str:
    calls = json.loads(turn.more).get("tool_calls", []) if turn.more else []
    texts = [turn.text] if turn.text else []
    for call in calls:
        text = json.dumps(call["function"], ensure_ascii=False)
        texts.append(f"<tool_call>\n{text}\n</tool_call>")
    return "\n".join(texts)
