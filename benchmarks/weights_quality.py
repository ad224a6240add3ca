"""Are the learned weights decisive where sources differ and even where they do not?

Run: python benchmarks/weights_quality.py   (writes benchmarks/results/weights_quality.json and .md)

Tasks, all from the embedded text, the same settings throughout:
demo       the six sources of the demonstration;
halves     its best source cut in two interleaved halves, beside the others;
six_cuts   six interleaved cuts of that source and nothing else: there is nothing to learn;
noise      the six cuts with 0, 20, ... 100 % of the paragraphs scrambled;
tenfold    the demonstration with its best source repeated ten times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import record
import torch
from scipy.stats import spearmanr

import bilevel
from bilevel import plugins
from bilevel.problems.llm_reweight import LLMReweight, embedded, verdict
from bilevel.problems.llm_reweight.spread import averaged_weights

TASKS = ("demo", "halves", "six_cuts", "noise", "tenfold")
ROWS = 4  # of every source in a batch, as in the demonstration


def sources(task: str) -> dict[str, Sequence[str]]:
    """The paragraphs of every source of a task."""
    found: dict[str, Sequence[str]] = dict(embedded.corpus().sources)
    if task == "halves":
        first, second = embedded.halves(found.pop("docstrings"))
        return {"first half": first, "second half": second, **found}
    if task == "tenfold":
        return found | {"docstrings": found["docstrings"] * 10}
    cuts = embedded.halves(found["docstrings"], 6)
    if task == "six_cuts":
        return {f"cut {k}": cut for k, cut in enumerate(cuts)}
    if task == "noise":
        scrambled = [embedded.scramble(c, 0.2 * k, seed=k) for k, c in enumerate(cuts)]
        return {f"noise {0.2 * k:.1f}": cut for k, cut in enumerate(scrambled)}
    return found


def learn(task: str, solver: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: the weights, what they show, and the verdict for the tasks that have one."""
    torch.set_num_threads(1)
    corpus = embedded.corpus()
    with tempfile.TemporaryDirectory() as folder:
        texts = sources(task)
        files = {n: write(Path(folder), n, t) for n, t in texts.items()}
        problem = LLMReweight(
            sources=tuple(f"{n}={p}" for n, p in files.items()),
            target=write(Path(folder), "target", corpus.target),
            test=write(Path(folder), "test", corpus.test),
            batch=ROWS * len(files),
        )
        start = time.perf_counter()
        made = plugins.find("solver", solver)()
        result = bilevel.solve(problem, made, steps=options.steps, seed=seed)
        weights = averaged_weights(result.history)
        row = {"task": task, "solver": solver, "seed": seed, "weights": weights}
        row |= {"seconds": time.perf_counter() - start, **measures(task, weights)}
        if task in ("demo", "six_cuts"):
            row |= judge(problem, weights, task)
        return row


def measures(task: str, weights: dict[str, float]) -> dict[str, float]:
    values = list(weights.values())
    if task == "halves":
        return {"ratio of halves": max(values[:2]) / min(values[:2])}
    if task == "six_cuts":
        return {"max - min": max(values) - min(values)}
    if task == "noise":
        clean = [1 - float(n.split()[1]) for n in weights]
        return {"Spearman": float(spearmanr(values, clean).statistic)}
    return {"relevant mass": weights["docstrings"] + weights["reference"]}


def judge(problem: LLMReweight, weights: dict[str, float], task: str) -> dict[str, Any]:
    """Fresh models on paired seeds: the learned mixture, uniform, and the right source alone."""
    mixtures = verdict.mixtures(problem, weights)
    if task == "demo":
        mixtures["oracle"] = {n: float(n == "docstrings") for n in weights}
    judged = verdict.compare(problem, mixtures)
    gains = judged["gain_over_uniform"]
    return judged | {
        "better than uniform": f"{sum(g > 0 for g in gains)} of {len(gains)}",
        "gain, nats": statistics.fmean(gains),
        "gap closed": judged["gap_closed"],
        "verdict": judged["sentences"][1].split(" (")[0],
    }


def write(folder: Path, name: str, texts: Sequence[str]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def compare_tenfold(rows: list[dict[str, Any]]) -> None:
    """Add to every tenfold run the largest change of a weight against the demo of its seed."""
    demos = {(r["solver"], r["seed"]): r["weights"] for r in rows if r["task"] == "demo"}
    for row in rows:
        other = demos.get((row["solver"], row["seed"]))
        if row["task"] == "tenfold" and other:
            row["change"] = max(abs(row["weights"][n] - other[n]) for n in other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--solvers", nargs="+", default=["scalebio_votes", "scalebio"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=LLMReweight.default_steps)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = list(product(options.tasks, options.solvers, range(options.seeds)))
    with ProcessPoolExecutor(options.workers) as pool:
        futures = [pool.submit(learn, *job, options) for job in jobs]
        rows = [future.result() for future in futures]
    compare_tenfold(rows)
    shown = ["relevant mass", "ratio of halves", "max - min", "Spearman", "change", "gap closed"]
    shown += ["better than uniform", "gain, nats", "verdict", "seconds"]
    record.write(
        "weights_quality",
        "Quality of the learned weights",
        [f"- {line}" for line in (__doc__ or "").strip().splitlines()[5:]],
        rows,
        ["task", "solver", "seed", *shown],
    )


if __name__ == "__main__":
    main()
