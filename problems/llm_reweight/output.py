"""What a run leaves: weights in three formats, plots, one HTML page, and the verdict."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from bilevel.problems.llm_reweight import verdict
from bilevel.problems.llm_reweight.problem import LLMReweight

SCHEMA = "bilevel.llm_reweight/1"


def averaged_weights(history: Sequence[dict[str, Any]], *, tail: float = 0.25) -> dict[str, float]:
    """Mean of the weights over the last `tail` of the path."""
    last = history[-max(1, int(tail * len(history))) :]
    return {n: sum(r["weights"][n] for r in last) / len(last) for n in last[0]["weights"]}


def write(problem: LLMReweight, result: Any, out: Path) -> list[str]:
    """Write everything into `out`; returns the closing words for the user."""
    weights = averaged_weights(result.history)
    body = describe(problem, result, weights)
    hint = hardly_moved(weights, result.nit)
    body["notes"] += [hint] if hint else []
    write_weights(body, out)  # before the verdict, which takes longer and may be interrupted
    judged = None
    if problem.verdict:
        mixtures = verdict.mixtures(problem, weights)
        count = len(mixtures) * problem.verdict_seeds
        print(
            f"verdict: training {count} fresh models, {problem.verdict_steps} steps each",
            flush=True,
        )
        judged = verdict.compare(problem, mixtures, like=result.y)
        body["verdict"] = judged
        write_weights(body, out)
    from bilevel.problems.llm_reweight import report

    report.write(body, result.history, out)
    shares = ", ".join(f"{s['name']} {s['weight']:.3f}" for s in body["sources"])
    words = [hint] if hint else []
    return [f"learned weights: {shares}", *words, *(judged["sentences"] if judged else [])]


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


def describe(problem: LLMReweight, result: Any, weights: dict[str, float]) -> dict[str, Any]:
    """The content of weights.json."""
    rows = {r.name: r for r in problem.rows}
    tokens = {n: weights[n] * rows[n].trained_tokens / len(rows[n]) for n in weights}
    total = sum(len(s.examples) for s in problem.data.sources.values())
    entropy = -sum(w * torch.log(torch.tensor(w)).item() for w in weights.values() if w > 0)
    sources = [
        {
            "name": name,
            "path": source.path,
            "sha256": source.sha256,
            "format": source.format,
            "records": len(source.examples),
            "rows": len(rows[name]),
            "trained_tokens": rows[name].trained_tokens,
            "weight": weights[name],
            "share_examples": weights[name],
            "share_tokens": tokens[name] / sum(tokens.values()),
            "repeat_at_size_preserving_total": weights[name] * total / len(source.examples),
        }
        for name, source in problem.data.sources.items()
    ]
    return {
        "schema": SCHEMA,
        "objective": "mean loss per example on the target",
        "unit": "example-mean",
        "target": {
            "files": [problem.data.target.path],
            "records": len(problem.data.target.examples),
        },
        "sources": sources,
        "entropy": entropy,
        "effective_sources": float(torch.tensor(entropy).exp()),
        "status": result.status.name,
        "steps": result.nit,
        "counts": result.counts,
        "model": problem.model,
        "notes": list(problem.data.notes),
        "environment": {"torch": torch.__version__},
    }


def write_weights(body: dict[str, Any], out: Path) -> None:
    """weights.json, .csv and .yaml, each replaced as a whole."""
    columns = ["name", "weight", "share_examples", "share_tokens", "records"]
    columns.append("repeat_at_size_preserving_total")
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(body["sources"])
    mapping = {s["name"]: s["weight"] for s in body["sources"]}
    _replace(out / "weights.json", json.dumps(body, indent=1))
    _replace(out / "weights.csv", table.getvalue())
    _replace(out / "weights.yaml", yaml.safe_dump(mapping, sort_keys=False))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
