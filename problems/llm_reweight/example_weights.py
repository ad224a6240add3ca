"""What a run leaves about every example: its weight, its loss in a plain training, a verdict."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.checkpoint import replace_text
from bilevel.problems.llm_reweight import by_target, verdict
from bilevel.problems.llm_reweight.journal import Journal
from bilevel.problems.llm_reweight.per_example import Members, Pooled, words
from bilevel.problems.llm_reweight.problem import LLMReweight
from bilevel.problems.llm_reweight.tokens import collate
from bilevel.problems.llm_reweight.training import end, fresh, trained

ROWS = 64
"""Rows of a forward pass that measures losses."""


def finish(problem: LLMReweight, result: Any, out: Path) -> dict[str, Any] | None:
    """Write the files of the examples, and after the trainings of a verdict once more with losses.

    Over several seeds the logits are averaged. Returns the verdict, if one was asked for.
    """
    x = torch.stack([one.x - one.x.mean() for one in result.repeats or (result,)]).mean(0)
    write(problem, x, out)
    if not problem.verdict:
        return None
    print(
        f"verdict: training {2 * problem.verdict_seeds} fresh models, {problem.verdict_steps} "
        "steps each, on rows drawn by the weights of examples and on all alike",
        flush=True,
    )
    losses, plain = judge(problem, x, like=result.y)
    write(problem, x, out, losses=plain)
    before = by_target.untrained(problem, Journal(), like=result.y)
    return verdict.judged(problem, losses, before=before)


def sentence(result: Any) -> str:
    """What the last step says of all examples."""
    numbers = result.history[-1]["examples"]
    return (
        f"{numbers['count']:,} examples have {words(numbers)}, as much as even weights on "
        f"{numbers['effective_share']:.0%} of the rows; see example_weights.jsonl"
    )


def write(
    problem: LLMReweight, x: Tensor, out: Path, *, losses: Tensor | None = None
) -> tuple[Path, Path]:
    """Write example_weights.jsonl and example_weights.npy, each replaced as a whole.

    Args:
        problem: Whose sources were weighed.
        x: [records], the learned logits.
        out: The run's folder.
        losses: [records], of `plain_losses`, where they were measured.

    Returns:
        The paths of the two files, whose lines and entries stand in the same order.
    """
    weights = problem.members.weights(x)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in describe(problem, x, losses))
    listed, array = out / "example_weights.jsonl", out / "example_weights.npy"
    replace_text(listed, "".join(lines))
    buffer = io.BytesIO()
    np.save(buffer, weights.numpy(), allow_pickle=False)
    partial = array.with_name(f".{array.name}.partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, array)
    return listed, array


def describe(
    problem: LLMReweight, x: Tensor, losses: Tensor | None = None
) -> Iterator[dict[str, Any]]:
    """A mapping for each record that was trained on, in the order of x."""
    found, score = problem.members, (x - x.mean()).tolist()
    weights = found.weights(x)
    multiplier = (weights / found.rows * found.rows.sum()).tolist()
    streams = [s for s in problem.drawn if isinstance(s, Pooled) and s.position]
    counts = [s.seen(s.position) for s in streams]
    seen = torch.stack(counts).sum(0).tolist() if counts else None
    place = 0
    for k, (name, source) in enumerate(problem.data.sources.items()):
        kept = found.index[found.source == k].tolist()
        texts = {e.index: e.text() for e in source.examples}
        for index in kept:
            yield {
                "source": name,
                "index": index,
                "id": f"{name}:{index}",
                "sha1": hashlib.sha1(texts[index].encode(), usedforsecurity=False).hexdigest(),
                "weight": float(weights[place]),
                "multiplier": multiplier[place],
                "score": score[place],
                "seen": seen[place] if seen else None,
                "rows": int(found.rows[place]),
                **({} if losses is None else {"loss": float(losses[place])}),
            }
            place += 1


def train(problem: LLMReweight, x: Tensor, *, steps: int, seed: int, like: Any = None) -> nn.Module:
    """A fresh model trained on rows drawn by the weights of their records, as a verdict's are.

    Args:
        problem: Whose sources, model, batch size and `verdict_lr` are used.
        x: [records], logits; zeros draw all rows alike.
        steps: Of the training.
        seed: Of the model and of what is drawn; equal ones are paired.
        like: An adapter, where one of its kind trains on the model; else everything trains.
    """
    model = fresh(problem, 1000 + seed, like=like, seed=seed)
    draws = _draws(_row_weights(problem.members, x), count=problem.batch, seed=seed)
    places = _places(problem)
    picked = ([places[row] for row in drawn] for drawn in draws)
    batches = (collate(problem.rows, own, [1 / len(own)] * len(own)) for own in picked)
    return end(trained(problem, model, batches, steps=steps))


@torch.no_grad()
def plain_losses(problem: LLMReweight, model: nn.Module) -> Tensor:
    """[records], float64, the mean loss of each record's rows, nats per token."""
    places, parts = _places(problem), []
    for start in range(0, len(places), ROWS):
        picks = places[start : start + ROWS]
        batch = collate(problem.rows, picks, [1.0] * len(picks))
        parts.append(problem.losses(model, batch).double().cpu())
    found = problem.members
    sums = torch.zeros(len(found), dtype=torch.float64)
    return sums.index_add(0, torch.cat(found.member), torch.cat(parts)) / found.rows


def judge(
    problem: LLMReweight, x: Tensor, *, like: Any = None
) -> tuple[dict[str, list[by_target.Losses]], Tensor]:
    """Test losses of models trained with the learned weights and with even ones, on paired seeds.

    Returns:
        The losses by mixture ("learned", "uniform"), seed and target, and [records] the plain loss
        of each under the first model trained on all rows alike.
    """
    even = torch.zeros_like(x)
    losses: dict[str, list[by_target.Losses]] = {"learned": [], "uniform": []}
    plain = None
    for seed in range(problem.verdict_seeds):
        for name, drawn in (("learned", x), ("uniform", even)):
            model = train(problem, drawn, steps=problem.verdict_steps, seed=seed, like=like)
            losses[name].append(by_target.evaluated(problem, model))
            if plain is None and name == "uniform":
                plain = plain_losses(problem, model)
    assert plain is not None
    return losses, plain


def _row_weights(found: Members, x: Tensor) -> Tensor:
    """[rows], the share of each row of all sources in what is drawn."""
    return (found.weights(x) / found.rows)[torch.cat(found.member)]


def _draws(share: Tensor, *, count: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of rows by systematic sampling over epochs of as many draws as rows.

    In each epoch a row of share w comes n w times, up to rounding; which rows come together, and
    when, is drawn anew.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(share) // count)
    while True:
        order = torch.randperm(len(share), generator=generator)
        edges = share[order].cumsum(0)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        for step in torch.randperm(steps, generator=generator):
            places = (torch.arange(count) + (step + offset) / steps) / count
            drawn = torch.searchsorted(edges, places * edges[-1]).clamp(max=len(share) - 1)
            yield order[drawn].tolist()


def _places(problem: LLMReweight) -> list[tuple[int, int]]:
    """Every row as (source, row), in the order of `Members.member`."""
    return [(k, i) for k, rows in enumerate(problem.rows) for i in range(len(rows))]
