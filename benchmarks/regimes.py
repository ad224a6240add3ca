"""Where is a bilevel search of data weights ahead of influence and of MixMin, at equal compute?

Run: python benchmarks/regimes.py   (writes benchmarks/results/regimes.json and .md; goes on
where it was interrupted, from a cache of all searches and trainings)

Every search may use as many tokens forward and backward as 600 steps of the bilevel one; `cost` is
the share that it took. A mixture is judged by the test loss of a fresh model trained on it, with
the same start and row orders for all mixtures of a seed; a seed also draws the data. "ahead by" is
the paired difference of a row's loss to that of a bilevel search, positive where the search is
better, with the 95 % interval of Student's t and the seeds that it won. The searches: the recipe,
600 steps with lower_lr 3e-3; the default, 300 steps, at half the cost; the default with the mean of
the whole path of weights for that of its last quarter. Worlds and recipes were chosen on seed 0,
which is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import record
import regimes_data
import torch
from scipy import stats

import bilevel
from bilevel import plugins
from bilevel.linear import norm
from bilevel.problems.llm_reweight import LLMReweight, verdict
from bilevel.problems.llm_reweight.baselines.fed_back import FedBack
from bilevel.problems.llm_reweight.baselines.influence import Influence
from bilevel.problems.llm_reweight.baselines.lab import Lab, search_tokens
from bilevel.problems.llm_reweight.baselines.method import Method, normalized
from bilevel.problems.llm_reweight.baselines.mixmin import MixMin
from bilevel.problems.llm_reweight.spread import averaged_weights
from bilevel.tree import dot

Weights = dict[str, float]
STEPS = 600  # of the bilevel search that sets the budget
GRADIENT = 64  # rows of a source for its mean gradient, twice as many of the target
MARKS = (1 / 8, 1 / 4, 1 / 2, 1)  # of a warm-up, where influence is taken
THOROUGH = 2  # up to this seed all settings of influence run, later the better ones
GENEROUS = 1  # up to this seed MixMin is also run with all it wants, several times the budget
RECIPE = "bilevel, 600 steps, lower_lr 3e-3"
DEFAULT = "bilevel, 300 steps, default"
PATH = f"{DEFAULT}, mean of the whole path"
BASES = {"recipe": RECIPE, "path mean": PATH, "default": DEFAULT}

REGIMES: dict[str, tuple[Callable[[int], regimes_data.World], dict[str, Any]]] = {
    "ways": (
        regimes_data.ways,
        {"max_length": 8, "batch": 56, "target_batch": 28, "verdict_steps": 300},
    ),
    "styles": (regimes_data.styles, {"max_length": 8, "batch": 56, "target_batch": 24}),
    "skills": (regimes_data.skills, {"max_length": 16, "batch": 20}),
    "crowd": (regimes_data.crowd, {"max_length": 32, "batch": 22}),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One seed of one regime: its data as files, its searches and its trainings, cached."""

    regime: str
    seed: int
    folder: Path

    def world(self) -> regimes_data.World:
        return REGIMES[self.regime][0](self.seed)

    def problem(self) -> LLMReweight:
        return _problem(self.regime, self.seed, self.folder)

    def cached(self, key: str, make: Callable[[], Any]) -> Any:
        path, name = self.folder / "cache.jsonl", f"{self.regime}/{self.seed}/{key}"
        store = _store(path)
        if name not in store:
            start = time.process_time()
            store[name] = make()
            line = {"key": name, "seconds": time.process_time() - start, "value": store[name]}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return store[name]

    def loss(self, weights: Weights) -> float:
        """Of a fresh model trained on a mixture."""
        rounded = {n: round(w, 4) for n, w in weights.items()}
        total = sum(rounded.values())
        mixture = {n: w / total for n, w in rounded.items()}
        key = "test " + json.dumps(rounded)
        return self.cached(key, lambda: verdict.train(self.problem(), mixture, seed=self.seed))

    def searched(
        self, key: str, search: Callable[[Lab], Any], *, budget: float | None = None, **options: Any
    ) -> Any:
        """What a search returns, and the tokens that it used as a share of the budget."""

        def make() -> Any:
            problem = self.problem()
            if options:
                problem = replace(problem, **options)
            full = self.budget()
            lab = Lab(problem=problem, budget=budget or full, seed=self.seed)
            found = search(lab)
            return {"found": found, "cost": lab.tokens / full}

        return self.cached(key, make)

    def budget(self) -> float:
        """Tokens of the bilevel search that sets the budget."""
        return STEPS * search_tokens(self.problem(), {"upper_grad": 1, "lower_grad": 2})


