"""Are the learned weights as good as those of their rivals, and as the best ones there are?

Run: python benchmarks/mixtures.py   (writes benchmarks/results/mixtures*.json and .md)

Three parts, all on the embedded text, every search with the tokens that learning the weights takes:
compare  the six sources of the demonstration, every method, paired seeds;
grid     three sources, docstrings, reference and code: the learned weights against 66 mixtures in
         steps of 0.1, the best of which is trained again on seeds that did not choose it;
many     22 sources: kinds of text in several cuts, scrambled to several degrees, and noise.

What is finished is kept in --folder, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import record
import torch

from bilevel.problems.llm_reweight import LLMReweight, embedded, verdict
from bilevel.problems.llm_reweight.baselines import comparison
from bilevel.problems.llm_reweight.baselines.drawing import draw
from bilevel.problems.llm_reweight.baselines.lab import search_tokens
from bilevel.problems.llm_reweight.by_target import weighted
from bilevel.problems.llm_reweight.journal import Journal

PARTS = ("many", "compare", "grid")
THREE = ("docstrings", "reference", "code")
MANY = ("influence", "influence_sharp", "mixmin", "rho")
SHARP = ("influence_sharp", 0)
SECOND = 6  # mixtures of the grid that are trained on more seeds
FRESH = 100  # the first seed of the trainings that did not choose the best of the grid


def sources(part: str) -> dict[str, Sequence[str]]:
    """The paragraphs of every source of a part."""
    found: dict[str, Sequence[str]] = dict(embedded.corpus().sources)
    if part == "compare":
        return found
    if part == "grid":
        return {name: found[name] for name in THREE}
    docs = embedded.halves(found["docstrings"], 8)
    cuts = {f"docstrings {k}": cut for k, cut in enumerate(docs[:4])}
    for k, cut in enumerate(docs[4:], 1):
        cuts[f"scrambled {25 * k} %"] = embedded.scramble(cut, k / 4, seed=k)
    for name, count in {
        "reference": 4,
        "code": 4,
        "unicode": 2,
        "base64": 2,
        "scrambled": 2,
    }.items():
        for k, cut in enumerate(embedded.halves(found[name], count)):
            cuts[f"{name} {k}"] = cut
    return cuts


def problem(part: str, options: argparse.Namespace) -> LLMReweight:
    """The sources of a part as files, with a budget of `options.steps` learning steps."""
    corpus, texts = embedded.corpus(), sources(part)
    folder = options.folder / part
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: write(folder, name, t) for name, t in texts.items()}
    more: dict[str, Any] = {"batch": 22} if part == "many" else {}
    made = LLMReweight(
        sources=tuple(f"{name}={path}" for name, path in files.items()),
        target=write(folder, "target", corpus.target),
        test=write(folder, "test", corpus.test),
        verdict_steps=options.train,
        verdict_seeds=options.seeds,
        **more,
    )
    made.prepare()
    budget = search_tokens(made, {"upper_grad": options.steps, "lower_grad": 2 * options.steps})
    object.__setattr__(made, "compare_tokens", int(budget))  # it needs the data, which are read
    return made


def compared(part: str, words: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one comparison, best first."""
    made = problem(part, options)
    journal = Journal(options.folder / f"{part}-{options.steps}.jsonl")
    search = comparison.Search(weights=[], tokens=0.0)
    rows = comparison.compare(made, search, words, journal)
    base = next(row for row in rows if row.method == "uniform")
    found = [comparison.described(row, base, made.compare_tokens) for row in rows]
    sentences = comparison.conclusion(rows, made.compare_tokens)
    print("\n".join(sentences), flush=True)
    body = {"rows": found, "budget_tokens": made.compare_tokens}
    draw(body, record.RESULTS / f"mixtures_{part}.png")
    lines = [f"- {line}" for line in sentences]
    lines += goals(found) if part == "many" else []
    shown = [
        row
        | {f"loss {k}": seed["loss"] for k, seed in enumerate(row["seeds"])}
        | {"low": row["interval"][0], "high": row["interval"][1]}
        | {f"w {n}": w for n, w in row["weights"].items()}
        for row in found
    ]
    columns = ["method", "loss", "gain_over_uniform", "low", "high", "better_than_uniform"]
    columns += ["share_of_budget", "search_seconds"]
    columns += [f"w {n}" for n in found[0]["weights"]] if part == "compare" else []
    record.write(
        f"mixtures_{part}",
        f"Mixtures: {part}",
        [*head(part), *lines],
        shown,
        columns,
        script="mixtures",
    )
    return found


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """Learned against uniform, and against influence with sharpened weights."""
    losses = {row["method"]: [seed["loss"] for seed in row["seeds"]] for row in rows}
    won = sum(u > w for u, w in zip(losses["uniform"], losses["learned"], strict=True))
    behind = verdict.differences(losses["learned"], losses["influence_sharp"])
    return [
        f"- learned below uniform in {won} of {len(losses['learned'])} pairs;",
        f"- learned minus influence with sharpened weights: {verdict.spanned(behind)}.",
    ]


