"""What the sources hold, counted in the heads of their files: records, tokens, lengths."""

from __future__ import annotations

import gzip
import json
import os
import statistics
import tempfile
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bilevel import InputError
from bilevel.problems.llm_reweight.records import name_paths
from bilevel.problems.llm_reweight.targets import allot, named, test_name, tests
from bilevel.problems.llm_reweight.tokens import Rows

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

HEAD = 2**21
"""Bytes of a file that are read; a smaller file is read whole."""
CUT = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".tsv")
"""Endings of files of which a part can be read, also with .gz behind; others are read whole."""
ASIDE = ("batch", "target_batch", "micro_batch", "dtype", "device", "attention", "checkpointing")
ASIDE += ("loss_chunk", "verdict", "layers", "width", "data_seed")
"""Options that change nothing of what is counted."""
DRAWS = 20
"""Batches that are drawn to find out how far they are padded."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One source as far as it was read, scaled up to the whole of its file."""

    name: str
    format: str
    read: float
    """The share of the file that was read; below 1 all counts are estimates."""
    records: int
    rows: int
    tokens: int
    """Trained tokens of all rows."""
    truncated: float
    """Share of the rows that lose tokens to problem.max_length."""
    dropped: float
    """Share of the records that repeat another or cannot be used."""
    lengths: tuple[int, ...]
    """Tokens of the rows that were read."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The sources in order, the targets, and words on how they were counted."""

    sources: tuple[Counted, ...]
    targets: tuple[Counted, ...]
    notes: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(max(c.lengths) for c in (*self.sources, *self.targets))


def survey(problem: LLMReweight) -> Survey | None:
    """The survey of the files that a problem names; None for the demonstration.

    Raises:
        InputError: With the faults that their heads have.
    """
    files = all(isinstance(given, str | tuple) for given in (problem.target, problem.test))
    if not problem.sources or not isinstance(problem.sources, tuple) or not files:
        return None
    plain = {f.name: f.default for f in fields(problem) if f.name.startswith(ASIDE)}
    return _survey(replace(problem, **plain))


