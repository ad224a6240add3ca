"""Examples as token rows: tokenizing, cutting, and stratified batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import InputError, Stream
from bilevel.problems.llm_reweight.examples import Example, Source
from bilevel.problems.llm_reweight.faults import fault, first
from bilevel.problems.llm_reweight.formats import Segments
from bilevel.problems.llm_reweight.indexed import Lines
from bilevel.problems.llm_reweight.on_demand import OnDemand
from bilevel.problems.llm_reweight.templates import Style, Template, Unwritable, choose, write


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The tokenized examples of one source; `trained[i]` marks the trained tokens of `ids[i]`."""

    name: str
    ids: Sequence[Sequence[int]]
    trained: Sequence[Sequence[bool]]
    records: Sequence[int]
    """The 0-based record in the file that each row was cut from."""
    truncated: int = 0
    """Rows that lost tokens to the length limit."""
    duplicates: int = 0
    """Records that repeat another one of the same source and were left out."""
    skipped: int = 0
    """Records that were left out because no template writes them or no trained token is left."""
    estimate: int | None = None
    """Trained tokens by a sample, of a source that is read as it is drawn from."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        return sum(map(sum, self.trained)) if self.estimate is None else self.estimate


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded rows of one batch or of a part of it; lengths in tokens."""

    ids: Tensor
    """[rows, length]"""
    trained: Tensor
    """[rows, length], true where the token is predicted and counted."""
    source: Tensor
    """[rows], the source of each row."""
    share: Tensor
    """[rows], the weight of that source over its rows in the WHOLE batch, float64; of sources the
    weight is 1, since x has theirs."""
    labels: tuple[str, ...]
    """source:record of each row, for messages."""
    pool: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """[rows of the WHOLE batch], the `source` of each, where weights are relative to a batch."""


def tokenize(
    source: Source,
    tokenizer: Any,
    *,
    max_length: int,
    style: Style | None = None,
    skip: bool = False,
) -> Rows:
    """Turn a source's examples into rows of at most `max_length` tokens.

    An example that is trained on throughout is cut into consecutive rows. Any other keeps its end
    when it is too long, so that the answer survives. Rows without a trained token are dropped, and
    so are records that repeat another: the weight of a source does not depend on its copies.

    Args:
        source: What to tokenize.
        tokenizer: Called with a list of texts, without special tokens.
        max_length: Tokens of the longest row.
        style: How records are written.
        skip: Whether records with nothing to train on are left out and counted.

    Raises:
        InputError: If a record has no token left to train on, or cannot be written; says which.
    """
    if isinstance(source.examples, Lines):
        return _drawn(source, source.examples, tokenizer, max_length, style or Style())
    examples = distinct(source)
    written, faults = write_all(source, examples, style or Style(), tokenizer)
    ids, trained, records, truncated = [], [], [], 0
    texts = [text for _, segments, _ in written for text, _ in segments]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    for example, segments, closed in written:
        row, marks = _row([(next(pieces), mark) for _, mark in segments], closed, tokenizer)
        cuts = _cuts(row, marks, max_length)
        truncated += not all(marks) and len(row) > max_length
        if not cuts:
            fix = f"remove the record or raise problem.max_length={max_length}"
            found, expected = "no token left to train on", "a trained token behind another one"
            faults.append(fault(example.where(source.path), found, expected, fix))
        for part, part_marks in cuts:
            ids.append(part)
            trained.append(part_marks)
            records.append(example.index)
    if faults and not (skip and ids):
        raise InputError(first(faults, source.path))
    return Rows(
        name=source.name,
        ids=tuple(ids),
        trained=tuple(trained),
        records=tuple(records),
        truncated=truncated,
        duplicates=len(source.examples) - len(examples),
        skipped=len(faults),
    )


def write_all(
    source: Source, examples: Iterable[Example], style: Style, tokenizer: Any
) -> tuple[list[tuple[Example, Segments, bool]], list[str]]:
    """The examples as text, each with whether its end is written, and the faults of the others.

    Raises:
        InputError: If there are conversations and no template to write them.
    """
    written, faults = [], []
    template: Template | None = None
    for example in examples:
        if example.chat is not None and template is None:
            template = choose(style.template, tokenizer)
        try:
            written.append((example, *write(example, style, template)))
        except Unwritable as error:
            where = example.where(source.path)
            faults.append(fault(where, error.found, error.expected, error.fix))
    return written, faults


