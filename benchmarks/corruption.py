"""Do weights of examples find scrambled examples better than their plain loss does?

Run: python benchmarks/corruption.py   (writes benchmarks/results/corruption.json and .md)

One source, the docstrings of the demonstration; in 30 % of its examples the characters are
shuffled. The target is the demonstration's. No step sees which examples are scrambled.

learned     AUROC of the learned logits, low is bad;
loss        AUROC of the plain loss, high is bad, under a model trained on all examples alike for
            as many steps;
loss, long  the same after so many more steps that the training costs what learning cost;
gain        test loss of fresh models, even weights less learned ones, nats per token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

import bilevel
from bilevel.problems.llm_reweight import LLMReweight, embedded, example_weights
from bilevel.problems.llm_reweight.training import evaluate
from bilevel.solvers.penalty import scalebio

COST = 2.3
"""Plain training steps that one step of learning takes, see results/step_cost.md."""


def measure(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: who finds the scrambled examples, and what knowing them is worth."""
    corpus = embedded.corpus()
    clean = corpus.sources["docstrings"]
    mixed = embedded.scramble(clean, options.share, seed)
    with tempfile.TemporaryDirectory() as folder:
        problem = LLMReweight(
            sources=(write(Path(folder), "docstrings", mixed),),
            target=write(Path(folder), "target", corpus.target),
            test=write(Path(folder), "test", corpus.test),
            weigh="examples",
        )
        index = problem.members.index.tolist()
    bad = torch.tensor([clean[i] != mixed[i] for i in index])
    solver = scalebio(**problem.solver_wishes())
    start = time.perf_counter()
    x = bilevel.solve(problem, solver, steps=options.steps, seed=seed).x
    row: dict[str, Any] = {"seed": seed, "examples": len(bad), "scrambled": int(bad.sum())}
    row |= {"seconds": time.perf_counter() - start, "learned": auroc(-x, bad)}
    losses = {}
    for name, logits, steps in (
        ("loss", torch.zeros_like(x), options.steps),
        ("loss, long", torch.zeros_like(x), round(COST * options.steps)),
        ("learned", x, options.steps),
    ):
        model = example_weights.train(problem, logits, steps=steps, seed=seed)
        losses[name] = evaluate(model, problem.targets[0].test)
        if name != "learned":
            row[name] = auroc(example_weights.plain_losses(problem, model), bad)
    weights = problem.members.weights(x)
    row |= {"gain": losses["loss"] - losses["learned"], "test losses": losses}
    row["weight of scrambled"] = float(weights[bad].sum())
    row["their share"] = float(problem.members.rows[bad].sum() / problem.members.rows.sum())
    return row


def auroc(score: Tensor, bad: Tensor) -> float:
    """The chance that a bad example has a higher score than a good one, ties half."""
    pairs = int(bad.sum()) * int((~bad).sum())
    return float(mannwhitneyu(score[bad].numpy(), score[~bad].numpy()).statistic) / pairs


def write(folder: Path, name: str, texts: Sequence[str]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=LLMReweight.default_steps)
    parser.add_argument("--share", type=float, default=0.3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in options.seeds:
        rows.append(measure(seed, options))
        print({k: v for k, v in rows[-1].items() if k != "test losses"}, flush=True)
    shown = ["seed", "learned", "loss", "loss, long", "weight of scrambled", "their share"]
    record.write(
        "corruption",
        "Scrambled examples found by their weights",
        [f"- {line.strip()}" for line in (__doc__ or "").strip().splitlines()[4:] if line.strip()],
        rows,
        [*shown, "gain", "seconds"],
    )


if __name__ == "__main__":
    main()
