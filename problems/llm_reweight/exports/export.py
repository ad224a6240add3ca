"""The options of an export, the tools it knows, and the words on what was written."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from bilevel import InputError
from bilevel.problem import Exporter
from bilevel.problems.llm_reweight.exports import finetuners, mixed, pretraining
from bilevel.problems.llm_reweight.exports.job import Job, Records, put
from bilevel.problems.llm_reweight.exports.shares import REPEATED
from bilevel.problems.llm_reweight.exports.source import Source, load
from bilevel.problems.llm_reweight.exports.tool import SOME, Tool, Written

MOST = 100_000_000  # examples; the list of those drawn is held in memory
FACTORY = "LLaMA-Factory ff6d4d12e of 2026-08-18"
TOOLS: dict[str, Tool] = {
    "llamafactory": Tool(write=finetuners.llamafactory, averages="tokens", read=FACTORY),
    "llamafactory_v1": Tool(write=finetuners.llamafactory_v1, averages="tokens", read=FACTORY),
    "axolotl": Tool(
        write=mixed.axolotl,
        averages="tokens",
        takes=("per_source",),
        read="axolotl 067b021c8 of 2026-07-24",
    ),
    "trl": Tool(write=finetuners.trl, averages="tokens", read="TRL f2cd57710 of 2026-07-24"),
    "open_instruct": Tool(
        write=finetuners.open_instruct,
        averages="tokens",
        read="open-instruct e6c3044aa of 2026-08-20",
    ),
    "lmflow": Tool(write=mixed.lmflow, averages="tokens", read="LMFlow f3597dba of 2026-04-25"),
    "megatron": Tool(
        write=pretraining.megatron,
        averages="tokens",
        takes=("paths",),
        reads=False,
        read="Megatron-LM d98e8a64dd of 2026-08-22",
    ),
    "nanotron": Tool(
        write=pretraining.nanotron,
        averages="tokens",
        takes=("paths",),
        reads=False,
        read="nanotron 2411b022 of 2026-04-07",
    ),
    "streaming": Tool(
        write=pretraining.streaming,
        averages="tokens",
        sure=False,
        takes=("paths",),
        reads=False,
        read="streaming 89e7bb90 of 2025-07-17",
    ),
    "hf": Tool(write=pretraining.hf, averages="tokens", sure=False, read="datasets 5.2.0"),
    "ms_swift": Tool(
        write=finetuners.ms_swift, averages="tokens", read="ms-swift 3602360a5 of 2026-08-22"
    ),
    "doremi": Tool(
        write=pretraining.doremi,
        averages="tokens",
        reads=False,
        read="doremi 7cde52d of 2023-12-26",
    ),
    "mixed": Tool(write=mixed.mixed, averages="tokens", sure=False, read="no tool"),
}


@dataclass(frozen=True, kw_only=True)
class Export(Exporter):
    """Write the weights of a run for trainers, into RUN/export/TOOL."""

    to: tuple[str, ...] = ()
    """Tools, several with commas: llamafactory, llamafactory_v1, axolotl, trl, open_instruct,
    lmflow, megatron, nanotron, streaming, hf, ms_swift, doremi, mixed; all for every one."""
    total: int = 0
    """Examples of the mixed set; 0 takes as many as the sources have records."""
    unit: Literal["auto", "examples", "tokens"] = "auto"
    """What your trainer averages its loss over in a batch; auto is what the tool does."""
    records: Records = "auto"
    """Form of written records; auto is original where those of all sources are alike."""
    per_source: bool = False
    """For axolotl a kept fraction of each source instead of one ready-mixed file."""
    paths: tuple[str, ...] = ()
    """Tokenized data for megatron, nanotron and streaming, as 'name=path'."""
    seed: int = 0
    """Of the records that are drawn and of their order."""
    force: bool = False
    """Rename an export of other content that is in the way, instead of refusing."""

    def write(self, run: Path) -> list[str]:
        names = tools(self.to)
        body, sources, lines = load(run)
        paths = self._checked(names, sources)
        everything = sum(s["records"] for s in body["sources"])
        if (run / "example_weights.jsonl").exists():
            lines.append(
                "warning: this run learned a weight for each record, and an export carries their "
                "sums over the sources alone; within a source records are drawn alike. The "
                f"multiplier of each record's loss is in {run / 'example_weights.jsonl'}."
            )
        done: list[str] = []
        faults: list[str] = []
        for name in names:
            try:
                lines += self._written(name, run, sources, everything, paths)
                done.append(name)
            except InputError as error:
                faults += [
                    f"{name}: {fault}" if len(names) > 1 else fault for fault in error.faults
                ]
        if faults and done:
            print("\n".join(lines))
            faults.append(f"written nevertheless: {', '.join(done)}.")
        if faults:
            raise InputError(faults)
        return lines

    def _checked(self, names: list[str], sources: tuple[Source, ...]) -> dict[str, str]:
        """The paths by source, once all options were found right."""
        faults = [] if names else [f"to=TOOL is missing; choices: {', '.join(TOOLS)}, or all."]
        if not 0 <= self.total <= MOST:
            faults.append(f"total must be from 0 to {MOST:,}, got total={self.total:,}.")
        paths = dict(_pair(entry, sources, faults) for entry in self.paths)
        faults += [_useless(option, names) for option in SOME if getattr(self, option)]
        faults = list(filter(None, faults))
        if faults:
            raise InputError(faults)
        return paths

    def _written(
        self,
        name: str,
        run: Path,
        sources: tuple[Source, ...],
        everything: int,
        paths: dict[str, str],
    ) -> list[str]:
        """Write the files of one tool, whole or not at all; returns the words on them."""
        tool = TOOLS[name]
        target = (run / "export" / name).resolve()
        made = target.with_name(f".partial-{os.getpid()}-{name}")
        made.mkdir(parents=True)
        try:
            job = self._job(name, sources, everything, paths, target, made)
            written = tool.write(job)
            _shares(job, tool, written)
            fate = put(made, target, force=self.force)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        unused = [o for o in SOME if getattr(self, o) and o not in tool.takes]
        written.notes.extend(f"--{o} has no effect: {_takers(o)}" for o in unused)
        job = replace(job, folder=target)
        return _words(job, tool, written, fate, self.unit == "auto", _bound(run))

    def _job(
        self,
        name: str,
        sources: tuple[Source, ...],
        everything: int,
        paths: dict[str, str],
        target: Path,
        made: Path,
    ) -> Job:
        """What one tool is to be given; `everything` are the records of all sources."""
        tool = TOOLS[name]
        usable = tuple(s.usable for s in sources) if tool.reads else sources
        bad = sum(s.records for s in sources) - sum(s.records for s in usable)
        return Job(
            tool=name,
            sources=usable,
            unit=tool.averages if self.unit == "auto" else self.unit,
            everything=everything - bad,
            wanted=self.total,
            records=self.records,
            per_source=self.per_source,
            paths=paths,
            seed=self.seed,
            target=target,
            folder=made,
        )


def _takers(option: str) -> str:
    """Which tools an option is for, in words."""
    names = [name for name, tool in TOOLS.items() if option in tool.takes]
    return f"it is for {' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}"


def _useless(option: str, names: list[str]) -> str:
    """What to say of an option that no named tool has use for; nothing where one has."""
    if not names or any(option in TOOLS[name].takes for name in names):
        return ""
    return f"--{option} has no effect on {', '.join(names)}: {_takers(option)}; leave it out."


def _bound(run: Path) -> float:
    """Epochs above which a source is warned of: what the run was told, at most the usual."""
    try:
        body = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        told = float(body["problem"]["max_epochs"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        told = 0.0
    return min(told, REPEATED) if told > 0 else REPEATED


def tools(given: tuple[str, ...]) -> list[str]:
    """The tools of a list in which commas may stand for spaces, each once.

    Raises:
        InputError: If there is no such tool; the nearest is named.
    """
    if faults := unknown(given):
        raise InputError(faults)
    return list(TOOLS) if "all" in _split(given) else list(dict.fromkeys(_split(given)))


def unknown(given: tuple[str, ...]) -> list[str]:
    """A sentence for each tool in a list that there is not."""
    faults = []
    for name in _split(given):
        if name not in (*TOOLS, "all"):
            near = difflib.get_close_matches(name, TOOLS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            faults.append(f"no export for {name!r}; {hint}choices: {', '.join(TOOLS)}, or all.")
    return faults


def _split(given: tuple[str, ...]) -> list[str]:
    return [name for entry in given for name in entry.split(",") if name]


def _pair(entry: str, sources: tuple[Source, ...], faults: list[str]) -> tuple[str, str]:
    name, equals, path = entry.partition("=")
    known = [source.name for source in sources]
    if not (equals and path and name in known):
        faults.append(
            f"paths must be NAME=PATH with a source's name ({', '.join(known)}), got {entry!r}."
        )
    return name, path


def _shares(job: Job, tool: Tool, written: Written) -> None:
    """shares.json: the arithmetic behind the numbers."""
    shares = written.shares or job.shares
    columns = {
        "name": [source.name for source in job.sources],
        "weight": list(shares.weights),
        "share_examples": list(shares.examples),
        "share_tokens": list(shares.trained_tokens),
        "epochs": list(shares.epochs(written.total)),
        "loss_multiplier_if_drawn_by_size": list(shares.multipliers()),
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    body = {
        "schema": "bilevel.shares/1",
        "tool": job.tool,
        "written_for": tool.read,
        "unit": job.unit,
        "total": written.total,
        "largest_total_without_repetition": shares.largest,
        "sources": rows,
    }
    job.write("shares.json", json.dumps(body, indent=1, ensure_ascii=False))


def _words(
    job: Job, tool: Tool, written: Written, fate: str, auto: bool, bound: float
) -> list[str]:
    shares = written.shares or job.shares
    lines = ["", f"{job.tool}: {job.folder} ({fate})"]
    lines.append(
        f"  for a loss averaged over the {job.unit} of a batch; {written.total:,} examples"
    )
    if auto and not tool.sure:
        lines.append(
            "  (as transformers' Trainer averages; give --unit examples if yours averages over "
            "the examples)"
        )
    width = max(len(source.name) for source in job.sources)
    lines.append(f"  {'source':{width}}  weight  examples  tokens  epochs")
    epochs = shares.epochs(written.total)
    rows = zip(job.sources, shares.examples, shares.trained_tokens, epochs, strict=True)
    for source, q, r, f in rows:
        lines.append(f"  {source.name:{width}}  {source.weight:6.4f}  {q:8.4f}  {r:6.4f}  {f:6.2f}")
    over = [s.name for s, f in zip(job.sources, epochs, strict=True) if f > 1.001 * bound]
    if over:
        lines.append(
            f"  warning: more than {bound:g} epochs of {', '.join(over)}; repetition teaches "
            f"little; lower --total, or give --unit examples if your trainer averages over the "
            f"examples; without repetition there are {shares.largest:,} examples."
        )
    lines += [f"  note: {note}" for note in written.notes]
    lines.append("  use: " + written.use.replace("\n", "\n       "))
    return lines
