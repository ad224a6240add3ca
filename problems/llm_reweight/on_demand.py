"""Rows of a source that is not held in memory: read, written and tokenized as they are drawn."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.examples import Example, Source
from bilevel.problems.llm_reweight.faults import fault, first
from bilevel.problems.llm_reweight.indexed import HEAD, Lines, remedy
from bilevel.problems.llm_reweight.templates import Style, Template, Unwritable, choose, write

Row = tuple[tuple[int, ...], tuple[bool, ...], int]
"""Tokens, which of them are trained, and the record they are of."""

KEPT = 512
"""Rows that are remembered: those of a few batches, since a batch asks for each several times."""

TRIES = 100
"""Records in a row that may be bad before a draw gives up."""

log = logging.getLogger("bilevel")


class Column(Sequence[Any]):
    """One of the parts of every row."""

    def __init__(self, count: int, get: Callable[[int], Any]) -> None:
        self._count, self._get = count, get

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return tuple(self._get(j) for j in range(*i.indices(self._count)))
        if not -self._count <= i < self._count:
            raise IndexError(i)
        return self._get(int(i) % self._count)


class OnDemand:
    """Rows of at most `max_length` tokens from the records of an indexed file.

    A record is one row. One that is trained on throughout and longer than a row is as many as its
    bytes make, by the tokens in a byte of a sample; its text is cut into that many parts at white
    space. So how many rows there are is known without tokenizing all of them. A row depends on its
    number alone. Where bad records are skipped, the next good one takes the place.
    """

    def __init__(
        self, source: Source, lines: Lines, tokenizer: Any, max_length: int, style: Style
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.lines = Lines(lines.path, lines.places, lines.former, lines.unlike)
        self.max_length, self.style = max_length, style
        self.left_out = 0
        """Bad records met so far."""
        self.numbers = self.lines.numbers
        self._template: Template | None = None
        self._look()
        self.row = lru_cache(KEPT)(self._row)

    def __len__(self) -> int:
        return len(self.numbers) if self._ends is None else int(self._ends[-1])

    def columns(self) -> tuple[Column, Column, Column]:
        """Of ids, of trained, of records."""
        ids, trained, records = (
            Column(len(self), lambda i, part=part: self.row(i)[part]) for part in range(3)
        )
        return ids, trained, records

    def _look(self) -> None:
        """Estimate from a sample: rows, trained tokens, rows that are cut off."""
        looked = self.lines.looked_at()
        looked = looked[HEAD:] if len(looked) > HEAD else looked
        tokens, trained, cut, whole = 0, 0, 0, True
        good = []
        for number in looked:
            found = self._tokens(int(number))
            if isinstance(found, list):
                continue
            ids, marks = found
            good.append(number)
            tokens += len(ids)
            whole = whole and all(marks)
            kept = marks[-self.max_length :]
            trained += sum(kept[1:])
            cut += len(marks) > self.max_length
        if not good:
            number = int(looked[0])
            found = self._tokens(number)
            raise InputError(found if isinstance(found, list) else self.source.path)
        size = int(self.lines.bytes_of(np.array(good)).sum())
        sizes = self.lines.bytes_of(self.numbers)
        self._ends = None
        if whole:
            counts = np.ceil(sizes * (tokens / size / self.max_length)).astype(np.int64)
            self._ends = np.cumsum(np.maximum(counts, 1)) if counts.max() > 1 else None
            rows = len(self)
            self.trained_tokens = max(0, round(int(sizes.sum()) * tokens / size) - rows)
            self.truncated = 0
        else:
            self.trained_tokens = round(trained / len(good) * len(self.numbers))
            self.truncated = round(cut / len(good) * len(self.numbers))

    def _row(self, i: int) -> Row:
        faults: list[str] = []
        for j in range(i, i + TRIES):
            found = self._one(j % len(self))
            if not isinstance(found, list):
                return found
            faults = faults or found
            if not self.lines.former.reading.skip:
                break
            self.left_out += 1
            log.info("left out: %s", found[0])
        raise InputError([*first(faults, self.source.path), remedy(self.lines.former.reading)])

    def _one(self, i: int) -> Row | list[str]:
        """Row i, or the faults of its record."""
        place, part, parts = i, 0, 1
        if self._ends is not None:
            place = int(np.searchsorted(self._ends, i, side="right"))
            begin = int(self._ends[place - 1]) if place else 0
            part, parts = i - begin, int(self._ends[place]) - begin
        number = int(self.numbers[place])
        found = self._tokens(number, part, parts)
        if isinstance(found, list):
            return found
        ids, marks = found
        cut = slice(self.max_length) if all(marks) else slice(-self.max_length, None)
        kept = (False, *marks[cut][1:])
        if not any(kept):
            where = Example(segments=(), index=number, line=self._line(number))
            fix = f"remove the record or raise problem.max_length={self.max_length}"
            words = "no token left to train on", "a trained token behind another one"
            return [fault(where.where(self.source.path), *words, fix)]
        return tuple(ids[cut]), kept, number

    def _tokens(
        self, number: int, part: int = 0, parts: int = 1
    ) -> tuple[list[int], list[bool]] | list[str]:
        """The tokens of a record, or of one part of its text, and which are trained; or faults."""
        example, faults = self.lines.read(number)
        if example is None:
            return faults
        if example.chat is not None and self._template is None:
            self._template = choose(self.style.template, self.tokenizer)
        try:
            segments, closed = write(example, self.style, self._template)
        except Unwritable as error:
            where = example.where(self.source.path)
            return [fault(where, error.found, error.expected, error.fix)]
        if parts > 1 and len(segments) == 1:
            segments = ((_part(segments[0][0], part, parts), True),)
            closed = closed or part < parts - 1
        texts = [text for text, _ in segments]
        pieces = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [token for piece in pieces for token in piece]
        marks = [mark for piece, (_, mark) in zip(pieces, segments, strict=True) for _ in piece]
        end = self.tokenizer.eos_token_id
        if end is not None and marks and marks[-1] and not closed:
            ids.append(end)
            marks.append(True)
        return ids, marks

    def _line(self, number: int) -> int:
        return int(self.lines.places.lines[number])


def _part(text: str, part: int, parts: int) -> str:
    """One of several parts of a text of about equal length, cut at white space where there is."""
    begin, end = (_edge(text, k * len(text) // parts, parts) for k in (part, part + 1))
    return text[begin:end]


def _edge(text: str, at: int, parts: int) -> int:
    """The first white space from a place on, if there is one within half a part."""
    found = re.compile(r"\s").search(text, at, at + len(text) // (2 * parts))
    return found.start() if found and at else at
