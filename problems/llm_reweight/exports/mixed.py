"""One resampled file of a given size: what any trainer takes, also axolotl and LMFlow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bilevel import InputError
from bilevel.problems.llm_reweight.exports.job import Job, as_messages, as_text, formed
from bilevel.problems.llm_reweight.exports.shares import exact_fraction
from bilevel.problems.llm_reweight.exports.source import Source
from bilevel.problems.llm_reweight.exports.tool import Written, counted

SCHEMA = "bilevel.mixed/1"
TYPES = {"text": "completion", "alpaca": "alpaca", "messages": "chat_template"}
"""What axolotl calls the forms."""


def mixed(job: Job) -> Written:
    """train.jsonl, and train.meta.json with the source and the record that each line came from."""
    original = job.records == "original" or (job.records == "auto" and job.alike)
    form = "original" if original else ("text" if job.form == "text" else "messages")
    notes = _write(job, form)
    if original and not job.alike:
        notes.append("the records have different keys, which not every reader takes in one file")
    return Written(total=job.total, use=f"train on {job.target / 'train.jsonl'}", notes=notes)


def axolotl(job: Job) -> Written:
    """mix.yaml with one ready-mixed file, or with a kept fraction for each source when asked."""
    if job.per_source:
        return _axolotl_sources(job)
    notes = _write(job, job.form)
    entry = {"path": str(job.target / "train.jsonl"), "ds_type": "json", "type": TYPES[job.form]}
    job.write("mix.yaml", yaml.safe_dump({"datasets": [entry]}, sort_keys=False))
    return Written(total=job.total, use=_axolotl_use(job), notes=notes)


def lmflow(job: Job) -> Written:
    """data/train.json, the one file of a folder that LMFlow takes as its data set."""
    kinds = {"text": "text_only", "alpaca": "text2text", "messages": "conversation"}
    make = {"text": as_text, "alpaca": _text2text, "messages": _conversation}
    rows, notes = _rows(job)
    (job.folder / "data").mkdir()
    with (job.folder / "data" / "train.json").open("w", encoding="utf-8") as file:
        file.write(f'{{\n"type": "{kinds[job.form]}",\n"instances": [')  # it looks at the head only
        for number, line in enumerate(job.originals(rows)):
            record = formed(job.sources[rows[number][0]], line, make[job.form])
            file.write(("," if number else "") + "\n" + record)
        file.write("\n]\n}\n")
    return Written(total=job.total, use=f"--dataset_path {job.quoted('data')}", notes=notes)


def _write(job: Job, form: str) -> list[str]:
    rows, notes = _rows(job)
    job.write_lines("train.jsonl", _lines(job, rows, form))
    meta = {
        "schema": SCHEMA,
        "form": form,
        "unit": job.unit,
        "seed": job.seed,
        "sources": [
            {"name": s.name, "path": s.path, "sha256": s.sha256, "records": s.records, "count": n}
            for s, n in zip(job.sources, job.shares.counts(job.total), strict=True)
        ],
        "rows": [(i, job.sources[i].originals.numbers[k]) for i, k in rows],
    }
    job.write("train.meta.json", json.dumps(meta))
    return notes


def _rows(job: Job) -> tuple[list[tuple[int, int]], list[str]]:
    """The source and the record of each line, in random order."""
    kept, notes = counted(job)
    rows = [(i, index) for i, count in kept for index in job.picks(i, count)]
    job.generator("").shuffle(rows)
    return rows, notes


def _lines(job: Job, rows: list[tuple[int, int]], form: str) -> Iterator[str]:
    for (source, _), line in zip(rows, job.originals(rows), strict=True):
        if form in ("original", "alpaca"):
            yield line
        else:
            yield formed(job.sources[source], line, as_text if form == "text" else as_messages)


def _axolotl_sources(job: Job) -> Written:
    total = job.wanted or job.shares.largest
    if total > job.shares.largest:
        raise InputError(
            f"axolotl keeps at most a whole source, so --total={job.wanted:,} is too much: the "
            f"largest total without repetition is {job.shares.largest:,}; lower it, or leave out "
            "--per-source."
        )
    entries, notes = [], []
    for source, count in zip(job.sources, job.shares.counts(total), strict=True):
        if not count:
            notes.append(f"left out, its share of {total:,} examples is below one: {source.name}")
            continue
        entry = {"path": _axolotl_file(job, source), "ds_type": "json", "type": TYPES[job.form]}
        entries.append(entry | {"weight": min(1.0, exact_fraction(count, source.records))})
    job.write("mix.yaml", yaml.safe_dump({"datasets": entries}, sort_keys=False))
    notes.append("`weight` needs an axolotl with pull request 3690 (merged in May 2026)")
    return Written(total=total, use=_axolotl_use(job), notes=notes)


def _axolotl_file(job: Job, source: Source) -> str:
    fits = source.format == job.form and (job.form != "messages" or source.facts.plain)
    if source.is_json and fits:
        source.originals  # noqa: B018, read for what it raises
        return str(Path(source.path))
    make = as_text if job.form == "text" else as_messages
    return job.convert(f"{source.key}.jsonl", source, make)


def _axolotl_use(job: Job) -> str:
    return f"put the entries of {job.target / 'mix.yaml'} into your config: axolotl train CONFIG"


def _text2text(source: Source, record: dict[str, Any]) -> dict[str, Any]:
    *asked, answer = source.messages(record)
    return {"input": "\n\n".join(m["content"] for m in asked), "output": answer["content"]}


def _conversation(source: Source, record: dict[str, Any]) -> dict[str, Any]:
    found = source.messages(record)
    system = found[0]["content"] if found[0]["role"] == "system" else None
    more = {} if system is None else {"system": system}
    return more | {"messages": found[len(more) :]}
