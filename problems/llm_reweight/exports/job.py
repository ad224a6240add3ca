"""What one export is about: the sources with weight, their shares, and where files may go."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bilevel import InputError
from bilevel.problems.llm_reweight.exports import originals
from bilevel.problems.llm_reweight.exports.originals import Originals
from bilevel.problems.llm_reweight.exports.shares import Shares, Unit
from bilevel.problems.llm_reweight.formats import FIELDS, Reading

NESTED = ("messages", "conversations", "tools", "history", "chosen", "rejected")
STRINGS = tuple(key for key in FIELDS if key not in NESTED)
"""Keys whose values most tools expect to be strings."""

Records = Literal["auto", "original", "messages"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the records of a source have in common, found in one pass over them."""

    keys: frozenset[str]
    """Every key of any record."""
    plain: bool
    """Whether all that is said in them is strings, as most tools expect."""
    calls: bool
    """Whether tools are called in them."""
    answers: int
    """Turns of the assistant."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of weights.json."""

    name: str
    path: str
    sha256: str
    format: str
    records: int
    tokens: float
    """Trained tokens of a record on average."""
    weight: float
    reading: Reading
    """How its records were taken."""
    unsifted: bool = False
    """Whether bad records were left out as they were met, so that `records` counts them too."""
    key: str
    """Its name in letters, digits, dots, dashes and underscores, as no other has it."""

    @property
    def is_text(self) -> bool:
        return self.format in ("text", "paragraphs")

    @property
    def is_json(self) -> bool:
        """Whether tools can read its file as it is, if they take its format."""
        embedded = self.path.startswith("embedded:")
        plain = Path(self.path).suffix in (".json", ".jsonl") and not embedded
        return plain and self.reading == Reading()

    @cached_property
    def originals(self) -> Originals:
        """Its records, once its file was found unchanged."""
        found = Originals(self.name, self.path, self.sha256, self.reading)
        if len(found) != self.records and not self.unsifted:
            raise InputError(
                f"source {self.name}: {self.path} has {len(found):,} records, of which "
                f"{self.records:,} were used; remove the others, and learn the weights anew."
            )
        return found

    @cached_property
    def usable(self) -> Source:
        """Itself, with the number of records that are not bad; looks at each where that is open."""
        if not self.unsifted:
            return self
        found = replace(self, records=len(self.originals))
        vars(found)["originals"] = self.originals  # as cached_property would
        return found

    @cached_property
    def facts(self) -> Facts:
        names: set[str] = set()
        plain, calls, answers = True, False, 0
        for line in self.originals.lines():
            record = self.originals.record(line)
            names |= record.keys()
            said = record.get("messages")
            values = [m.get("content") for m in said] if isinstance(said, list) else []
            values += [record[key] for key in STRINGS if key in record]
            plain = plain and all(isinstance(v, str) for v in values if v is not None)
            found = self.messages(record)
            calls = calls or any(m["role"] == "tool" or "tool_calls" in m for m in found)
            answers += sum(message["role"] == "assistant" for message in found)
        return Facts(keys=frozenset(names), plain=plain, calls=calls, answers=answers)

    @cached_property
    def pair(self) -> tuple[str, str] | None:
        """The keys of prompt and completion, None for other formats."""
        return originals.pair_of(self.first)

    @cached_property
    def first(self) -> dict[str, Any]:
        """Its first record."""
        return self.originals.record(next(self.originals.lines([0])))

    def messages(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """A record as a conversation.

        Plain text becomes the answer to an empty question, since few chat templates begin with the
        assistant.
        """
        found = self.originals.messages(record)
        if found is not None:
            return found
        return [{"role": "user", "content": ""}, {"role": "assistant", "content": record["text"]}]


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


def load(run: Path) -> tuple[dict[str, Any], tuple[Source, ...], list[str]]:
    """weights.json of a run, its sources with weight, and remarks.

    Raises:
        InputError: If there is none, or of another schema.
    """
    path = run / "weights.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{run} has no weights.json; give the folder of a run that has reached its first "
            "checkpoint."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None
    if body.get("schema") != "bilevel.llm_reweight/1":
        raise InputError(
            f"{path} has the schema {body.get('schema')!r}, expected 'bilevel.llm_reweight/1'."
        )
    notes = []
    if body["status"] not in ("STEPS", "CONVERGED"):
        notes.append(f"the run has not ended well ({body['status']}): its weights are not final.")
    gone = [s["name"] for s in body["sources"] if not s["weight"] > 0]
    if gone:
        notes.append(f"left out, since they have no weight: {', '.join(gone)}")
    kept = [s for s in body["sources"] if s["weight"] > 0]
    keys = _keys([s["name"] for s in kept])
    sources = tuple(
        Source(
            name=s["name"],
            path=s["path"],
            sha256=s["sha256"],
            format=s["format"],
            records=s["records"],
            tokens=s["tokens_per_record"],
            weight=s["weight"],
            reading=_reading(s),
            unsifted=s.get("unsifted", False),
            key=key,
        )
        for s, key in zip(kept, keys, strict=True)
    )
    return body, sources, notes


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


def _reading(source: dict[str, Any]) -> Reading:
    return Reading(
        columns=tuple(source.get("columns", {}).items()),
        use_chosen=source.get("use_chosen", False),
        skip=source.get("skipped", 0) > 0 or source.get("unsifted", False),
    )


def _differences(a: Path, b: Path) -> list[str]:
    names = sorted({str(p.relative_to(root)) for root in (a, b) for p in root.rglob("*")})
    return [name for name in names if not _same(a / name, b / name)]


def _same(a: Path, b: Path) -> bool:
    if a.is_dir() or b.is_dir():
        return a.is_dir() and b.is_dir()
    if not (a.is_file() and b.is_file()) or os.path.getsize(a) != os.path.getsize(b):
        return False
    with a.open("rb") as left, b.open("rb") as right:
        while block := left.read(1 << 20):
            if block != right.read(1 << 20):
                return False
    return True


def _keys(names: Sequence[str]) -> list[str]:
    """Names that no tool takes apart, each once also where case makes no difference."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-") or "source"
        key, number = plain, 2
        while key.casefold() in (other.casefold() for other in found):
            key, number = f"{plain}-{number}", number + 1
        found.append(key)
    return found
