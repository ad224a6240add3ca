"""One comparison of the learned weights with their rivals at equal budgets: a table and a plot."""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel import InputError, Memory, Solver
from bilevel.checkpoint import replace_text
from bilevel.markdown import escaped
from bilevel.markdown import table as columns
from bilevel.problems.llm_reweight import by_target, verdict, weighting
from bilevel.problems.llm_reweight.baselines import registry
from bilevel.problems.llm_reweight.baselines.lab import Lab, search_tokens
from bilevel.problems.llm_reweight.journal import Journal
from bilevel.problems.llm_reweight.problem import LLMReweight
from bilevel.problems.llm_reweight.spread import averaged_weights

SCHEMA = "bilevel.comparison/1"
ALWAYS = ("learned", "uniform")
"""Compared whether they are named or not."""
SEEDS = 3
"""Pairs, at the least."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """The learned search of a run, which the others are held against."""

    weights: list[dict[str, float]]
    """One entry for each seed of the run; pairs beyond these are searched for."""
    tokens: float
    """Of one search."""
    seed: int = 0
    """The first of the run; the searches of the pairs have this and those after it."""
    solver: Solver | None = None
    memory: Memory | None = None
    like: Any = None
    """An adapter, where the run trained one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method: one entry of each list for a seed."""

    method: str
    weights: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    each: list[by_target.Losses] = field(default_factory=list)
    """The losses of each target."""
    tokens: list[float] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


def compare(
    problem: LLMReweight,
    search: Search,
    words: Sequence[str],
    journal: Journal,
    *,
    say: Any = print,
) -> list[Row]:
    """Search with every method and train fresh models with what it found, on paired seeds.

    Seeds come in the outer loop, so that a run which is stopped has whole pairs. The rows are
    sorted by mean test loss.
    """
    budget = float(problem.compare_tokens or search.tokens)
    seeds = max(SEEDS, problem.verdict_seeds)
    rows = {word: Row(method=word) for word in dict.fromkeys([*ALWAYS, *words])}
    say(
        f"compare: {len(rows)} methods, {seeds} paired seeds, up to {budget:,.0f} tokens for each "
        f"search, {problem.verdict_steps} steps for each training"
    )
    for seed in range(seeds):
        for word, row in rows.items():
            new = one(problem, search, word, seed, budget, journal)
            each = verdict.kept_losses(problem, new["weights"], seed, journal, like=search.like)
            loss = by_target.weighted(problem, each)
            say(f"compare: seed {seed}, {word}: test loss {loss:.3f}")
            row.losses.append(loss)
            row.each.append(each)
            for name in ("weights", "tokens", "seconds"):
                getattr(row, name).append(new[name])
            row.notes.append(new["note"])
    return sorted(rows.values(), key=lambda row: row.loss)


def chosen(words: Sequence[str], names: list[str]) -> tuple[list[str], list[str]]:
    """The methods that `problem.compare` names on sources of these names, and what is left out.

    Args:
        words: Of methods, or `all`; commas may separate them too.
        names: Of the sources.

    Returns:
        The words of the methods, and for those of `all` that cannot run why.

    Raises:
        InputError: If one that is named does not exist or cannot run.
    """
    faults, found, notes = [], [], []
    for word in filter(None, ",".join(words).split(",")):
        if word == "all":
            for name, method in registry.METHODS.items():
                reasons = method.check(names)
                found += [] if reasons else [name]
                notes += [f"compare=all leaves out {name}: {reason}" for reason in reasons]
            continue
        try:
            reasons = registry.find(word).check(names)
        except InputError as error:
            reasons = list(error.faults)
        faults += reasons
        found.append(word)
    if faults:
        raise InputError(faults)
    return list(dict.fromkeys(found)), notes


def conclusion(rows: Sequence[Row], budget: float) -> list[str]:
    """What the table says, the winner first whoever it is."""
    best = rows[0]
    own = next(row for row in rows if row.method == "learned")
    lines = [
        f"lowest mean test loss of {len(rows)} methods over {len(own.losses)} paired seeds: "
        f"{best.method}, {best.loss:.3f}"
    ]
    if best is not own:
        span = verdict.spanned(verdict.differences(own.losses, best.losses))
        known = verdict.interval(verdict.differences(own.losses, best.losses))[0] > 0
        words = "it beats the learned weights" if known else "no evidence that it beats learned"
        lines.append(f"{words} ({own.loss:.3f}; {span})")
    close = [
        row.method
        for row in rows[1:]
        if verdict.interval(verdict.differences(row.losses, best.losses))[0] <= 0
    ]
    if close:
        lines.append(f"not told apart from {best.method} by these seeds: {', '.join(close)}")
    cheap = [r.method for r in rows if statistics.fmean(r.tokens) < 0.9 * budget]
    if cheap:
        lines.append(f"with less than nine tenths of the budget: {', '.join(cheap)}")
    return lines


def write(problem: LLMReweight, search: Search, out: Path, journal: Journal) -> list[str]:
    """Compare, write comparison.json, .md, .csv and .png into `out`; returns the closing words."""
    words, left_out = chosen(problem.compare, problem.names)
    rows = compare(problem, search, words, journal)
    budget = float(problem.compare_tokens or search.tokens)
    base = next(row for row in rows if row.method == "uniform")
    body = {
        "schema": SCHEMA,
        "budget_tokens": budget,
        "steps": problem.verdict_steps,
        "seeds": len(base.losses),
        "rows": [described(row, base, budget) for row in rows],
        "sentences": conclusion(rows, budget),
        "notes": left_out,
    }
    replace_text(out / "comparison.json", json.dumps(body, indent=1))
    replace_text(out / "comparison.md", markdown(body))
    replace_text(out / "comparison.csv", table(body))
    from bilevel.problems.llm_reweight.baselines import drawing

    drawing.draw(body, out / "comparison.png")
    return [*body["sentences"], *left_out, f"comparison: {out / 'comparison.md'}"]


def described(row: Row, base: Row, budget: float) -> dict[str, Any]:
    """A row of comparison.json; `base` is that of uniform."""
    gains = verdict.differences(base.losses, row.losses)
    low, high = verdict.interval(gains)
    spent = statistics.fmean(row.tokens)
    names = row.weights[0]
    several = (
        {"targets": by_target.compared(row.each, base.each)}
        if len((row.each or [{}])[0]) > 1
        else {}
    )
    return {
        "method": row.method,
        "loss": row.loss,
        "gain_over_uniform": statistics.fmean(gains),
        "interval": [low, high],
        "better_than_uniform": f"{sum(g > 0 for g in gains)} of {len(gains)}",
        "search_tokens": spent,
        "share_of_budget": spent / budget,
        "search_seconds": statistics.fmean([t for t in row.seconds if t is not None] or [0.0]),
        "weights": {n: statistics.fmean(w[n] for w in row.weights) for n in names},
        **several,
        "seeds": [
            {"loss": loss, "tokens": spent, "weights": weights, "note": note}
            for loss, spent, weights, note in zip(
                row.losses, row.tokens, row.weights, row.notes, strict=True
            )
        ],
    }


def markdown(body: dict[str, Any]) -> str:
    """The table for readers, with the sentences above it."""
    said = [f"- {escaped(line)}" for line in body["sentences"] + body["notes"]]
    lines = ["# Comparison", "", *said, ""]
    lines.append(
        f"Test loss of fresh models after {body['steps']} steps, nats per token; gain over uniform "
        f"with the 95 % interval over {body['seeds']} pairs; budget of a search "
        f"{body['budget_tokens']:,.0f} tokens. Weights are means over the seeds."
    )
    names = list(body["rows"][0]["weights"])
    shown = names if len(names) <= 8 else []
    heads = ["method", "test loss", "gain over uniform", "interval", "better", "budget", "seconds"]
    rows = []
    for row in body["rows"]:
        low, high = row["interval"]
        cells = [row["method"], f"{row['loss']:.3f}", f"{row['gain_over_uniform']:+.3f}"]
        cells += [f"{low:+.3f} to {high:+.3f}", row["better_than_uniform"]]
        cells += [f"{row['share_of_budget']:.0%}", f"{row['search_seconds']:.0f}"]
        cells += [f"{row['weights'][n]:.3f}" for n in shown]
        rows.append(cells)
    lines += ["", *columns([*heads, *shown], rows)]
    if targets := list(body["rows"][0].get("targets", {})):
        lines += [
            "",
            "The same on each target: test loss, gain over uniform and its interval.",
        ]
        each = [[row["method"], *map(_on_target, row["targets"].values())] for row in body["rows"]]
        lines += ["", *columns(["method", *targets], each)]
    return "\n".join(lines) + "\n"


def _on_target(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    gain = f"{found['gain_over_uniform']:+.3f}, {low:+.3f} to {high:+.3f}"
    return f"{found['loss']:.3f} ({gain})"


def table(body: dict[str, Any]) -> str:
    """The table as CSV, with all weights."""
    columns = ["method", "loss", "gain_over_uniform", "low", "high", "better_than_uniform"]
    columns += ["search_tokens", "share_of_budget", "search_seconds"]
    names = list(body["rows"][0]["weights"])
    text = io.StringIO()
    writer = csv.writer(text)
    targets = list(body["rows"][0].get("targets", {}))
    more = [*(f"weight of {name}" for name in names), *(f"loss on {name}" for name in targets)]
    writer.writerow([*columns, *more])
    for row in body["rows"]:
        flat = row | {"low": row["interval"][0], "high": row["interval"][1]}
        losses = [row["targets"][name]["loss"] for name in targets]
        weights = [row["weights"][name] for name in names]
        writer.writerow([*(flat[c] for c in columns), *weights, *losses])
    return text.getvalue()


def searched(problem: LLMReweight, result: Any, out: Path) -> Search:
    """The learned search of a finished run in the folder `out`."""
    from bilevel.options import read

    config, parts = out / "config.yaml", {}
    options = read([f"config={config}"])[0] if config.exists() else None
    if options:
        parts = {"solver": options.solver, "memory": options.memory, "seed": options.settings.seed}
    repeats = [one for one in result.repeats or (result,) if one.history]
    spent = statistics.fmean(search_tokens(problem, one.counts) for one in repeats)
    weights = [weighting.settled(problem, averaged_weights(one.history)) for one in repeats]
    return Search(weights=weights, tokens=spent, like=result.y, **parts)


def one(
    problem: LLMReweight, search: Search, word: str, pair: int, budget: float, journal: Journal
) -> dict[str, Any]:
    """Weights, tokens, seconds and a note of one method for one pair."""
    if word == "learned" and pair < len(search.weights) and not problem.compare_tokens:
        spent = {"tokens": search.tokens, "seconds": None}
        return {"weights": search.weights[pair], **spent, "note": "the weights of this run"}
    seed = search.seed + pair

    def found() -> dict[str, Any]:
        parts = {"solver": search.solver, "memory": search.memory, "like": search.like}
        lab = Lab(problem=problem, budget=budget, seed=seed, **parts)
        start = time.perf_counter()
        answer = registry.find(word).search(lab)
        spent = {"tokens": lab.tokens, "seconds": time.perf_counter() - start}
        return {"weights": answer.weights, **spent, "note": answer.note}

    return journal.keep({"search": word, "seed": seed, "budget": budget}, found)
