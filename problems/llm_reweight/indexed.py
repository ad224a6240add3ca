"""JSON Lines too large to hold: an index of their lines, and records read as they are asked for."""

from __future__ import annotations

import hashlib
import os
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from bilevel.errors import InputError
from bilevel.problems.llm_reweight import files
from bilevel.problems.llm_reweight.examples import Example, Former, Source
from bilevel.problems.llm_reweight.faults import SHOWN, fault, first
from bilevel.problems.llm_reweight.files import Record
from bilevel.problems.llm_reweight.formats import Reading

PIECE = 1 << 24
"""Bytes read at a time."""

HEAD, DRAWN = 1000, 2000
"""Records from the beginning, and records from anywhere, that are looked at before a run."""

LONGEST = 1 << 26
"""Bytes within which the first record has to end."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where the records of a file are.

    `starts`: [records + 1], offsets in bytes, the last one the size; `lines`: [records], their line
    numbers; `digests`: [records], 64 bits of each, of use in this process only.
    """

    starts: np.ndarray
    lines: np.ndarray
    digests: np.ndarray
    sha256: str
    size: int
    modified: int
    """Time of the last change, in nanoseconds."""


def scan(path: str) -> Index:
    """Read a file once, from end to end, keeping 20 bytes of each record."""
    whole, size, rest = hashlib.sha256(), 0, b""
    lengths, digests, blanks = [], [], []
    with open(path, "rb", buffering=0) as file:
        modified = os.fstat(file.fileno()).st_mtime_ns
        while piece := file.read(PIECE):
            whole.update(piece)
            size += len(piece)
            parts = (rest + piece).split(b"\n")
            rest = parts.pop()
            lengths.append(_each(len, parts, np.int64))
            if len(lengths) == 1 and parts:
                parts[0] = parts[0].removeprefix(BOM_UTF8)
            digests.append(_each(hash, parts, np.int64))
            blanks.append(_each(bytes.isspace, parts, np.bool_))
    lengths.append(_each(len, [rest], np.int64))
    digests.append(_each(hash, [rest], np.int64))
    blanks.append(_each(bytes.isspace, [rest], np.bool_))
    length = np.concatenate(lengths)
    kept = np.flatnonzero((length > 0) & ~np.concatenate(blanks))
    ends = np.cumsum(length + 1)
    starts = np.append((ends - length - 1)[kept], size)
    lines = (kept + 1).astype(np.uint32)
    return Index(
        starts=starts,
        lines=lines,
        digests=np.concatenate(digests)[kept],
        sha256=whole.hexdigest(),
        size=size,
        modified=modified,
    )


class Lines(Sequence[Example]):
    """The records of an indexed file, or some of them, each read and parsed when it is asked for.

    Args:
        path: The file.
        places: Of its records.
        former: What makes examples of records; it knows the format already.
        numbers: Which records of the file these are; all by default.
    """

    def __init__(
        self, path: str, places: Index, former: Former, numbers: np.ndarray | None = None
    ) -> None:
        self.path, self.places, self.former = path, places, former
        every = np.arange(len(places.lines), dtype=np.uint32)
        self.numbers: np.ndarray = every if numbers is None else numbers
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | Sequence[Example]:
        if isinstance(i, slice):
            return list(Lines(self.path, self.places, self.former, self.numbers[i]))
        example, faults = self.read(int(self.numbers[i]))
        if example is None:
            raise InputError([*faults, remedy(self.former.reading)])
        return example

    def __iter__(self) -> Iterator[Example]:
        """The records that can be used; another one is an error unless such are to be skipped."""
        for number in self.numbers:
            example, faults = self.read(int(number))
            if example is not None:
                yield example
            elif not self.former.reading.skip:
                raise InputError([*faults, remedy(self.former.reading)])

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    @cached_property
    def unlike(self) -> np.ndarray:
        """The numbers of these records in the file without those that repeat another one's line."""
        _, places = np.unique(self.places.digests[self.numbers], return_index=True)
        every = len(places) == len(self.numbers)
        return self.numbers if every else self.numbers[np.sort(places)]

    def part(self, start: int, step: int) -> Lines:
        """Every `step`-th of these records from `start` on."""
        return Lines(self.path, self.places, self.former, self.numbers[start::step])

    def without(self, start: int, step: int) -> Lines:
        """The others."""
        return Lines(
            self.path, self.places, self.former, np.delete(self.numbers, np.s_[start::step])
        )

    def looked_at(self) -> np.ndarray:
        """The numbers of those records that are looked at before a run: the same every time."""
        count = len(self.numbers)
        if count <= HEAD + DRAWN:
            return self.numbers
        drawn = np.random.default_rng(0).choice(np.arange(HEAD, count), DRAWN, replace=False)
        return self.numbers[np.concatenate([np.arange(HEAD), np.sort(drawn)])]

    def bytes_of(self, numbers: np.ndarray) -> np.ndarray:
        """[numbers], the bytes of the lines of these records."""
        return self.places.starts[numbers + 1] - self.places.starts[numbers]

    def read(self, number: int) -> tuple[Example | None, list[str]]:
        """A record of the file as an example, or its faults."""
        start, end = (int(offset) for offset in self.places.starts[number : number + 2])
        line = int(self.places.lines[number])
        data = self._bytes(start, end - start).strip()
        data = data.removeprefix(BOM_UTF8) if start == 0 else data
        last = end == self.places.size
        value, wrong = files.parse_line(data, self.path, line, last=last)
        if wrong:
            return None, [wrong]
        return self.former.form(Record(value=value, index=number, line=line))

    def _bytes(self, start: int, count: int) -> bytes:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        found = os.fstat(self._file)
        if (found.st_size, found.st_mtime_ns) != (self.places.size, self.places.modified):
            fix = "start again, with a file that nothing writes to"
            words = "a file that was changed while it is in use", "the file as it was"
            raise InputError(fault(self.path, *words, fix))
        return os.pread(self._file, count, start)


