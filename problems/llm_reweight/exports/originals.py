"""The records of a source's file as they stand there, and made into the few forms tools take."""

from __future__ import annotations

import hashlib
import json
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from bilevel import InputError
from bilevel.problems.llm_reweight import data as data_module
from bilevel.problems.llm_reweight import files, formats
from bilevel.problems.llm_reweight.data import Data
from bilevel.problems.llm_reweight.examples import Former
from bilevel.problems.llm_reweight.formats import Reading


class Originals:
    """The records of one file by number; lines of a large file are read when asked for.

    Args:
        name: Of the source.
        path: Of its file, or embedded:NAME for the demonstration.
        sha256: Of the file when the weights were learned.
        reading: How its records were taken; with `skip`, those that cannot be used are left out.

    Raises:
        InputError: If the file is not there, has changed since, or cannot be read by number.
    """

    def __init__(self, name: str, path: str, sha256: str, reading: Reading) -> None:
        self.name, self.path, self.reading = name, path, reading
        self._texts: list[str] | None = None
        self._starts = array("q")
        if path.startswith("embedded:"):
            self._texts = [_dumped({"text": text}) for text in _embedded(name, sha256)]
        else:
            _unchanged(name, path, sha256)
            if _has_lines(path):
                self._starts = array("q", _line_starts(path))
            else:
                found, _, plain = files.parse(files.read_bytes(path), path, skip=True)
                values = (record.value for record in found)
                self._texts = [_dumped({"text": v} if plain else v) for v in values]
        count = len(self._starts) if self._texts is None else len(self._texts)
        self.numbers: Sequence[int] = range(count)
        """Where each record stands among all of the file, from 0."""
        if reading.skip:
            self.numbers = array("q", self._usable())

    def __len__(self) -> int:
        return len(self.numbers)

    def lines(self, order: Sequence[int] | None = None) -> Iterator[str]:
        """Records on a line each, letter for letter as in the file if that has a line for each.

        Args:
            order: Which of them, as positions in `numbers`; all without it.
        """
        yield from self._lines(self.numbers if order is None else [self.numbers[i] for i in order])

    def record(self, line: str) -> dict[str, Any]:
        """The record of a line, with the keys of its format.

        Raises:
            InputError: If it is none, as in a large file that was never read as a whole.
        """
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(
                f"source {self.name}: {self.path} has a bad record, which the run never drew: "
                f"{line[:60]!r}; learn the weights with problem.on_bad_record=skip, which leaves "
                "such records out."
            )
        return formats.renamed(value, self.reading.columns)

    def messages(self, record: dict[str, Any]) -> list[dict[str, Any]] | None:
        """A record as a conversation of roles system, user, assistant and tool; None for text.

        Raises:
            InputError: If it cannot be one.
        """
        schema = formats.detect(record, use_chosen=self.reading.use_chosen)
        if schema is None:
            raise InputError(f"{self.path}: a record is in no known format: {record!r:.80}.")
        reading = replace(self.reading, as_chat=True)
        (_, chat), faults = formats.render(schema, record, self.path, reading)
        if faults:
            raise InputError(faults)
        return None if chat is None else chat.messages()

    def _lines(self, numbers: Sequence[int]) -> Iterator[str]:
        if self._texts is not None:
            yield from (self._texts[i] for i in numbers)
            return
        with open(self.path, "rb") as file:
            for i in numbers:
                file.seek(self._starts[i])
                yield file.readline().strip().decode("utf-8", errors="replace")

    def _usable(self) -> Iterator[int]:
        former = Former(self.path, self.reading)
        for number, line in enumerate(self._lines(self.numbers)):
            try:
                value = files.loads(line)
            except (ValueError, RecursionError):
                continue
            record = files.Record(value=value, index=number, line=None)
            if former.form(record)[0] is not None:
                yield number


def pair_of(record: dict[str, Any]) -> tuple[str, str] | None:
    """The keys of prompt and completion, None for a record of another format."""
    schema = formats.detect(record)
    if schema is None or schema[0] != "prompt_completion":
        return None
    return schema[1][0], schema[1][1]


def _has_lines(path: str) -> bool:
    """Whether a file is JSON Lines, so that its records can be read one by one."""
    if Path(path).suffix.lower() in (".txt", ".csv", ".tsv", ".parquet", ".gz", ".zst"):
        return False
    with open(path, "rb") as file:
        head = file.read(4)
        file.seek(0)
        first = next((line for line in file if line.strip(BOM_UTF8 + b" \t\r\n")), b"")
    if head.startswith((b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        return False
    try:
        value = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return first.lstrip(BOM_UTF8 + b" \t")[:1] == b"{" and first.rstrip()[-1:] == b"}"
    return isinstance(value, dict) and not isinstance(value.get("instances"), list)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _unchanged(name: str, path: str, sha256: str) -> None:
    if path == f"records of {name}":
        raise InputError(
            f"source {name} was given as records in memory; write them to a file, and learn the "
            "weights from that."
        )
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise InputError(
            f"source {name}: {path} cannot be read ({error.strerror}); put it back there."
        ) from None
    if digest.hexdigest() != sha256:
        raise InputError(
            f"source {name}: {path} has changed since its weight was learned (sha256 "
            f"{digest.hexdigest()[:16]}, was {sha256[:16]}); restore it, or learn the weights anew."
        )


def _line_starts(path: str) -> Iterator[int]:
    """Where each line that is not blank begins, in bytes."""
    place = 0
    with open(path, "rb") as file:
        for line in file:
            mark = len(BOM_UTF8) if place == 0 and line.startswith(BOM_UTF8) else 0
            if line[mark:].strip():
                yield place + mark
            place += len(line)


@lru_cache(maxsize=1)
def _demonstration() -> Data:
    return data_module.embedded_data()


def _embedded(name: str, sha256: str) -> list[str]:
    source = _demonstration().sources[name]
    if source.sha256 != sha256:
        raise InputError(
            f"source {name} of the demonstration is not what its weight was learned on: it comes "
            "with Python, and this is another version."
        )
    return ["".join(piece for piece, _ in example.segments) for example in source.examples]
