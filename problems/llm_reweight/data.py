"""All input of a run, read and checked before any model is loaded."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilevel import InputError
from bilevel.problems.llm_reweight import embedded
from bilevel.problems.llm_reweight import targets as targets_module
from bilevel.problems.llm_reweight.examples import Example, Source
from bilevel.problems.llm_reweight.formats import FIELDS, Reading
from bilevel.problems.llm_reweight.indexed import Lines
from bilevel.problems.llm_reweight.records import (
    name_paths,
    overlaps,
    read_sources,
    texts_of,
)

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight


@dataclass(frozen=True, kw_only=True)
class Data:
    """The sources in the order of their weights, targets, test sets, and words about them."""

    sources: dict[str, Source]
    targets: dict[str, Source]
    tests: dict[str, Source]
    """By the names of the targets."""
    notes: tuple[str, ...] = ()
    relevant: tuple[str, ...] = ()
    """Sources known to be the right ones: those of the embedded demonstration."""

    @property
    def files(self) -> list[Source]:
        """Everything that is read: sources, targets, test sets."""
        return [*self.sources.values(), *self.targets.values(), *self.tests.values()]


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
    paths = _named(options.sources)
    if len(paths) < 2 and options.weigh != "examples":
        raise InputError(
            f"expected at least two sources to weigh, with spaces between, got {len(paths)}: "
            f"{[*paths]}; problem.weigh=examples weighs the examples of one."
        )
    given = targets_module.named(options.target)
    own_tests = targets_module.tests(options.test, [*given])
    clash = {"target", "test", *given} & paths.keys()
    if clash:
        raise InputError(f"a source may not be called {clash.pop()!r}; rename it: name=path.")
    names = list(paths)
    paths |= given
    paths |= {targets_module.test_name(name, [*given]): test for name, test in own_tests.items()}
    columns = _columns(options.columns, paths)
    found = read_sources(paths, {name: _reading(options, columns[name]) for name in paths})
    _check_columns(options.columns, found)
    notes = [line for source in found.values() for line in _left_out(source)]
    sources = {name: found.pop(name) for name in names}
    notes += _large(list(sources.values()), list(found.values()))
    notes += _alike(list(sources.values()))
    notes += _check_overlap(sources, list(found.values()), allowed=options.allow_overlap)
    targets, tests, more = _held_out(found, [*given])
    return Data(sources=sources, targets=targets, tests=tests, notes=(*notes, *more))


def embedded_data() -> Data:
    """The demonstration: real text that comes with Python."""
    corpus = embedded.corpus()
    sources = {name: text_source(name, texts) for name, texts in corpus.sources.items()}
    head = "embedded demonstration: text that comes with Python; target: docstrings of held-out "
    return Data(
        sources=sources,
        targets={"target": text_source("target", corpus.target)},
        tests={"target": text_source("test", corpus.test)},
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


def reading(options: LLMReweight, name: str) -> Reading:
    """How the records of a source are taken."""
    columns = _columns(options.columns, [*_named(options.sources), *_held(options)])
    return _reading(options, columns.get(name, ()))


def _named(sources: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Every source by its name: a path, or records in memory."""
    return dict(sources) if isinstance(sources, Mapping) else dict(name_paths(sources))


def _reading(options: LLMReweight, columns: Sequence[tuple[str, str]]) -> Reading:
    return Reading(
        columns=tuple(columns),
        use_chosen=options.use_chosen,
        as_chat=options.template != "auto",
        skip=options.on_bad_record == "skip",
        held=options.held_megabytes * 1_000_000,
    )


def _columns(entries: Sequence[str], names: Collection[str]) -> dict[str, list[tuple[str, str]]]:
    """For each source the pairs of a format's key and the file's own.

    Raises:
        InputError: If an entry is none of 'key=column' and 'source.key=column'.
    """
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    faults = []
    for entry in entries:
        left, equals, column = entry.partition("=")
        scope, _, key = left.strip().rpartition(".")
        if not equals or not column or key not in FIELDS or (scope and scope not in found):
            faults.append(
                f"problem.columns={entry}: expected key=column or source.key=column with a key "
                f"among {', '.join(dict.fromkeys(FIELDS))} and a source among {', '.join(found)}."
            )
        for name in [scope] if scope else found:
            found.setdefault(name, []).append((key, column))
    if faults:
        raise InputError(faults)
    return found