def is_large(path: str, reading: Reading) -> bool:
    """Whether a file is JSON Lines, uncompressed, and too large to be held."""
    try:
        if os.path.getsize(path) <= reading.held or not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            head = file.readline(LONGEST).removeprefix(BOM_UTF8)
            while head.isspace():
                head = file.readline(LONGEST)
    except (OSError, ValueError):  # told by who reads it
        return False
    if Path(path.lower()).suffix in (".txt", ".csv", ".tsv", ".parquet"):
        return False
    return head.lstrip().startswith(b"{") and head.rstrip().endswith(b"}")


def read_large(name: str, path: str, reading: Reading) -> Source:
    """A source whose records are read as they are asked for; some are looked at now.

    Raises:
        InputError: With the faults of those looked at, five written out, the others counted.
    """
    index = scan(path)
    former = Former(path, reading)
    lines = Lines(path, index, former)
    bad, good = [], 0
    for number in lines.looked_at():
        example, faults = lines.read(int(number))
        good += example is not None
        bad += [] if example is not None else [faults]
    faults = [sentence for sentences in bad for sentence in sentences]
    if bad and not (reading.skip and good):
        raise InputError(first(faults, path))
    return Source(
        name=name,
        path=path,
        format=former.format,
        examples=lines,
        sha256=index.sha256,
        size=index.size,
        skipped=len(bad),
        complaints=tuple(faults[:SHOWN]),
        columns=frozenset(former.columns),
    )


def same_lines(a: Lines, b: Source) -> list[tuple[int, int]]:
    """Record numbers (in a, in b) of lines that are equal byte for byte."""
    if isinstance(b.examples, Lines):
        numbers, digests = b.examples.numbers, b.examples.places.digests[b.examples.numbers]
    else:
        wanted = {example.line: example.index for example in b.examples if example.line is not None}
        rows = Path(b.path).read_bytes().split(b"\n") if wanted else []
        pairs = [(i, hash(rows[line - 1])) for line, i in wanted.items() if line <= len(rows)]
        if not pairs:
            return []
        numbers, digests = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    found = a.numbers[_among(a.places.digests[a.numbers], digests)]
    shared = _among(digests, a.places.digests[found]) if len(found) else np.zeros(0, np.int64)
    at = {int(digests[i]): int(numbers[i]) for i in reversed(shared)}
    return [(int(i), at[int(a.places.digests[i])]) for i in found]


def _among(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The places of those values that are among the wanted ones, in order."""
    known = np.unique(wanted)
    near = np.searchsorted(known, values).clip(max=len(known) - 1)
    return np.flatnonzero(known[near] == values)


def _each(function: Any, parts: Sequence[bytes], kind: Any) -> np.ndarray:
    return np.fromiter(map(function, parts), kind, len(parts))


def remedy(reading: Reading) -> str:
    """The sentence that follows the faults of a record that was met during a run."""
    if reading.skip:
        return "problem.on_bad_record=skip has no other record to take instead."
    return (
        "problem.on_bad_record=skip leaves such records out; a run with it goes on from the last "
        "checkpoint of this one."
    )
