"""The sources of an export: what weights.json says of them, and what their files hold."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bilevel import InputError
from bilevel.problems.llm_reweight.exports import originals
from bilevel.problems.llm_reweight.exports.originals import Originals
from bilevel.problems.llm_reweight.files import NESTED
from bilevel.problems.llm_reweight.formats import FIELDS, Reading

STRINGS = tuple(key for key in FIELDS if key not in NESTED)
"""Keys whose values most tools expect to be strings."""


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


def _reading(source: dict[str, Any]) -> Reading:
    return Reading(
        columns=tuple(source.get("columns", {}).items()),
        use_chosen=source.get("use_chosen", False),
        skip=source.get("skipped", 0) > 0 or source.get("unsifted", False),
    )


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
