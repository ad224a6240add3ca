"""Files of any kind made into records: JSON, tables and text, compressed or not."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.compressed import MOST, decompressed, not_installed, too_large
from bilevel.problems.llm_reweight.faults import fault, malformed, place

NESTED = ("messages", "conversations", "tools", "history", "chosen", "rejected")
"""Keys of lists and objects; the cells of such columns hold JSON where a table cannot."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One value of a file, with where it stands."""

    value: Any
    index: int
    line: int | None

    def place(self) -> str:
        """In words, for within a file."""
        if self.line is None:
            return f"record {self.index} (counting from 0)"
        return f"line {self.line}"

    def where(self, path: str) -> str:
        """With the file."""
        return place(path, self.index, self.line)


Bad = list[list[str]]
"""The faults of each bad record; a record may be bad for what is already said of another."""


def read_bytes(path: str) -> bytes:
    """The content of a file.

    Raises:
        InputError: If there is none.
    """
    if os.path.isdir(path):
        fix = "name one file inside it"
        raise InputError(fault(path, "a folder", "a file of records", fix))
    try:
        size = os.path.getsize(path)
        if size > MOST:
            raise InputError(too_large(path, size))
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(_missing(path)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        found = f"a file that cannot be read ({reason})"
        raise InputError(fault(path, found, "a readable file", "check its permissions")) from None
    if not data:
        fix = "put at least one record in it or leave the file out"
        raise InputError(fault(path, "an empty file", "at least one record", fix))
    return data


def parse(data: bytes, path: str, *, skip: bool = False) -> tuple[list[Record], Bad, bool]:
    """The records in the content of a file, what kind of file it is told by its name.

    Args:
        data: What the file holds.
        path: Its name.
        skip: Whether lines that are not UTF-8 count as bad records, not as a bad file.

    Returns:
        The records, the bad ones, and whether they are paragraphs of plain text.

    Raises:
        InputError: If nothing of the file can be used.
    """
    data, suffix = decompressed(data, path)
    if suffix == ".parquet" or data.startswith(b"PAR1"):
        return _parquet(data, path), [], False
    bad: Bad = []
    text = _decode(data, path, bad, skip=skip)
    if suffix == ".txt":
        return _paragraphs(text, path), bad, True
    if suffix in (".csv", ".tsv"):
        return _table(text, path, "\t" if suffix == ".tsv" else ",", bad), bad, False
    return _json(text, path, bad), bad, False


def loads(text: str) -> Any:
    """A JSON value; objects that have a key twice keep its name under None, see `chat.twice`."""
    return json.loads(text, object_pairs_hook=_object)


def parse_line(line: bytes, path: str, number: int, *, last: bool) -> tuple[Any, str]:
    """The value of one line of JSON Lines, or the fault of it."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, _encoding(line, path, number, error.start)
    try:
        return loads(text), ""
    except (ValueError, RecursionError) as error:
        return None, malformed(text, path, error, line=number, last=last)


def _object(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        found[None] = next(name for name in names if names.count(name) > 1)
    return found


def _missing(path: str) -> str:
    folder = Path(path).parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return fault(path, f"no folder {folder}", "an existing file", "check the path")
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    fix = f"did you mean {folder / near[0]}" if near else "check the path, nothing there is similar"
    return fault(path, "no such file", "an existing file", fix)


def _decode(data: bytes, path: str, bad: Bad, *, skip: bool) -> str:
    """Return the text with line ends as \\n and without a byte order mark."""
    try:
        text = data.decode("utf-8-sig")
        offset = data.find(b"\0")
    except UnicodeDecodeError as error:
        # With a byte order mark the decoder counts from behind it.
        offset = error.start + (3 if data.startswith(BOM_UTF8) else 0)
        text = ""
    if offset >= 0:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[offset] == 0
        if not skip or wide:
            line = data.count(b"\n", 0, offset) + 1
            raise InputError(_encoding(data, path, line, offset))
        text = "\n".join(_decoded_lines(data.removeprefix(BOM_UTF8), path, bad))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded_lines(data: bytes, path: str, bad: Bad) -> Iterator[str]:
    """The lines of a file, blank where they are not UTF-8."""
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            bad.append([_encoding(line, path, number, error.start)])
            yield ""


def _encoding(data: bytes, path: str, line: int, offset: int) -> str:
    found = f"byte 0x{data[offset]:02x} at byte offset {offset}"
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[offset] == 0
    encoding = "UTF-16" if wide else "WINDOWS-1252"
    fix = f"convert it to UTF-8, for example iconv -f {encoding} -t UTF-8 {path} > utf8.jsonl"
    return fault(f"{path}:{line}", found, "text in UTF-8", fix)


def _paragraphs(text: str, path: str) -> list[Record]:
    """Split text at blank lines."""
    records: list[Record] = []
    start, block = 1, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            records.append(Record(value="\n".join(block), index=len(records), line=start))
            block = []
    if records:
        try:
            value = json.loads(records[0].value.split("\n")[0])
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            where, fix = f"{path}:{records[0].line}", "rename the file to end in .jsonl"
            expected = "plain paragraphs in a .txt file"
            raise InputError(fault(where, "a JSON object", expected, fix))
    return records


def _json(text: str, path: str, bad: Bad) -> list[Record]:
    """Parse JSON Lines, one JSON array or LMFlow's object, whatever the file is called."""
    if text.lstrip().startswith("["):
        try:
            values = loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(malformed(text, path, error)) from None
        return _unnumbered(values)
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if (instances := _instances(text, lines, path)) is not None:
        return _unnumbered(instances)
    records: list[Record] = []
    for index, (number, line) in enumerate(lines):
        try:
            records.append(Record(value=loads(line), index=index, line=number))
        except (ValueError, RecursionError) as error:
            last = index == len(lines) - 1
            bad.append([malformed(line, path, error, line=number, last=last)])
    return records


def _unnumbered(values: Sequence[Any]) -> list[Record]:
    return [Record(value=value, index=i, line=None) for i, value in enumerate(values)]


def _instances(text: str, lines: Sequence[tuple[int, str]], path: str) -> list[Any] | None:
    """The records of LMFlow's {"type": ..., "instances": [...]}, if the file is one object."""
    if not lines or not lines[0][1].startswith("{"):
        return None
    over_several = not lines[0][1].endswith("}") or lines[0][1] == "{"
    if not over_several and len(lines) > 1:
        return None
    try:
        value = loads(text)
    except (ValueError, RecursionError):
        value = {}
    found = value.get("instances")
    if isinstance(found, list) and ("type" in value or len(value) == 1):
        if not found:
            fix = "put at least one record in it or leave the file out"
            raise InputError(fault(path, "no instances", "at least one record", fix))
        return found
    if lines[0][1] == "{" or (over_several and value):
        fix = "write each record on one line or put all of them in one JSON array [...]"
        found = "a JSON object over several lines"
        where = f"{path}:{lines[0][0]}"
        raise InputError(fault(where, found, "one JSON object on each line", fix))
    return None


def _table(text: str, path: str, delimiter: str, bad: Bad) -> list[Record]:
    """Rows of a table with a header, each cell a string."""
    csv.field_size_limit(MOST)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[Record] = []
    header: list[str] | None = None
    index, line = 0, 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return records
        except csv.Error as error:
            fix = "put quotes around cells with quotes or line ends, and double the quotes inside"
            found = f"a row that cannot be read ({error})"
            bad.append([fault(f"{path}:{line}", found, "cells as RFC 4180 has them", fix)])
            return records
        if not any(cell.strip() for cell in row):
            pass
        elif header is None:
            header = [name.strip() for name in row]
            _check_header(header, f"{path}:{line}")
        else:
            if len(row) == len(header):
                value = _cells(dict(zip(header, row, strict=True)))
                records.append(Record(value=value, index=index, line=line))
            else:
                found, expected = f"{len(row)} cells", f"{len(header)} as in the header"
                fix = "put quotes around cells that hold the separator"
                bad.append([fault(f"{path}:{line}", found, expected, fix)])
            index += 1
        line = rows.line_num + 1


def _check_header(header: Sequence[str], where: str) -> None:
    name = next((name for name in header if header.count(name) > 1), None)
    if name is not None:
        found = f"the column {name!r:.60} twice in the header"
        fix = "rename one of the two, or give the file a first line with the names of its columns"
        raise InputError(fault(where, found, "every column once", fix))


def _cells(row: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = dict(row)
    for name in NESTED:
        if found.get(name, "").lstrip().startswith(("[", "{")):
            try:
                found[name] = loads(found[name])
            except (ValueError, RecursionError):
                continue  # told as text where a list is expected
    return found


def _parquet(data: bytes, path: str) -> list[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(not_installed(path, "pyarrow", "write it as .jsonl")) from None
    try:
        # pyarrow 26: threads that have read from memory may abort the process when it ends
        file = parquet.ParquetFile(pyarrow.BufferReader(data), pre_buffer=False)
        rows = file.read(use_threads=False).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        found, fix = f"no readable Parquet data ({reason})", "write the file again"
        raise InputError(fault(path, found, "a Parquet file", fix)) from None
    return _unnumbered(rows)
