"""Examples as token rows: tokenizing, cutting, and stratified batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import InputError, Stream
from bilevel.problems.llm_reweight.formats import Segments, fault
from bilevel.problems.llm_reweight.records import SHOWN, Example, Source


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The tokenized examples of one source; `targets[i]` marks the trained tokens of `ids[i]`."""

    name: str
    ids: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[bool, ...], ...]
    records: tuple[int, ...]
    """The 0-based record in the file that each row was cut from."""
    truncated: int = 0
    """Rows that lost tokens to the length limit."""
    duplicates: int = 0
    """Records that repeat another one of the same source and were left out."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        return sum(map(sum, self.trained))


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
    """[rows], one over the rows of that source in the WHOLE batch, float64."""
    labels: tuple[str, ...]
    """source:record of each row, for messages."""


def tokenize(source: Source, tokenizer: Any, *, max_length: int) -> Rows:
    """Turn a source's examples into rows of at most `max_length` tokens.

    An example that is trained on throughout is cut into consecutive rows. Any other keeps its end
    when it is too long, so that the answer survives. Rows without a trained token are dropped, and
    so are records that repeat another: the weight of a source does not depend on its copies.

    Raises:
        InputError: If a record has no token left to train on; says which.
    """
    end = tokenizer.eos_token_id
    ids, trained, records, truncated = [], [], [], 0
    empty: list[Example] = []
    examples = distinct(source)
    texts = [text for example in examples for text, _ in example.segments]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    for example in examples:
        row: list[int] = []
        marks: list[bool] = []
        for _, mark in example.segments:
            piece = next(pieces)
            row += piece
            marks += [mark] * len(piece)
        if end is not None and marks and marks[-1]:
            row.append(end)
            marks.append(True)
        whole = all(marks)
        truncated += not whole and len(row) > max_length
        cuts = range(0, len(row), max_length) if whole else [max(0, len(row) - max_length)]
        kept = len(ids)
        for cut in cuts:
            part, part_marks = row[cut : cut + max_length], marks[cut : cut + max_length]
            if any(part_marks[1:]):
                ids.append(tuple(part))
                trained.append((False, *part_marks[1:]))
                records.append(example.index)
        if len(ids) == kept:
            empty.append(example)
    if empty:
        raise InputError(_nothing_to_train(source, empty, max_length))
    return Rows(
        name=source.name,
        ids=tuple(ids),
        trained=tuple(trained),
        records=tuple(records),
        truncated=truncated,
        duplicates=len(source.examples) - len(examples),
    )


def _nothing_to_train(source: Source, empty: Sequence[Example], max_length: int) -> list[str]:
    fix = f"remove the record or raise problem.max_length={max_length}"
    found, expected = "no token left to train on", "a trained token behind another one"
    shown = [fault(e.where(source.path), found, expected, fix) for e in empty[:SHOWN]]
    more = len(empty) - SHOWN
    return shown + ([f"{source.path}: and {more} more."] if more > 0 else [])


def distinct(source: Source) -> list[Example]:
    """The examples of a source, of equal ones the first."""
    found: dict[Segments, Example] = {}
    for example in source.examples:
        found.setdefault(example.segments, example)
    return list(found.values())


class Stratified(Stream):
    """Batches with a fixed number of rows of every source, each source in its own random order.

    The batch of step t is a pure function of (seed, source name, t): it depends neither on the
    order of the sources nor on their sizes, and the position is one number.
    """

    def __init__(self, sources: Sequence[Rows], *, rows: Sequence[int], seed: int) -> None:
        self.sources, self.rows, self.seed = sources, rows, seed
        self.position = 0
        self._orders: dict[tuple[str, int], list[int]] = {}

    def __next__(self) -> Batch:
        picks = [
            (k, self._row(source, self.position * count + i))
            for k, (source, count) in enumerate(zip(self.sources, self.rows, strict=True))
            for i in range(count)
        ]
        self.position += 1
        shares = [1.0 / self.rows[k] for k, _ in picks]
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
            digest = hashlib.sha256(f"{self.seed}/{source.name}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._orders[key] = torch.randperm(len(source), generator=generator).tolist()
        return self._orders[key][place]


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


def _part(batch: Batch, part: slice) -> Batch:
    columns = batch.trained[part].any(0).nonzero()
    length = int(columns.max()) + 1 if len(columns) else batch.ids.shape[1]
    return Batch(
        ids=batch.ids[part, :length],
        trained=batch.trained[part, :length],
        source=batch.source[part],
        share=batch.share[part],
        labels=batch.labels[part],
    )
