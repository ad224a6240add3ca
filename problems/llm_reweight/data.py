"""All input of a run, read and checked before any model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bilevel import InputError
from bilevel.problems.llm_reweight import embedded
from bilevel.problems.llm_reweight.records import (
    Example,
    Source,
    name_paths,
    overlaps,
    read_sources,
)

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight


@dataclass(frozen=True, kw_only=True)
class Data:
    """The sources in the order of their weights, the target, the test set, and words about them."""

    sources: dict[str, Source]
    target: Source
    test: Source
    notes: tuple[str, ...] = ()
    relevant: tuple[str, ...] = ()
    """Sources known to be the right ones: those of the embedded demonstration."""


def read(options: LLMReweight) -> Data:
    """The data that the options name, or the embedded demonstration when they name none.

    Raises:
        InputError: With every fault of every file.
    """
    if not options.sources and not options.target:
        return embedded_data()
    if not options.sources or not options.target:
        given, missing = ("target", "sources") if options.target else ("sources", "target")
        raise InputError(
            f"problem.{given} is given but problem.{missing} is not; give both, or neither for the "
            "embedded demonstration."
        )
    paths = name_paths(options.sources)
    if len(paths) < 2:
        raise InputError(f"expected at least two sources to weigh, got {len(paths)}: {[*paths]}.")
    clash = {"target", "test"} & paths.keys()
    if clash:
        raise InputError(f"a source may not be called {clash.pop()!r}; rename it: name=path.")
    extra = {"target": options.target} | ({"test": options.test} if options.test else {})
    found = read_sources(paths | extra)
    target = found.pop("target")
    test = found.pop("test", None)
    held = [target] if test is None else [target, test]
    notes = _check_overlap(found, held, allowed=options.allow_overlap)
    if test is None:
        target, test = _hold_out(target)
        notes.append("no problem.test: every fourth target record is held out as test")
    return Data(sources=found, target=target, test=test, notes=tuple(notes))


def embedded_data() -> Data:
    """The demonstration: real text that comes with Python."""
    corpus = embedded.corpus()
    sources = {name: text_source(name, texts) for name, texts in corpus.sources.items()}
    head = "embedded demonstration: text that comes with Python; target: docstrings of held-out "
    return Data(
        sources=sources,
        target=text_source("target", corpus.target),
        test=text_source("test", corpus.test),
        notes=(head + "modules", *corpus.notes),
        relevant=corpus.relevant,
    )


def text_source(name: str, texts: Sequence[str]) -> Source:
    """A source made of plain texts in memory, every token trained on."""
    examples = tuple(
        Example(segments=((text, True),), index=i, line=None) for i, text in enumerate(texts)
    )
    body = "\n\n".join(texts).encode()
    return Source(
        name=name,
        path=f"embedded:{name}",
        format="paragraphs",
        examples=examples,
        sha256=hashlib.sha256(body).hexdigest(),
        size=len(body),
    )


def _hold_out(target: Source) -> tuple[Source, Source]:
    from dataclasses import replace

    test = tuple(e for i, e in enumerate(target.examples) if i % 4 == 3)
    rest = tuple(e for i, e in enumerate(target.examples) if i % 4 != 3)
    if not test:
        raise InputError(
            f"{target.path}: expected at least 4 target records to hold out a test set, got "
            f"{len(target.examples)}; fix: add records or give problem.test."
        )
    return replace(target, examples=rest), replace(target, name="test", examples=test)


def _check_overlap(
    sources: dict[str, Source], held: Sequence[Source], *, allowed: bool
) -> list[str]:
    faults = []
    for other in held:
        for source in sources.values():
            pairs = overlaps(source, other)
            if pairs:
                first = ", ".join(f"{b} is {a} there" for a, b in pairs[:3])
                records = "1 record" if len(pairs) == 1 else f"{len(pairs):,} records"
                faults.append(
                    f"{other.path} shares {records} with {source.path} (counting from 0, {first}"
                    f"{', ...' if len(pairs) > 3 else ''}): the weights would reward copying"
                )
    if faults and not allowed:
        remedy = "; fix: remove them, or continue with problem.allow_overlap=true."
        raise InputError([fault + remedy for fault in faults])
    return [f"warning: {fault}" for fault in faults]