def grid(options: argparse.Namespace) -> None:
    """The regret of the learned weights against the best of 66 mixtures."""
    made = problem("grid", options)
    journal = Journal(options.folder / f"grid-{options.steps}.jsonl")
    points = [
        dict(zip(made.names, (a / 10, b / 10, (10 - a - b) / 10), strict=True))
        for a, b in product(range(11), repeat=2)
        if a + b <= 10
    ]
    first = [once(made, point, 0, journal) for point in points]
    order = sorted(range(len(points)), key=lambda k: first[k])[:SECOND]
    tried = {k: [first[k]] + [once(made, points[k], s, journal) for s in (1, 2, 3)] for k in order}
    best = min(tried, key=lambda k: statistics.fmean(tried[k][1:]))
    search = comparison.Search(weights=[], tokens=0.0)
    rows = []
    for word, seed in [*(("learned", s) for s in range(options.seeds)), ("mixmin", 0), SHARP]:
        found = comparison.one(made, search, word, seed, made.compare_tokens, journal)
        rows.append(judged(made, word, seed, found["weights"], points[best], journal, options))
    uniform = dict.fromkeys(made.names, 1 / 3)
    rows.append(judged(made, "uniform", None, uniform, points[best], journal, options))
    shown = ", ".join(f"{n} {w}" for n, w in points[best].items())
    notes = [
        *head("grid"),
        f"- one seed for every mixture: {min(first):.3f} to {max(first):.3f} nats; of the best "
        f"{SECOND} the best over three other seeds: {shown};",
        f"- noise of a training beyond what its seed does to all of them: {noise(tried):.3f} nats;",
        f"- regret: mean over {options.fresh} paired seeds that chose nothing of loss(weights) - "
        "loss(that best mixture), with its 95 % interval, and in percent of the latter's loss.",
    ]
    columns = ["method", "seed", "regret, nats", "low", "high", "regret, %", "loss", "best of grid"]
    columns += [f"w {n}" for n in made.names]
    table = [{"mixture": p, "loss": v} for p, v in zip(points, first, strict=True)]
    record.write("mixtures_grid", "Mixtures: grid", notes, rows, columns, script="mixtures")
    extra = json.loads((record.RESULTS / "mixtures_grid.json").read_text())
    (record.RESULTS / "mixtures_grid.json").write_text(
        json.dumps(extra | {"grid": table}, indent=1) + "\n"
    )


def trained(made: LLMReweight, mixture: dict[str, float], seed: int, journal: Journal) -> float:
    """The loss of a fresh model, from the journal if it is there."""
    return weighted(made, verdict.kept_losses(made, mixture, seed, journal))


def once(made: LLMReweight, mixture: dict[str, float], seed: int, journal: Journal) -> float:
    """A training, told when it is there."""
    loss = trained(made, mixture, seed, journal)
    print(f"grid: {list(mixture.values())}, seed {seed}: {loss:.3f}", flush=True)
    return loss


def noise(tried: dict[int, list[float]]) -> float:
    """The deviation of losses [mixtures, seeds] about the sum of the effects of both."""
    losses = torch.tensor(list(tried.values()), dtype=torch.float64)
    rest = losses - losses.mean(0) - losses.mean(1, keepdim=True) + losses.mean()
    freedom = (losses.shape[0] - 1) * (losses.shape[1] - 1)
    return float((rest.square().sum() / freedom).sqrt())


def judged(
    made: LLMReweight,
    word: str,
    seed: int | None,
    weights: dict[str, float],
    best: dict[str, float],
    journal: Journal,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Weights against the best of the grid, on seeds that did not choose it."""
    fresh = range(FRESH, FRESH + options.fresh)
    own, other = ([trained(made, m, s, journal) for s in fresh] for m in (weights, best))
    regret = verdict.differences(own, other)
    low, high = verdict.interval(regret)
    mean = statistics.fmean(regret)
    print(f"grid: {word} {seed}: regret {mean:+.4f}", flush=True)
    return {
        "method": word,
        "seed": seed,
        "regret, nats": mean,
        "low": low,
        "high": high,
        "regret, %": 100 * mean / statistics.fmean(other),
        "loss": statistics.fmean(own),
        "best of grid": statistics.fmean(other),
        **{f"w {n}": w for n, w in weights.items()},
    }


def head(part: str) -> list[str]:
    lines = [line for line in (__doc__ or "").splitlines() if line.startswith(part)]
    return [f"- {' '.join(lines[0].split())}"] if lines else []


def write(folder: Path, name: str, texts: Sequence[str]) -> str:
    path = folder / f"{name.replace(' ', '_').replace('_%', '')}.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--steps", type=int, default=200, help="learning steps, whose tokens count")
    parser.add_argument("--train", type=int, default=200, help="steps of each fresh model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", type=int, default=6, help="seeds on which regret is measured")
    parser.add_argument("--folder", type=Path, default=Path("runs/mixtures"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        if part == "grid":
            grid(options)
        else:
            names = list(sources(part))
            words = comparison.chosen(["all"], names)[0] if part == "compare" else MANY
            compared(part, words, options)


if __name__ == "__main__":
    main()
