"""What a run leaves: weights in three formats, their path as a table, a page, and the verdict."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from bilevel import InputError
from bilevel.checkpoint import replace_text
from bilevel.problems.llm_reweight import (
    by_target,
    data,
    example_weights,
    spread,
    verdict,
    weighting,
)
from bilevel.problems.llm_reweight.examples import Source
from bilevel.problems.llm_reweight.exports.shares import REPEATED
from bilevel.problems.llm_reweight.indexed import Lines
from bilevel.problems.llm_reweight.journal import Journal
from bilevel.problems.llm_reweight.problem import LLMReweight

SCHEMA = "bilevel.llm_reweight/1"
TOTALS = (10_000, 100_000, 1_000_000)
"""Lengths of a training, in examples, for which the epochs of each source are told."""
PACKAGES = ("bilevel", "torch", "transformers", "tokenizers", "peft", "numpy", "scipy")
COLUMNS = ("name", "weight", "weight_std", "share_examples", "share_tokens", "records")


def write(problem: LLMReweight, result: Any, out: Path) -> list[str]:
    """Write everything into `out`; returns the closing words for the user."""
    body = describe(problem, result, out)
    write_weights(body, out)  # before the verdict, which takes longer and may be interrupted
    write_table(result, out)
    judged = _judge(problem, body, result, out)
    exported = _export(problem, out)
    from bilevel.problems.llm_reweight import report

    report.write(body, result.history, out, compared=bool(problem.compare))
    several = len(body["seeds"]) > 1
    shares = ", ".join(
        f"{s['name']} {s['weight']:.3f}" + (f" (+-{s['weight_std']:.3f})" if several else "")
        for s in body["sources"]
    )
    words = body["spread"]["sentences"] + body["warnings"]
    if problem.weigh == "examples":
        words = [example_weights.sentence(result), *words]
    return [f"learned weights: {shares}", *words, *judged, *exported]


def interim(problem: LLMReweight, result: Any, out: Path) -> None:
    """Write the weights so far, of a run that goes on or was stopped; none before a step."""
    if not any(one.history for one in result.repeats or (result,)):
        return
    write_weights(describe(problem, result, out), out)
    write_table(result, out)


def hardly_moved(weights: dict[str, float], steps: int) -> str:
    """Words for weights that are all within a tenth of uniform, which may have two reasons.

    >>> hardly_moved({"a": 0.9, "b": 0.1}, 30)
    ''
    """
    even = 1 / len(weights)
    if max(abs(w - even) for w in weights.values()) > 0.1 * even:
        return ""
    return (
        f"the weights are within a tenth of uniform after {steps} steps: either no source is "
        "better than another for this target, or the run was too short; try more steps."
    )


def describe(problem: LLMReweight, result: Any, out: Path) -> dict[str, Any]:
    """The content of weights.json; weights.schema.json says what it holds."""
    repeats = result.repeats or (result,)
    seeds = [spread.averaged_weights(one.history) for one in repeats if one.history]
    seeds = [weighting.settled(problem, weights) for weights in seeds]
    weights = weighting.settled(problem, spread.mean_weights(seeds))
    deviations = spread.deviations(seeds)
    sources = _sources(problem, weights)
    for source in sources:
        source["weight_std"] = deviations[source["name"]]
        source["weight_by_seed"] = [own[source["name"]] for own in seeds]
    drift = max(spread.drift(one.history) for one in repeats)
    done = result.status.name not in ("RUNNING", "STOPPED") and result.success
    converged = done and drift <= spread.SETTLED
    entropy = -sum(w * math.log(w) for w in weights.values() if w > 0)
    held = problem.data.targets.values()
    hint = "" if problem.weigh == "examples" else hardly_moved(weights, result.nit)
    return {
        "schema": SCHEMA,
        "status": result.status.name,
        "objective": _objective(problem),
        "unit": "example-mean",
        "target": {
            "files": [_whole_path(target.path) for target in held],
            "records": sum(len(target.examples) for target in held),
            "loss": {"uniform": None, "learned": None},
        },
        **({"targets": _targets(problem, repeats)} if len(held) > 1 else {}),
        "sources": sources,
        "entropy": entropy,
        "effective_sources": math.exp(entropy),
        "converged": converged,
        "drift": drift,
        "seeds": [one.seed for one in repeats if one.history],
        "spread": {
            "interchangeable": spread.interchangeable(seeds),
            "sentences": spread.sentences(seeds),
        },
        "steps": result.nit,
        "counts": result.counts,
        "model": problem.model,
        "method": _method(out),
        "warnings": _warnings(repeats, sources, hint, drift if done else 0.0),
        "notes": [*problem.data.notes, *([hint] if hint else [])],
        "environment": _environment(),
    }


def write_weights(body: dict[str, Any], out: Path) -> None:
    """weights.json, .csv and .yaml, each replaced as a whole."""
    table = io.StringIO()
    more = ["group"] if any("group" in source for source in body["sources"]) else []
    writer = csv.DictWriter(table, [*COLUMNS, "repeat", *more], extrasaction="ignore")
    writer.writeheader()
    repeat = "repeat_at_size_preserving_total"
    writer.writerows({**source, "repeat": source[repeat]} for source in body["sources"])
    mapping = {s["name"]: s["weight"] for s in body["sources"]}
    replace_text(out / "weights.json", json.dumps(body, indent=1))
    replace_text(out / "weights.csv", table.getvalue())
    replace_text(out / "weights.yaml", yaml.safe_dump(mapping, sort_keys=False))


def write_table(result: Any, out: Path) -> None:
    """trajectory.csv: a row for each seed and step with losses and weights."""
    table = io.StringIO()
    writer = csv.writer(table)
    repeats = [one for one in result.repeats or (result,) if one.history]
    names = list(repeats[0].history[0]["weights"])
    targets = list(repeats[0].history[0].get("targets", {}))
    heads = [*(f"weight {name}" for name in names), *(f"target {name}" for name in targets)]
    writer.writerow(["seed", "step", "upper", "lower", *heads])
    for one in repeats:
        for row in one.history:
            shares = [row["weights"][name] for name in names]
            shares += [row["targets"][name] for name in targets]
            writer.writerow([one.seed, row["step"], row["upper"], row["lower"], *shares])
    replace_text(out / "trajectory.csv", table.getvalue())


def _objective(problem: LLMReweight) -> str:
    if len(problem.target_weights) == 1:
        return "mean loss per example on the target"
    terms = (f"{weight:.4g} on {name}" for name, weight in problem.target_weights.items())
    return f"sum of mean losses per example: {', '.join(terms)}"


def _targets(problem: LLMReweight, repeats: Sequence[Any]) -> list[dict[str, Any]]:
    found = by_target.described(problem, [one.history for one in repeats])
    return [{**target, "path": _whole_path(target["path"])} for target in found]


def _export(problem: LLMReweight, out: Path) -> list[str]:
    """Write what problem.export names; an earlier one moves aside, and a failure ends no run."""
    if not problem.export:
        return []
    try:
        return replace(problem.exporter(), to=problem.export, force=True).write(out)
    except InputError as error:
        return [f"not exported: {fault}" for fault in error.faults]


def _judge(problem: LLMReweight, body: dict[str, Any], result: Any, out: Path) -> list[str]:
    """Add to the content of weights.json what fresh models say, where asked for; the sentences."""
    weights = {source["name"]: source["weight"] for source in body["sources"]}
    journal, lines = Journal(out / "trainings.jsonl"), []
    mixtures = verdict.mixtures(problem, weights)
    judged = None
    if problem.weigh == "examples":
        judged = example_weights.finish(problem, result, out)
    elif problem.verdict:
        count = len({tuple(m.values()) for m in mixtures.values()}) * problem.verdict_seeds
        steps = f"{problem.verdict_steps} steps each"
        print(f"verdict: training {count} fresh models, {steps}", flush=True)
        judged = verdict.compare(problem, mixtures, like=result.y, journal=journal)
    if judged:
        body["verdict"] = judged
        for name in ("uniform", "learned"):
            losses = judged["losses"][name]
            body["target"]["loss"][name] = sum(losses) / len(losses)
        if "targets" in body:
            body["targets"] = by_target.filled(body["targets"], judged["targets"])
            body["target"] |= by_target.whole(body["targets"], judged)
        write_weights(body, out)
        lines += judged["sentences"]
    if problem.transfer:
        rivals = {name: m for name, m in mixtures.items() if name != "oracle"}
        print(f"transfer: training fresh models {problem.transfer} likewise", flush=True)
        options = {"like": result.y, "journal": journal}
        body["transfer"] = verdict.transferred(problem, rivals, **options)
        write_weights(body, out)
        lines += body["transfer"]["sentences"]
    if problem.compare:
        from bilevel.problems.llm_reweight.baselines import comparison

        search = comparison.searched(problem, result, out)
        lines += comparison.write(problem, search, out, journal)
    return lines


def _sources(problem: LLMReweight, weights: dict[str, float]) -> list[dict[str, Any]]:
    rows = {r.name: r for r in problem.rows}
    records = {name: len(source.examples) for name, source in problem.data.sources.items()}
    # what a record has on average; a record may be several rows, and copies are left out of them
    own = {n: records[n] - rows[n].duplicates - rows[n].skipped for n in weights}
    tokens = {n: rows[n].trained_tokens / own[n] for n in weights}
    trained = sum(weights[name] * tokens[name] for name in weights)
    total = sum(records.values())
    groups = weighting.groups(problem)
    return [
        {
            "name": name,
            "path": _whole_path(source.path),
            "sha256": source.sha256,
            "format": source.format,
            "records": records[name],
            "rows": len(rows[name]),
            "trained_tokens": rows[name].trained_tokens,
            "tokens_per_record": tokens[name],
            "weight": weights[name],
            "share_examples": weights[name],
            "share_tokens": weights[name] * tokens[name] / trained,
            "repeat_at_size_preserving_total": weights[name] * total / records[name],
            "epochs_at": {str(n): weights[name] * n / records[name] for n in TOTALS},
            **_taken(problem, source),
        }
        | ({"group": groups[name]} if name in groups else {})
        for name, source in problem.data.sources.items()
    ]


def _taken(problem: LLMReweight, source: Source) -> dict[str, Any]:
    """How records were taken where that was not as they stand in the file."""
    reading = data.reading(problem, source.name)
    found: dict[str, Any] = {"columns": dict(reading.columns)} if reading.columns else {}
    found |= {"use_chosen": True} if reading.use_chosen else {}
    open_ = reading.skip and isinstance(source.examples, Lines)  # others were read as a whole
    found |= {"unsifted": True} if open_ else {}
    return found | ({"skipped": source.skipped} if source.skipped else {})


def _warnings(
    repeats: Sequence[Any], sources: Sequence[dict[str, Any]], hint: str, drift: float
) -> list[str]:
    found: Iterable[str] = (words for one in repeats for words in one.warnings)
    lines = [*dict.fromkeys(found), *([hint] if hint else [])]
    if drift > spread.SETTLED:
        lines.append(
            f"the weights still move: {drift:.0%} of the weight changed its source over the last "
            "quarter of the steps; give more steps."
        )
    lines += [
        f"source {s['name']} would be repeated {s['repeat_at_size_preserving_total']:.1f} times in "
        f"a training of as many records as there are; above {REPEATED:g} epochs more of the same "
        "teaches little: train for less, or give it more records."
        for s in sources
        if s["repeat_at_size_preserving_total"] > REPEATED
    ]
    return lines


def _whole_path(path: str) -> str:
    """A path that holds from any folder; what lies in memory has none."""
    return str(Path(path).absolute()) if Path(path).is_file() else path


def _method(out: Path) -> dict[str, Any]:
    """How the weights were found: the options of the run's parts, as its config.yaml has them."""
    path = out / "config.yaml"
    if not path.exists():
        return {}
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {k: v for k, v in config.items() if k in ("solver", "memory", "steps", "seed", "seeds")}


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