def table(found: Survey, problem: LLMReweight, steps: int) -> list[dict[str, Any]]:
    """A row for each source, with the epochs that so many steps make of it, and for each target."""
    drawn = {c.name: problem.batch // len(found.sources) for c in found.sources}
    drawn |= drawn_of(found, problem)
    weights = problem.target_weights if len(found.targets) > 1 else {}
    return [
        {
            "source": f"{c.name} (target, {weights[c.name]:.3g})" if c.name in weights else c.name,
            "format": c.format,
            "records": c.records,
            "rows": c.rows,
            "trained tokens": c.tokens,
            "truncated": c.truncated,
            "dropped": c.dropped,
            "epochs": drawn[c.name] * steps / c.rows,
            "estimated": c.read < 1,
        }
        for c in (*found.sources, *found.targets)
    ]


def drawn_of(found: Survey, problem: LLMReweight) -> dict[str, int]:
    """The rows of each target in a batch."""
    sizes = {c.name: c.rows for c in found.targets}
    if len(sizes) == 1:
        return dict.fromkeys(sizes, problem.target_batch)
    return allot(problem.target_weights, sizes, problem.target_batch)


def padded(found: Survey, problem: LLMReweight, devices: int) -> tuple[float, float]:
    """Tokens that a sweep over the lower and the upper batch works on, with padding, on average."""
    generator = torch.Generator().manual_seed(0)
    each = problem.batch // len(found.sources)
    lower = [(c.lengths, each) for c in found.sources]
    drawn = drawn_of(found, problem)
    upper = [(c.lengths, drawn[c.name]) for c in found.targets]
    return _padded(lower, problem, devices, generator), _padded(upper, problem, devices, generator)


def typical(lengths: Sequence[int], count: int) -> list[int]:
    """So many lengths, evenly spaced among all when sorted.

    >>> typical([1, 2, 3, 4, 5, 6], 3)
    [2, 4, 6]
    """
    ordered = sorted(lengths)
    return [
        ordered[min(len(ordered) - 1, int((i + 0.5) * len(ordered) / count))] for i in range(count)
    ]


def _padded(
    parts: Sequence[tuple[Sequence[int], int]],
    problem: LLMReweight,
    devices: int,
    generator: torch.Generator,
) -> float:
    def draw(lengths: Sequence[int], count: int) -> list[int]:
        picks = torch.randint(len(lengths), (count,), generator=generator).tolist()
        return [lengths[i] for i in picks]

    totals = []
    for _ in range(DRAWS):
        batch = [n for lengths, count in parts for n in draw(lengths, count)]
        own = [batch[i::devices] for i in range(devices)]
        rows = problem.micro_batch or len(own[0])
        cuts = [o[i : i + rows] for o in own for i in range(0, len(o), rows)]
        totals.append(sum(len(c) * (max(c) - 1) for c in cuts if c))
    return statistics.fmean(totals)


@lru_cache(maxsize=4)
def _survey(problem: LLMReweight) -> Survey:
    paths = name_paths([str(source) for source in problem.sources])
    held = named(problem.target)
    given = tests(problem.test, [*held])
    called = {name: test_name(name, [*held]) for name in given}
    own = held | {called[name]: path for name, path in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        heads = {
            name: _head(path, Path(folder) / str(i))
            for i, (name, path) in enumerate((paths | own).items())
        }
        read = replace(
            problem,
            sources=tuple(f"{name}={heads[name][0]}" for name in paths),
            target={name: heads[name][0] for name in held},
            test={name: heads[called[name]][0] for name in given},
        )
        notes = []
        if _has_no_tokenizer(problem.model):
            read = replace(read, model="tiny")
            notes.append(
                f"Tokens are counted with a small tokenizer: {problem.model} has none here."
            )
        try:
            data, rows = read.data, [*read.rows, *(target.rows for target in read.targets)]
        except InputError as error:
            faults = list(error.faults)
            for name, (head, _) in heads.items():
                faults = [fault.replace(head, (paths | own)[name]) for fault in faults]
            raise InputError(faults) from None
        cut = sum(share < 1 for _, share in heads.values())
        if cut:
            notes.append(
                f"Of {cut} files only the first {HEAD / 1e6:.1f} MB were read; ~: estimated."
            )
        files = [*data.sources.values(), *data.targets.values()]
        counted = [_counted(s, r, heads[s.name][1]) for s, r in zip(files, rows, strict=True)]
    at = len(data.sources)
    return Survey(sources=tuple(counted[:at]), targets=tuple(counted[at:]), notes=tuple(notes))


def _counted(source: Any, rows: Rows, share: float) -> Counted:
    records = len(source.examples) + source.skipped
    return Counted(
        name=rows.name,
        format=source.format,
        read=share,
        records=round(records / share),
        rows=max(1, round(len(rows) / share)),
        tokens=round(rows.trained_tokens / share),
        truncated=rows.truncated / len(rows),
        dropped=(source.skipped + rows.skipped + rows.duplicates) / records,
        lengths=tuple(map(len, rows.ids)),
    )


def _has_no_tokenizer(model: str) -> bool:
    folder = Path(model)
    if model == "tiny":
        return False
    return not folder.is_dir() or not any(
        path.name.startswith(("tokenizer", "vocab")) for path in folder.iterdir()
    )


def _head(path: str, folder: Path) -> tuple[str, float]:
    """A file with the first records of one, and the share of it that this is."""
    name = Path(path).name.lower()
    zipped = name.endswith(".gz")
    if not os.path.isfile(path) or not name.removesuffix(".gz").endswith(CUT):
        return path, 1.0
    size = os.path.getsize(path)
    if size <= HEAD:
        return path, 1.0
    with gzip.open(path) if zipped else open(path, "rb") as file:
        body = file.read(4 * HEAD if zipped else HEAD)
    share = len(gzip.compress(body) if zipped else body) / size
    if share >= 1:
        return path, 1.0
    whole = body[: body.rfind(b"\n") + 1] if body.count(b"\n") > 1 else body
    if body.lstrip(BOM_UTF8 + b" \t\r\n").startswith(b"["):
        whole = _elements(body)
    folder.mkdir()
    head = folder / Path(path).name.removesuffix(".gz" if zipped else "")
    head.write_bytes(whole)
    return str(head), share * len(whole) / len(body)


def _elements(body: bytes) -> bytes:
    """The elements of a JSON array that are whole, as lines."""
    text = body.decode("utf-8-sig", errors="ignore")
    decoder, place, found = json.JSONDecoder(), text.index("[") + 1, []
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError:
            break
        found.append(json.dumps(value) + "\n")
    return "".join(found).encode()