def _check_columns(entries: Sequence[str], sources: Mapping[str, Source]) -> None:
    """Refuse columns that no record has."""
    faults = []
    for entry in entries:
        left, _, column = entry.partition("=")
        scope = left.strip().rpartition(".")[0]
        asked = [sources[scope]] if scope else list(sources.values())
        if not any(column in source.columns for source in asked):
            of = asked[0].path if scope else "any file"
            faults.append(
                f"problem.columns={entry}: found no record with the key {column!r} in {of}; fix: "
                "write the name as the records do."
            )
    if faults:
        raise InputError(faults)


def _left_out(source: Source) -> list[str]:
    """What to say of bad records that were left out."""
    if not source.skipped:
        return []
    count = "1 bad record" if source.skipped == 1 else f"{source.skipped:,} bad records"
    if isinstance(source.examples, Lines):
        count += f" among the {len(source.examples.looked_at()):,} looked at"
    return [f"warning: {source.name}: {count} left out, such as {source.complaints[0]}"]


def _large(sources: Sequence[Source], held: Sequence[Source]) -> list[str]:
    """What is done otherwise with files that are not held in memory."""
    large = [s for s in (*sources, *held) if isinstance(s.examples, Lines)]
    return [
        f"{source.name}: {source.size:,} bytes are read as they are drawn; "
        f"{len(source.examples.looked_at()):,} records were looked at, repeated records and those "
        "of the target are told by equal lines, and numbers of tokens are estimates"
        for source in large
        if isinstance(source.examples, Lines)
    ]


def _held(options: LLMReweight) -> list[str]:
    """The names of all targets and of their test sets."""
    names = list(targets_module.named(options.target))
    return [*names, *(targets_module.test_name(name, names) for name in names)]


def _held_out(
    found: Mapping[str, Source], names: Sequence[str]
) -> tuple[dict[str, Source], dict[str, Source], list[str]]:
    """The targets of these names, their test sets, cut off where there are none, and a note.

    Raises:
        InputError: For every target that is too small to be cut.
    """
    targets, tests, faults = {}, {}, []
    cut = []
    for name in names:
        test = targets_module.test_name(name, names)
        targets[name] = found[name]
        if test in found:
            tests[name] = found[test]
            continue
        cut.append(name)
        try:
            targets[name], tests[name] = _hold_out(found[name], test)
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(faults)
    of = f" of {', '.join(cut)}" if len(names) > 1 else ""
    words = f"no problem.test: every fourth target record{of} is held out as test"
    return targets, tests, [words] if cut else []


def _hold_out(target: Source, name: str) -> tuple[Source, Source]:
    from dataclasses import replace

    if isinstance(target.examples, Lines):
        test = replace(target, name=name, examples=target.examples.part(3, 4))
        return replace(target, examples=target.examples.without(3, 4)), test
    test = tuple(e for i, e in enumerate(target.examples) if i % 4 == 3)
    rest = tuple(e for i, e in enumerate(target.examples) if i % 4 != 3)
    if not test:
        raise InputError(
            f"{target.path}: expected at least 4 target records to hold out a test set, got "
            f"{len(target.examples)}; fix: add records or give problem.test."
        )
    return replace(target, examples=rest), replace(target, name=name, examples=test)


def _alike(sources: Sequence[Source]) -> list[str]:
    """Of sources held in memory, those that share at least half of the records of the smaller."""
    held = {s.name: texts_of(s) for s in sources if not isinstance(s.examples, Lines)}
    shared = [(a, b, len(held[a] & held[b])) for a, b in itertools.combinations(held, 2)]
    return [
        f"warning: sources {a} and {b} share {count:,} records, so that nothing tells which of the "
        "two should get the weight of these; leave one out, or put both into one problem.groups"
        for a, b, count in shared
        if 2 * count >= min(len(held[a]), len(held[b]))
    ]


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
