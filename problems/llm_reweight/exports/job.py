"""What one export is about: the sources with weight, their shares, and where files may go."""

from __future__ import annotations

import filecmp
import json
import random
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bilevel import InputError
from bilevel.problems.llm_reweight.exports.shares import Shares, Unit
from bilevel.problems.llm_reweight.exports.source import Source
from bilevel.problems.llm_reweight.formats import Reading

Records = Literal["auto", "original", "messages"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The sources that are written for one tool, and the folder for it."""

    tool: str
    sources: tuple[Source, ...]
    unit: Unit
    everything: int
    """Records of all sources of the run, also of those without weight."""
    wanted: int
    """The total that was asked for, 0 for none."""
    records: Records
    per_source: bool
    paths: dict[str, str]
    """Where a source's tokenized data lie, for the tools that take such."""
    seed: int
    target: Path
    """The folder as the files name it: where they will lie in the end."""
    folder: Path
    """The folder in which they are made."""

    @cached_property
    def shares(self) -> Shares:
        return Shares(
            weights=tuple(s.weight for s in self.sources),
            records=tuple(s.records for s in self.sources),
            tokens=tuple(s.tokens for s in self.sources),
            unit=self.unit,
        )

    @property
    def total(self) -> int:
        """Examples of the set: what was asked for, else as many as there are records."""
        return self.wanted or self.everything

    @property
    def whole(self) -> int:
        """Draws after which every source was used up at its share, max_i n_i / q_i."""
        q, n = self.shares.examples, self.shares.records
        return round(max(records / share for records, share in zip(n, q, strict=True)))

    @cached_property
    def form(self) -> Literal["text", "alpaca", "messages"]:
        """The form that all records can be given."""
        if all(s.is_text for s in self.sources):
            return "text"
        alpaca = all(s.format == "alpaca" for s in self.sources)
        return "alpaca" if alpaca and self.records != "messages" else "messages"

    @cached_property
    def alike(self) -> bool:
        """Whether the records of all sources have the same keys, so that they can stay as they are.

        Keys that only some formats have, such as numbers of records, may differ.
        """
        kinds = {"text" if s.is_text else s.format for s in self.sources}
        taken = {replace(s.reading, skip=False) for s in self.sources}
        if len(kinds) > 1 or taken != {Reading()}:
            return False
        pairs = kinds == {"prompt_completion"}
        return not pairs or len({source.pair for source in self.sources}) == 1

    def generator(self, name: str) -> random.Random:
        """Of the order of a source, or of a set; independent of all others."""
        return random.Random(f"{self.seed}/{name}")

    def picks(self, index: int, count: int) -> list[int]:
        """Records of a source: whole copies first, then without replacement, in random order."""
        source = self.sources[index]
        copies, rest = divmod(count, source.records)
        generator = self.generator(source.name)
        found = list(range(source.records)) * copies
        found += generator.sample(range(source.records), rest)
        generator.shuffle(found)
        return found

    def originals(self, rows: Sequence[tuple[int, int]]) -> Iterator[str]:
        """The records of these sources and numbers, each a line."""
        own: list[list[int]] = [[] for _ in self.sources]
        for source, index in rows:
            own[source].append(index)
        readers = [s.originals.lines(o) for s, o in zip(self.sources, own, strict=True)]
        return (next(readers[source]) for source, _ in rows)

    def quoted(self, name: str) -> str:
        """A file of the folder as a shell takes it."""
        return shlex.quote(str(self.target / name))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def write_lines(self, name: str, lines: Iterable[str]) -> None:
        with (self.folder / name).open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)

    def convert(
        self, name: str, source: Source, form: Form, order: Sequence[int] | None = None
    ) -> str:
        """Write a source's records in another form; returns the path that tools are given."""
        lines = source.originals.lines(order)
        self.write_lines(name, (formed(source, line, form) for line in lines))
        return str(self.target / name)


def formed(source: Source, line: str, form: Form) -> str:
    """A record's line in another form."""
    return json.dumps(form(source, source.originals.record(line)), ensure_ascii=False)


def as_messages(source: Source, record: dict[str, Any]) -> dict[str, Any]:
    """A record as a conversation, with its tools if it has any."""
    more = {"tools": record["tools"]} if record.get("tools") else {}
    return {"messages": source.messages(record)} | more


def as_text(source: Source, record: dict[str, Any]) -> dict[str, Any]:
    return {"text": record["text"]}


Form = Callable[[Source, dict[str, Any]], dict[str, Any]]
"""Makes another form of a source's record."""


def put(made: Path, target: Path, *, force: bool) -> str:
    """Move a folder to its place; what was there before stays, moved aside if need be.

    Returns:
        What became of it, in a word or two.

    Raises:
        InputError: If other files are there.
    """
    if not target.exists():
        made.rename(target)
        return "written"
    if not target.is_dir():
        raise InputError(f"{target} is a file, expected a folder or nothing; move it away.")
    other = _differences(made, target)
    if not other:
        shutil.rmtree(made)
        return "unchanged"
    if not force:
        raise InputError(
            f"{target} already holds other files ({', '.join(other[:3])}"
            f"{', ...' if len(other) > 3 else ''}); move it away, or give --force, which renames "
            "it."
        )
    aside = (target.with_name(f"{target.name}.before-{i}") for i in range(1, 10_000))
    free = next(path for path in aside if not path.exists())
    target.rename(free)
    made.rename(target)
    return f"written, what was there is now {free.name}"


def _differences(a: Path, b: Path) -> list[str]:
    names = sorted({str(p.relative_to(root)) for root in (a, b) for p in root.rglob("*")})
    return [name for name in names if not _same(a / name, b / name)]


def _same(a: Path, b: Path) -> bool:
    if a.is_dir() or b.is_dir():
        return a.is_dir() and b.is_dir()
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)