def bilevel_weights(bench: Bench, steps: int, **options: Any) -> Any:
    """Weights over the last quarter and over the whole path of a bilevel search."""

    def make() -> Any:
        solver = plugins.find("solver", "scalebio_votes")(**options)
        result = bilevel.solve(bench.problem(), solver, steps=steps, seed=bench.seed)
        path = [row["weights"] for row in result.history]
        return {
            "last quarter": averaged_weights(result.history),
            "whole path": averaged_weights(result.history, tail=1.0),
            "path": [list(w.values()) for w in path[:: max(1, len(path) // 20)]],
            "cost": search_tokens(bench.problem(), result.counts) / bench.budget(),
        }

    return bench.cached(f"bilevel {steps} {json.dumps(options)}", make)


def gradient_cosines(lab: Lab, model: torch.nn.Module) -> list[float]:
    """cos(grad l_s, grad l_target) for each source."""
    target = lab.target_gradient(model, 2 * GRADIENT)
    sources = [lab.gradient(model, rows, GRADIENT) for rows in lab.problem.rows]
    return [float(dot(g, target)) / max(norm(g) * norm(target), 1e-300) for g in sources]


def checkpoints(lab: Lab) -> list[list[float]]:
    """Cosines at MARKS of one training on the uniform mixture that uses the rest of the budget."""
    lengths = sum(lab.lengths) + 2 * sum(lab.lengths) / len(lab.lengths)
    steps = lab.steps(lab.budget - len(MARKS) * GRADIENT * lengths)
    marks = {max(1, round(m * steps)) for m in MARKS}
    path = lab.path(lab.uniform, steps=steps)
    return [gradient_cosines(lab, step.model) for step in path if step.number in marks]


def mixtures(bench: Bench) -> Iterator[tuple[str, Weights, float | None]]:
    """Every mixture to judge: its name, weights, and what finding it cost, none for given ones."""
    names = bench.problem().names
    yield "uniform", dict.fromkeys(names, 1 / len(names)), None
    for name, weights in bench.world().by_hand.items():
        values = [weights.get(n.replace("_", " "), 0.0) for n in names]
        yield f"by hand: {name}", normalized(names, values), None
    yield from bilevels(bench)
    yield "influence, preset", *library(bench, "preset", Influence())
    if bench.seed <= THOROUGH:
        sharp = Influence(sharpness=3.0)
        yield "influence, preset, sharpness 3", *library(bench, "preset, sharpness 3", sharp)
    yield from influences(bench)
    yield "MixMin", *library(bench, "mixmin", MixMin())
    if bench.seed > GENEROUS:
        return
    problem = bench.problem()
    row = statistics.fmean(Lab(problem=problem, budget=0).lengths)
    plenty = 1.2 * len(names) * problem.verdict_steps * problem.batch * row
    yield "MixMin, every model fully trained", *library(bench, "mixmin full", MixMin(), plenty)


def bilevels(bench: Bench) -> Iterator[tuple[str, Weights, float]]:
    default = bilevel_weights(bench, 300)
    yield DEFAULT, default["last quarter"], default["cost"]
    yield PATH, default["whole path"], default["cost"]
    recipe = bilevel_weights(bench, STEPS, lower_lr=3e-3)
    yield RECIPE, recipe["last quarter"], recipe["cost"]


def influences(bench: Bench) -> Iterator[tuple[str, Weights, float]]:
    names = bench.problem().names
    found = bench.searched("influence", checkpoints, verdict_lr=1e-3)
    scores = found["found"]
    mean = [statistics.fmean(column) for column in zip(*scores, strict=True)]
    places = [("four places", mean, 1)]
    if bench.seed <= THOROUGH:
        places += [("a quarter", scores[1], 1), ("the end", scores[-1], 1)]
        places += [("four places", mean, 4)]
    for when, values, power in places:
        weights = normalized(names, [max(v, 0.0) ** power for v in values])
        yield f"influence, lr 1e-3, at {when}, power {power}", weights, found["cost"]
    for tau in (0.15, 0.5):
        weights = normalized(names, [math.exp(v / tau) for v in scores[-1]])
        yield f"influence, lr 1e-3, at the end, softmax {tau}", weights, found["cost"]
    yield "influence, fed back, preset", *library(bench, "fed back", FedBack())
    found = library(bench, "fed back, lr 1e-3", FedBack(), verdict_lr=1e-3)
    yield "influence, fed back, lr 1e-3", *found


def library(
    bench: Bench, name: str, method: Method, budget: float | None = None, **options: Any
) -> tuple[Weights, float]:
    search: Callable[[Lab], Weights] = lambda lab: method.search(lab).weights  # noqa: E731
    found = bench.searched(name, search, budget=budget, **options)
    return found["found"], found["cost"]


def judge(bench: Bench) -> list[dict[str, Any]]:
    """The test loss of every mixture of one seed."""
    rows = []
    for name, weights, cost in mixtures(bench):
        row = {"regime": bench.regime, "seed": bench.seed, "method": name, "cost": cost}
        row |= {"weights": weights, "loss": bench.loss(weights)}
        rows.append(row)
        top = sorted(weights.items(), key=lambda item: -item[1])[:6]
        words = " ".join(f"{n} {w:.2f}" for n, w in top)
        print(f"{bench.regime} {bench.seed} {name:50s} {row['loss']:.4f} {words}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, and paired differences to the searches of BASES with intervals."""
    lines = []
    for regime in dict.fromkeys(row["regime"] for row in rows):
        own = [row for row in rows if row["regime"] == regime]
        by_name: dict[str, dict[int, dict[str, Any]]] = {}
        for row in own:
            by_name.setdefault(row["method"], {})[row["seed"]] = row
        for name, found in by_name.items():
            costs = [r["cost"] for r in found.values() if r["cost"] is not None]
            line = {"regime": regime, "method": name, "seeds": len(found)}
            line["cost"] = statistics.fmean(costs) if costs else None
            line["test loss"] = round(statistics.fmean(r["loss"] for r in found.values()), 4)
            for label, base in BASES.items():
                line[f"{label} ahead by"] = difference(found, by_name[base])
            lines.append(line)
    return lines


def difference(found: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> str | None:
    """The mean paired difference of the losses with its 95 % interval, in words."""
    gaps = [row["loss"] - base[seed]["loss"] for seed, row in found.items()]
    mean = statistics.fmean(gaps)
    if len(gaps) < 2 or not any(gaps):
        return None
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5
    won = sum(g > 0 for g in gaps)
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}), {won} of {len(gaps)}"


@cache
def _problem(regime: str, seed: int, folder: Path) -> LLMReweight:
    make, options = REGIMES[regime]
    world, place = make(seed), folder / f"{regime}-{seed}"
    place.mkdir(parents=True, exist_ok=True)

    def write(name: str, records: list[regimes_data.Record]) -> str:
        path = place / f"{name}.jsonl"
        fields = [
            {"text": r} if isinstance(r, str) else {"prompt": r[0], "completion": r[1]}
            for r in records
        ]
        path.write_text("".join(json.dumps(f) + "\n" for f in fields))
        return str(path)

    named = {name.replace(" ", "_"): texts for name, texts in world.sources.items()}
    problem = LLMReweight(
        sources=tuple(f"{n}={write(n, list(t))}" for n, t in named.items()),
        target=write("target", list(world.target)),
        test=write("test", list(world.test)),
        allow_overlap=True,  # so few words make equal records by chance
        **options,
    )
    problem.prepare()
    return problem


@cache
def _store(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["key"]: row["value"] for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regimes", nargs="+", default=[*REGIMES], choices=[*REGIMES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--cache", type=Path, default=Path("runs/regimes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for regime in options.regimes:
        for seed in options.seeds:
            rows += judge(Bench(regime=regime, seed=seed, folder=options.cache))
    notes = [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    for regime in options.regimes:
        notes.append(f"- {regime}: {(REGIMES[regime][0].__doc__ or '').splitlines()[0]}")
    columns = ["regime", "method", "cost", "test loss", *(f"{label} ahead by" for label in BASES)]
    lines = table(rows)
    print(
        record.save("regimes", "Where a bilevel search is ahead", notes, lines, ["seeds", *columns])
    )
    path = record.RESULTS / "regimes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainings": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
