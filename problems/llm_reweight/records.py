"""Read training files into examples, or say everything that is wrong with them."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.formats import (
    ACCEPTED,
    Schema,
    Segments,
    describe,
    detect,
    fault,
    kind,
    malformed,
    render,
)

SHOWN = 5
"""How many faults of one file are written out; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as text."""

    segments: Segments
    """Pieces of text in order, each with whether its tokens are trained on."""
    index: int
    """Record number in the file, from 0."""
    line: int | None
    """Line number in the file, from 1; None for a JSON array."""

    def where(self, path: str) -> str:
        """The place in a file, for messages."""
        return _Record(value=None, index=self.index, line=self.line).where(path)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of examples."""

    name: str
    path: str
    format: str
    examples: tuple[Example, ...]
    sha256: str
    size: int
    """Bytes in the file."""

    @property
    def identity(self) -> str:
        """What tells the file's content from any other's, wherever the file lies."""
        return f"{Path(self.path).name}, {self.size:,} bytes, sha256 {self.sha256[:16]}"


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One JSON value of a file, with where it stands."""

    value: Any
    index: int
    line: int | None

    def place(self) -> str:
        if self.line is None:
            return f"record {self.index} (counting from 0)"
        return f"line {self.line}"

    def where(self, path: str) -> str:
        return f"{path}: {self.place()}" if self.line is None else f"{path}:{self.line}"


def read_source(name: str, path: str | os.PathLike[str]) -> Source:
    """Read one file of records, its format told by its first record.

    Raises:
        InputError: With the file's faults, five written out and the others counted.
    """
    shown = os.fspath(path)
    data = _read_bytes(shown)
    text = _decode(data, shown)
    faults: list[str] = []
    if Path(shown).suffix.lower() == ".txt":
        format_name, examples = "paragraphs", _paragraphs(text, shown, faults)
    else:
        format_name, examples = _examples(_records(text, shown, faults), shown, faults)
    if not examples and not faults:
        fix = "put at least one record in it or leave the file out"
        faults.append(fault(shown, "no records", "at least one record", fix))
    if faults:
        more = len(faults) - SHOWN
        raise InputError(faults[:SHOWN] + ([f"{shown}: and {more} more."] if more > 0 else []))
    return Source(
        name=name,
        path=shown,
        format=format_name,
        examples=tuple(examples),
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
    )


def read_sources(paths: Mapping[str, str]) -> dict[str, Source]:
    """Read every file, keeping the names and the order.

    Raises:
        InputError: With the faults of all files together.
    """
    sources: dict[str, Source] = {}
    faults: list[str] = []
    for name, path in paths.items():
        try:
            sources[name] = read_source(name, path)
        except InputError as error:
            faults.extend(error.faults)
    if faults:
        raise InputError(faults)
    return sources


def name_paths(entries: Sequence[str]) -> dict[str, str]:
    """Give every `name=path` or `path` a name: the one written, or the file's stem.

    Stems that clash get their parent folder in front, as in `parent-stem`.

    Raises:
        InputError: If an entry is empty, a name comes twice or a file comes twice.
    """
    faults: list[str] = []
    pairs: list[tuple[str | None, str]] = []
    seen: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if "/" in name and os.path.isfile(path) and not os.path.exists(entry):
            found, fix = f"the name {name!r} with a slash", "choose another name"
            faults.append(fault("sources", found, "a name without", fix))
            continue
        if not equals or "/" in name or os.sep in name or os.path.exists(entry):
            pairs.append((None, entry))
        else:
            pairs.append((name.strip(), path.strip()))
        given, path = pairs[-1]
        if given == "" or not path.strip():
            fix = "write both sides, such as code=data/code.jsonl"
            faults.append(fault("sources", f"{entry!r}", "name=path or path", fix))
            continue
        if "\0" in path:
            found, fix = f"a null byte in {entry!r}", "write the path without it"
            faults.append(fault("sources", found, "the path of a file", fix))
            continue
        real = os.path.realpath(path)
        if real in seen:
            found = f"the same file twice, as {seen[real]!r} and {entry!r}"
            faults.append(fault("sources", found, "every file once", "remove one of the two"))
        seen.setdefault(real, entry)
    if faults:
        raise InputError(faults)
    names = _names(pairs)
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            of = ", ".join(
                path for other, (_, path) in zip(names, pairs, strict=True) if other == name
            )
            found = f"the name {name!r} for several files ({of})"
            fix = "give each its own name, as in name=path"
            faults.append(fault("sources", found, "one file for each name", fix))
    if faults:
        raise InputError(faults)
    return {name: path for name, (_, path) in zip(names, pairs, strict=True)}


def overlaps(a: Source, b: Source) -> list[tuple[int, int]]:
    """Return record numbers (in a, in b) with the same text once runs of whitespace are one space.

    A record of `a` comes once at most, with the first record of `b` that has its text.
    """
    first: dict[bytes, int] = {}
    for example in b.examples:
        first.setdefault(_digest(example), example.index)
    pairs = ((example.index, first.get(_digest(example))) for example in a.examples)
    return [(i, j) for i, j in pairs if j is not None]


def _digest(example: Example) -> bytes:
    text = "".join(piece for piece, _ in example.segments)
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def _names(pairs: Sequence[tuple[str | None, str]]) -> list[str]:
    """Name the files, lengthening clashing stems by one parent folder after another."""
    parts = [Path(os.path.abspath(path)) for _, path in pairs]
    depth = [0] * len(pairs)
    while True:
        names = [
            given
            if given is not None
            else "-".join([*(p.name for p in reversed(file.parents[:d]) if p.name), file.stem])
            for (given, _), file, d in zip(pairs, parts, depth, strict=True)
        ]
        clashing = [
            i
            for i, (given, _) in enumerate(pairs)
            if given is None and names.count(names[i]) > 1 and depth[i] < len(parts[i].parents)
        ]
        if not clashing:
            return names
        for i in clashing:
            depth[i] += 1


def _read_bytes(path: str) -> bytes:
    if os.path.isdir(path):
        fix = "name one file inside it"
        raise InputError(fault(path, "a folder", "a file of records", fix))
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(_missing(path)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        found = f"a file that cannot be read ({reason})"
        raise InputError(fault(path, found, "a readable file", "check its permissions")) from None
    if not data:
        fix = "put at least one record in it or leave the file out"
        raise InputError(fault(path, "an empty file", "at least one record", fix))
    return data


def _missing(path: str) -> str:
    folder = Path(path).parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return fault(path, f"no folder {folder}", "an existing file", "check the path")
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    fix = f"did you mean {folder / near[0]}" if near else "check the path, nothing there is similar"
    return fault(path, "no such file", "an existing file", fix)


def _decode(data: bytes, path: str) -> str:
    """Return the text with line ends as \\n and without a byte order mark."""
    try:
        text = data.decode("utf-8-sig")
        offset = data.find(b"\0")
    except UnicodeDecodeError as error:
        # With a byte order mark the decoder counts from behind it.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
    else:
        if offset < 0:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    line = data.count(b"\n", 0, offset) + 1
    found = f"byte 0x{data[offset]:02x} at byte offset {offset}"
    if data.startswith(b"\x1f\x8b"):
        fix = f"decompress it with gunzip {path}"
    else:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[offset] == 0
        encoding = "UTF-16" if wide else "WINDOWS-1252"
        fix = f"convert it to UTF-8, for example iconv -f {encoding} -t UTF-8 {path} > utf8.jsonl"
    raise InputError(fault(f"{path}:{line}", found, "text in UTF-8", fix))


def _paragraphs(text: str, path: str, faults: list[str]) -> list[Example]:
    """Split text at blank lines."""
    examples: list[Example] = []
    start, block = 1, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            segments = (("\n".join(block), True),)
            examples.append(Example(segments=segments, index=len(examples), line=start))
            block = []
    if examples:
        head = examples[0].segments[0][0].split("\n")[0]
        try:
            value = json.loads(head)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            where, fix = f"{path}:{examples[0].line}", "rename the file to end in .jsonl"
            faults.append(fault(where, "a JSON object", "plain paragraphs in a .txt file", fix))
    return examples


def _records(text: str, path: str, faults: list[str]) -> list[_Record]:
    """Parse JSON Lines, or one JSON array, whatever the file is called."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            faults.append(malformed(text, path, error))
            return []
        return [_Record(value=value, index=i, line=None) for i, value in enumerate(values)]
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and lines[0][1] == "{":
        fix = "write each record on one line or put all of them in one JSON array [...]"
        found = "a JSON object over several lines"
        faults.append(fault(f"{path}:{lines[0][0]}", found, "one JSON object on each line", fix))
        return []
    records: list[_Record] = []
    for index, (number, line) in enumerate(lines):
        try:
            records.append(_Record(value=json.loads(line), index=index, line=number))
        except (ValueError, RecursionError) as error:
            last = number if index == len(lines) - 1 else None
            faults.append(malformed(line, path, error, line=number, last=last is not None))
    return records


