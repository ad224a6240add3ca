"""Read training files into examples, or say everything that is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilevel.errors import InputError
from bilevel.problems.llm_reweight import files
from bilevel.problems.llm_reweight.examples import Example, Former, Source
from bilevel.problems.llm_reweight.faults import SHOWN, fault, first
from bilevel.problems.llm_reweight.files import Bad, Record
from bilevel.problems.llm_reweight.formats import Reading
from bilevel.problems.llm_reweight.indexed import Lines, is_large, read_large, same_lines


def read_source(name: str, path: str | os.PathLike[str], reading: Reading | None = None) -> Source:
    """Read one file of records, its format told by its first record.

    Of JSON Lines larger than `reading.held` the lines are indexed, and read when asked for.

    Raises:
        InputError: With the file's faults, five written out and the others counted.
    """
    shown, reading = os.fspath(path), reading or Reading()
    if is_large(shown, reading):
        return read_large(name, shown, reading)
    data = files.read_bytes(shown)
    records, bad, plain = files.parse(data, shown, skip=reading.skip)
    if plain:
        return _source(name, shown, "paragraphs", _paragraphs(records), bad, data)
    return _formed(name, shown, records, bad, reading, data)


def read_records(name: str, values: Sequence[Any], reading: Reading | None = None) -> Source:
    """Take records from memory: mappings in a list, or in a data set that gives them by number.

    Raises:
        InputError: With the faults of the records, five written out and the others counted.
    """
    taken = [values[i] for i in range(len(values))]
    records = [Record(value=value, index=i, line=None) for i, value in enumerate(taken)]
    data = json.dumps(taken, default=str).encode()
    return _formed(name, f"records of {name}", records, [], reading or Reading(), data)


def read_sources(
    paths: Mapping[str, Any], readings: Mapping[str, Reading] | None = None
) -> dict[str, Source]:
    """Read every file, and take what is no path as records; keeps the names and the order.

    Raises:
        InputError: With the faults of all files together.
    """
    sources: dict[str, Source] = {}
    faults: list[str] = []
    for name, given in paths.items():
        reading = (readings or {}).get(name)
        try:
            if isinstance(given, str | os.PathLike):
                sources[name] = read_source(name, os.fspath(given), reading)
            else:
                sources[name] = read_records(name, given, reading)
        except InputError as error:
            faults.extend(error.faults)
    if faults:
        raise InputError(faults)
    return sources


def name_paths(entries: Sequence[str], option: str = "sources") -> dict[str, str]:
    """Give every `name=path` or `path` a name: the one written, or the file's stem.

    Stems that clash get their parent folder in front, as in `parent-stem`.

    Args:
        entries: As written.
        option: What faults call them.

    Raises:
        InputError: If an entry is empty, a name comes twice or a file comes twice.
    """
    faults: list[str] = []
    pairs = _pairs(entries, option, faults)
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
            faults.append(fault(option, found, "one file for each name", fix))
    if faults:
        raise InputError(faults)
    return {name: path for name, (_, path) in zip(names, pairs, strict=True)}


def overlaps(a: Source, b: Source) -> list[tuple[int, int]]:
    """Return record numbers (in a, in b) with the same text once runs of whitespace are one space.

    A record of `a` comes once at most, with the first record of `b` that has its text. Where one
    of them is not held in memory, its lines are compared byte for byte, and some records by text.
    """
    first: dict[bytes, int] = {}
    for example in _compared(b):
        first.setdefault(_digest(example), example.index)
    pairs = ((example.index, first.get(_digest(example))) for example in _compared(a))
    found = {i: j for i, j in pairs if j is not None}
    if isinstance(a.examples, Lines):
        found = dict(same_lines(a.examples, b)) | found
    elif isinstance(b.examples, Lines):
        found = {i: j for j, i in reversed(same_lines(b.examples, a))} | found
    return sorted(found.items())


def texts_of(source: Source) -> set[bytes]:
    """What tells the texts of a source apart once runs of whitespace are one space."""
    return {_digest(example) for example in _compared(source)}


def _compared(source: Source) -> Iterable[Example]:
    """The records that are compared by their text."""
    if not isinstance(source.examples, Lines):
        return source.examples
    read = (source.examples.read(int(n))[0] for n in source.examples.looked_at())
    return (example for example in read if example is not None)


def _digest(example: Example) -> bytes:
    return hashlib.sha256(" ".join(example.text().split()).encode()).digest()


def _pairs(entries: Sequence[str], option: str, faults: list[str]) -> list[tuple[str | None, str]]:
    """The name that each entry gives, None without one, and its path; adds to the faults."""
    pairs: list[tuple[str | None, str]] = []
    seen: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if "/" in name and os.path.isfile(path) and not os.path.exists(entry):
            found, fix = f"the name {name!r} with a slash", "choose another name"
            faults.append(fault(option, found, "a name without", fix))
            continue
        if not equals or "/" in name or os.sep in name or os.path.exists(entry):
            pairs.append((None, entry))
        else:
            pairs.append((name.strip(), path.strip()))
        given, path = pairs[-1]
        if given == "" or not path.strip():
            fix = "write both sides, such as code=data/code.jsonl"
            faults.append(fault(option, f"{entry!r}", "name=path or path", fix))
            continue
        if "\0" in path:
            found, fix = f"a null byte in {entry!r}", "write the path without it"
            faults.append(fault(option, found, "the path of a file", fix))
            continue
        real = os.path.realpath(path)
        if real in seen:
            found = f"the same file twice, as {seen[real]!r} and {entry!r}"
            faults.append(fault(option, found, "every file once", "remove one of the two"))
        seen.setdefault(real, entry)
    return pairs


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


def _paragraphs(records: Sequence[Record]) -> list[Example]:
    return [Example(segments=((r.value, True),), index=r.index, line=r.line) for r in records]


def _formed(
    name: str, path: str, records: Sequence[Record], bad: Bad, reading: Reading, data: bytes
) -> Source:
    """A source in the format of its first record; of one other format the first record is told."""
    former, examples, told = Former(path, reading), list[Example](), set[str]()
    for record in records:
        example, faults = former.form(record)
        if example is not None:
            examples.append(example)
            continue
        mixed = "; ".join(faults).partition("found mixed schemas, ")[2].partition(" first at ")[0]
        bad.append([] if mixed in told else faults)
        told |= {mixed} if mixed else set()
    found = _source(name, path, former.format, examples, bad, data, skip=reading.skip)
    return replace(found, columns=frozenset(former.columns))


def _source(
    name: str,
    path: str,
    form: str,
    examples: Sequence[Example],
    bad: Bad,
    data: bytes,
    *,
    skip: bool = False,
) -> Source:
    faults = [sentence for sentences in bad for sentence in sentences]
    if not examples and not faults:
        fix = "put at least one record in it or leave the file out"
        faults = [fault(path, "no records", "at least one record", fix)]
    if faults and not (skip and examples):
        raise InputError(first(faults, path))
    return Source(
        name=name,
        path=path,
        format=form,
        examples=tuple(examples),
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        skipped=len(bad),
        complaints=tuple(faults[:SHOWN]),
    )
