"""Every file of a run as rows of tokens: made, held against the sizes of batches, and described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bilevel import InputError
from bilevel.problems.llm_reweight.examples import Source
from bilevel.problems.llm_reweight.targets import Target, shared_out
from bilevel.problems.llm_reweight.templates import Style
from bilevel.problems.llm_reweight.tokens import Rows, tokenize

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """The rows of the sources, in the order of their weights, and of the targets."""

    sources: list[Rows]
    targets: list[Target]


def read(problem: LLMReweight) -> Tokenized:
    """Everything that a problem's data holds, as rows.

    Raises:
        InputError: With every fault of every file.
    """
    data = problem.data
    found, faults = [], []
    for source in data.files:
        try:
            found.append(
                tokenize(
                    source,
                    problem.tokenizer,
                    max_length=problem.max_length,
                    style=problem.style,
                    skip=problem.on_bad_record == "skip",
                )
            )
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(faults)
    held = found[len(data.sources) :]
    half = len(data.targets)
    return Tokenized(
        sources=found[: len(data.sources)],
        targets=[
            Target(name=name, weight=weight, rows=rows, test=test)
            for (name, weight), rows, test in zip(
                problem.target_weights.items(), held[:half], held[half:], strict=True
            )
        ],
    )


def faults(problem: LLMReweight) -> list[str]:
    """What has too few rows for the batches, as sentences."""
    found = []
    each = problem.weigh == "examples"
    per_source = 1 if each else problem.batch // len(problem.names)
    if each and sum(map(len, problem.rows)) < problem.batch:
        found.append(f"problem.batch={problem.batch} exceeds all rows there are; lower it.")
    for rows in problem.rows:
        if len(rows) < per_source:
            found.append(
                f"source {rows.name} has {_count(rows)}, expected at least the {per_source} of "
                "one batch; fix: give it more records or lower problem.batch."
            )
    for rows in (r for target in problem.targets for r in (target.rows, target.test)):
        if len(rows) < 2:
            found.append(
                f"{rows.name} has {_count(rows)}, expected at least 2; fix: give it more records."
            )
    return found


def lines(problem: LLMReweight) -> list[str]:
    """What each source and target holds, for the user."""
    sources = problem.data.sources.values()
    found = [
        f"source {rows.name}: {describe(source, rows, problem.style)}"
        for rows, source in zip(problem.rows, sources, strict=True)
    ]
    several = len(problem.targets) > 1
    drawn = shared_out(problem.targets, problem.target_batch)
    for target, count in zip(problem.targets, drawn, strict=True):
        head = f"target {target.name}, weight {target.weight:.3g}" if several else "target"
        each = f", {count} in each batch" if several else ""
        size = f"{len(target.rows):,} rows{each}; test: {len(target.test):,} rows"
        found.append(f"{head}: {size}")
    return found


def describe(source: Source, rows: Rows, style: Style) -> str:
    """How a source was taken, in words for the user."""
    written = ""
    if any(example.chat is not None for example in source.examples[:1]):
        own = style.template in ("auto", "tokenizer")
        written = " written with " + ("the tokenizer's template" if own else style.template)
    about = "" if rows.estimate is None else "about "
    words = [
        f"{source.format}{written}",
        f"{len(source.examples):,} records",
        f"{source.size:,} bytes",
        f"{len(rows):,} rows",
        f"{about}{rows.trained_tokens:,} trained tokens",
        f"{rows.truncated} truncated",
        f"{rows.duplicates} duplicates left out",
    ]
    if rows.skipped:
        words.append(f"{rows.skipped} that cannot be written or trained on left out")
    return ", ".join(words)


def _count(rows: Rows) -> str:
    left_out = f" ({rows.duplicates} duplicates left out)" if rows.duplicates else ""
    return ("1 row" if len(rows) == 1 else f"{len(rows)} rows") + left_out