def _examples(
    records: Sequence[_Record], path: str, faults: list[str]
) -> tuple[str, list[Example]]:
    """Turn records into examples, all in the format of the first that has one."""
    examples: list[Example] = []
    chosen: Schema | None = None
    first: _Record | None = None
    mixed: set[Schema] = set()
    for record in records:
        value, where = record.value, record.where(path)
        if not isinstance(value, dict):
            fix = 'write it as an object, such as {"text": "..."}'
            faults.append(fault(where, kind(value), "a JSON object", fix))
            continue
        schema = detect(value)
        if schema is None:
            found = f"keys {', '.join(value) or '(none)'}"
            faults.append(fault(where, found, ACCEPTED, "rename the keys"))
            continue
        if chosen is None or first is None:
            chosen, first = schema, record
        if schema == chosen:
            segments, wrong = render(schema, value, where)
            faults.extend(wrong)
            examples.append(Example(segments=segments, index=record.index, line=record.line))
        elif schema not in mixed:
            mixed.add(schema)
            found = f"mixed schemas, {describe(schema)} first at {record.place()}"
            expected = f"{describe(chosen)} as at {first.place()}"
            fix = "keep one format in a file, and give the others files of their own"
            faults.append(fault(where, found, expected, fix))
    return (chosen[0] if chosen else ""), examples