def _row(
    pieces: Sequence[tuple[Sequence[int], bool]], closed: bool, tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """The tokens of an example and what is trained of them; an answer gets an end if it has none.

    `pieces` are the tokens of each segment with whether they are trained.
    """
    row = [token for tokens, _ in pieces for token in tokens]
    marks = [mark for tokens, mark in pieces for _ in tokens]
    end = tokenizer.eos_token_id
    if end is not None and marks and marks[-1] and not closed:
        row.append(end)
        marks.append(True)
    return row, marks


def _cuts(
    row: Sequence[int], marks: Sequence[bool], max_length: int
) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The rows of an example: consecutive ones if all is trained on, else its end."""
    starts = range(0, len(row), max_length) if all(marks) else [max(0, len(row) - max_length)]
    cuts = [(tuple(row[i : i + max_length]), marks[i : i + max_length]) for i in starts]
    return [(part, (False, *kept[1:])) for part, kept in cuts if any(kept[1:])]


def _drawn(source: Source, lines: Lines, tokenizer: Any, max_length: int, style: Style) -> Rows:
    """Rows that are made as they are drawn, see `OnDemand`."""
    drawn = OnDemand(source, lines, tokenizer, max_length, style)
    ids, trained, records = drawn.columns()
    return Rows(
        name=source.name,
        ids=ids,
        trained=trained,
        records=records,
        truncated=drawn.truncated,
        duplicates=len(lines) - len(drawn.numbers),
        estimate=drawn.trained_tokens,
    )


def distinct(source: Source, most: int | None = None) -> list[Example]:
    """The examples of a source, of equal ones the first; the first `most` of them."""
    found: dict[object, Example] = {}
    for example in source.examples:
        if most is not None and len(found) == most:
            break
        found.setdefault((example.segments, example.chat), example)
    return list(found.values())


class Stratified(Stream):
    """Batches with a fixed number of rows of every source, each source in its own random order.

    The batch of step t is a pure function of (seed, source name, t): it depends neither on the
    order of the sources nor on their sizes, and the position is one number. The shares of a source
    add up to its weight, 1 by default.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        *,
        rows: Sequence[int],
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.sources, self.rows, self.seed = sources, rows, seed
        self.weights = weights or [1.0] * len(sources)
        self.position = 0
        self._orders: dict[tuple[str, int], Tensor] = {}

    def __next__(self) -> Batch:
        picks = [
            (k, self._row(source, self.position * count + i))
            for k, (source, count) in enumerate(zip(self.sources, self.rows, strict=True))
            for i in range(count)
        ]
        self.position += 1
        shares = [self.weights[k] / self.rows[k] for k, _ in picks]
        return collate(self.sources, picks, shares)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def _row(self, source: Rows, draw: int) -> int:
        epoch, place = divmod(draw, len(source))
        key = (source.name, epoch)
        if key not in self._orders:
            self._orders.pop((source.name, epoch - 2), None)
            self._orders[key] = order(f"{self.seed}/{source.name}/{epoch}", len(source)).int()
        return int(self._orders[key][place])


def order(name: str, rows: int) -> Tensor:
    """[rows], a random order that its name alone decides."""
    return torch.randperm(rows, generator=generator(name))


def generator(name: str) -> torch.Generator:
    """A generator that its name alone seeds."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def collate(
    sources: Sequence[Rows], picks: Sequence[tuple[int, int]], shares: Sequence[float]
) -> Batch:
    """The padded batch of (source, row) picks; padding goes right and is never trained on."""
    length = max(len(sources[k].ids[i]) for k, i in picks)
    ids = torch.zeros(len(picks), length, dtype=torch.long)
    trained = torch.zeros(len(picks), length, dtype=torch.bool)
    for row, (k, i) in enumerate(picks):
        n = len(sources[k].ids[i])
        ids[row, :n] = torch.tensor(sources[k].ids[i])
        trained[row, :n] = torch.tensor(sources[k].trained[i])
    return Batch(
        ids=ids,
        trained=trained,
        source=torch.tensor([k for k, _ in picks]),
        share=torch.tensor(shares, dtype=torch.float64),
        labels=tuple(f"{sources[k].name}:{sources[k].records[i]}" for k, i in picks),
    )


def every(batch: Batch, index: int, count: int) -> Batch:
    """Every `count`-th row of a batch from row `index` on, padded no further than it needs."""
    return _part(batch, slice(index, None, count))


def cut(batch: Batch, rows: int) -> list[Batch]:
    """The batch in parts of at most `rows` rows, each padded no further than it needs."""
    starts = range(0, len(batch.ids), rows)
    return [_part(batch, slice(start, start + rows)) for start in starts]


def pick(batch: Batch, chosen: Tensor) -> Batch:
    """The rows of a batch at the indices `chosen`, padded no further than they need."""
    rows = [_part(batch, slice(i, i + 1)) for i in chosen.tolist()]
    length = max(row.ids.shape[1] for row in rows)
    return Batch(
        ids=batch.ids[chosen, :length],
        trained=batch.trained[chosen, :length],
        source=batch.source[chosen],
        share=batch.share[chosen],
        labels=tuple(batch.labels[i] for i in chosen.tolist()),
    )


def _part(batch: Batch, part: slice) -> Batch:
    columns = batch.trained[part].any(0).nonzero()
    length = int(columns.max()) + 1 if len(columns) else batch.ids.shape[1]
    return replace(
        batch,
        ids=batch.ids[part, :length],
        trained=batch.trained[part, :length],
        source=batch.source[part],
        share=batch.share[part],
        labels=batch.labels[part],
    )
