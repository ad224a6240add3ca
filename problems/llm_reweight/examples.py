"""Records of any format made into examples, and what is known of a source of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilevel.problems.llm_reweight.chat import Conversation, twice
from bilevel.problems.llm_reweight.faults import fault, kind, place
from bilevel.problems.llm_reweight.files import Record
from bilevel.problems.llm_reweight.formats import (
    ACCEPTED,
    Reading,
    Schema,
    Segments,
    describe,
    detect,
    renamed,
    render,
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record: text, or a conversation that a chat template has to write."""

    segments: Segments
    """Pieces of text in order, each with whether its tokens are trained on."""
    chat: Conversation | None = None
    """The conversation, where there is one; then there are no segments."""
    index: int
    """Record number in the file, from 0."""
    line: int | None
    """Line number in the file, from 1; None for a JSON array."""

    def where(self, path: str) -> str:
        """The place in a file, for messages."""
        return place(path, self.index, self.line)

    def text(self) -> str:
        """All of its text, without what a template adds."""
        if self.chat is not None:
            return " ".join(turn.text for turn in self.chat.turns)
        return "".join(piece for piece, _ in self.segments)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of examples."""

    name: str
    path: str
    format: str
    examples: Sequence[Example]
    sha256: str
    size: int
    """Bytes in the file."""
    skipped: int = 0
    """Bad records that were left out."""
    complaints: tuple[str, ...] = ()
    """What was wrong with the first of them."""
    columns: frozenset[str] = frozenset()
    """Those of `Reading.columns` that records have."""

    @property
    def identity(self) -> str:
        """What tells the file's content from any other's, wherever the file lies."""
        return f"{Path(self.path).name}, {self.size:,} bytes, sha256 {self.sha256[:16]}"


class Former:
    """Makes examples of the records of one file, all in the format of the first that has one."""

    def __init__(self, path: str, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.schema: Schema | None = None
        self.columns: set[str] = set()
        """Those of the options that records had."""
        self._first = ""

    @property
    def format(self) -> str:
        """The name of the format, empty before the first record."""
        return self.schema[0] if self.schema else ""

    def form(self, record: Record) -> tuple[Example | None, list[str]]:
        """The example that a record holds, or its faults."""
        value, where = record.value, record.where(self.path)
        if not isinstance(value, dict):
            fix = 'write it as an object, such as {"text": "..."}'
            return None, [fault(where, kind(value), "a JSON object", fix)]
        if None in value:
            return None, [twice(value, "", where)]
        if self.reading.columns:
            self.columns |= {key for _, key in self.reading.columns} & value.keys()
            value = renamed(value, self.reading.columns)
        schema = detect(value, use_chosen=self.reading.use_chosen)
        if schema is None:
            found = f"keys {', '.join(record.value) or '(none)'}"
            fix = "rename the keys, or name them with problem.columns"
            return None, [fault(where, found, ACCEPTED, fix)]
        if self.schema is None:
            self.schema, self._first = schema, record.place()
        if schema != self.schema:
            found = f"mixed schemas, {describe(schema)} first at {record.place()}"
            expected = f"{describe(self.schema)} as at {self._first}"
            fix = "keep one format in a file, and give the others files of their own"
            return None, [fault(where, found, expected, fix)]
        (segments, chat), faults = render(schema, value, where, self.reading)
        example = Example(segments=segments, chat=chat, index=record.index, line=record.line)
        return (None if faults else example), faults
