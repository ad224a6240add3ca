"""The verdict: fresh models trained with several mixtures on paired seeds, compared on the test."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bilevel.problems.llm_reweight import by_target
from bilevel.problems.llm_reweight.by_target import Losses, weighted
from bilevel.problems.llm_reweight.journal import Journal
from bilevel.problems.llm_reweight.paired import differences, interval, spanned
from bilevel.problems.llm_reweight.problem import LLMReweight
from bilevel.problems.llm_reweight.training import fit

RIVALS = {"uniform": "uniform", "size": "size-proportional"}
"""What the learned mixture is held against, and its name in a sentence."""

Mixtures = dict[str, dict[str, float]]
"""By name, the share of each source."""


def mixtures(problem: LLMReweight, weights: dict[str, float]) -> Mixtures:
    """What the verdict compares: learned, uniform, size-proportional and the right source alone.

    The share of a source by size is that of its rows; the right source is known in the
    demonstration only.
    """
    total = sum(map(len, problem.rows))
    found = {
        "learned": weights,
        "uniform": dict.fromkeys(weights, 1 / len(weights)),
        "size": {rows.name: len(rows) / total for rows in problem.rows},
    }
    if problem.data.relevant:
        found["oracle"] = {n: float(n == problem.data.relevant[0]) for n in weights}
    return found


def compare(
    problem: LLMReweight,
    mixtures: Mixtures,
    like: Any = None,
    *,
    journal: Journal | None = None,
    where: str = "",
) -> dict[str, Any]:
    """Train fresh models with every mixture; "learned" and "uniform" must be among them.

    Where `like` is an adapter, of fresh models an adapter of that kind trains; else everything.
    What is in the `journal` is not trained again; `where` tells other models than the run's own.
    Seeds are paired: the same start, the same order within each source. Returns the test losses
    (mean over examples, nats per token), the paired differences and the sentences to print.
    """
    journal = journal or Journal()
    seeds, options = range(problem.verdict_seeds), {"like": like, "where": where}
    before = by_target.untrained(problem, journal, **options)
    losses = {
        name: [kept_losses(problem, m, s, journal, **options) for s in seeds]
        for name, m in mixtures.items()
    }
    same = [r for r in RIVALS if r != "uniform" and mixtures.get(r) == mixtures["uniform"]]
    return judged(problem, losses, before=before, unsaid=same)


def judged(
    problem: LLMReweight,
    each: dict[str, list[Losses]],
    *,
    before: Sequence[Losses] = (),
    unsaid: Sequence[str] = (),
) -> dict[str, Any]:
    """The verdict on the test losses of each mixture, seed and target.

    Args:
        problem: Whose targets these are.
        each: By mixture, an entry for each seed.
        before: Of untrained models, if they are known.
        unsaid: Rivals about which there is no sentence.
    """
    losses = {name: [weighted(problem, one) for one in seeds] for name, seeds in each.items()}
    targets = by_target.judged(problem, each, before)
    gains = {
        rival: differences(losses[rival], losses["learned"]) for rival in RIVALS if rival in losses
    }
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    gap = means["uniform"] - means.get("oracle", means["uniform"])
    return {
        "steps": problem.verdict_steps,
        "losses": losses,
        **{f"gain_over_{rival}": values for rival, values in gains.items()},
        "gap_closed": statistics.fmean(gains["uniform"]) / gap if gap > 0 else None,
        "sentences": _sentences(means, {r: g for r, g in gains.items() if r not in unsaid}, gap)
        + by_target.sentences(targets),
        **({"targets": targets} if targets else {}),
    }


def transferred(
    problem: LLMReweight, mixtures: Mixtures, like: Any = None, *, journal: Journal | None = None
) -> dict[str, Any]:
    """What `compare` returns where the fresh models are those of `problem.transfer`."""
    name = problem.transfer
    other = another(problem, name)
    kept = ["data"] + (["tokenizer", "tokenized"] if problem.model == other.model else [])
    vars(other).update({key: getattr(problem, key) for key in kept})  # as cached_property would
    judged = compare(other, mixtures, like, journal=journal, where=name)
    judged["sentences"] = [f"on {name}: {line}" for line in judged["sentences"]]
    return judged | {"model": name}


def another(problem: LLMReweight, name: str) -> LLMReweight:
    """The same problem with another model.

    Args:
        problem: Whose other options are kept.
        name: LAYERSxWIDTH of the tiny model, a folder or a hub name.
    """
    layers, _, width = name.partition("x")
    shape = layers.isdecimal() and width.isdecimal()
    changes = {"model": "tiny", "layers": int(layers), "width": int(width)} if shape else {}
    return replace(problem, **(changes or {"model": name}), transfer="")


def kept_losses(
    problem: LLMReweight,
    mixture: dict[str, float],
    seed: int,
    journal: Journal,
    *,
    like: Any = None,
    where: str = "",
) -> Losses:
    """What `train_each` returns, from the journal if it is there, which holds a number for one.

    Args:
        problem: As for `train`, like all but the last two.
        mixture: The share of each source.
        seed: Of start and rows.
        journal: Of one run: what is fixed within that is not part of the key.
        like: An adapter, if one is to be trained.
        where: What else tells this training from others in the journal.
    """
    key = {"training": mixture, "seed": seed, "where": where}
    key |= {"steps": problem.verdict_steps, "lr": problem.verdict_lr}
    if len(problem.target_weights) > 1:
        return journal.keep(key, lambda: train_each(problem, mixture, seed=seed, like=like))
    (name,) = problem.target_weights
    return {name: journal.keep(key, lambda: train(problem, mixture, seed=seed, like=like))}


def train(problem: LLMReweight, mixture: dict[str, float], *, seed: int, like: Any = None) -> float:
    """The test loss of a fresh model trained on rows drawn by `mixture`, nats per token."""
    return weighted(problem, train_each(problem, mixture, seed=seed, like=like))


def train_each(
    problem: LLMReweight, mixture: dict[str, float], *, seed: int, like: Any = None
) -> Losses:
    """The test losses of a fresh model trained on rows drawn by `mixture`, nats per token."""
    model = fit(problem, mixture, steps=problem.verdict_steps, seed=seed, like=like)
    return by_target.evaluated(problem, model)


def _sentences(means: dict[str, float], gains: dict[str, list[float]], gap: float) -> list[str]:
    table = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    count = len(gains["uniform"])
    lines = [f"test loss of fresh models, mean over {count} paired seeds: {table}"]
    for rival, values in gains.items():
        low, high = interval(values)
        name, span = RIVALS[rival], spanned(values)
        if low > 0:
            won = sum(g > 0 for g in values)
            lines.append(
                f"the learned mixture beats {name} in {won} of {len(values)} seeds ({span})"
            )
        elif high < 0:
            lines.append(f"the learned mixture is worse than {name} ({span})")
        else:
            lines.append(f"no evidence against {name} ({span})")
    if gap > 0:
        share = f"{statistics.fmean(gains['uniform']) / gap:.0%}"
        lines.append(f"{share} of the gap from uniform to the one right source is closed")
    return lines
