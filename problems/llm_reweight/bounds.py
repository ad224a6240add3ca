"""A prior and bounds of weights as options give them, or everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

ROUNDING = 1e-9
"""By how much sums of bounds that a user wrote as decimals may miss 1."""


def prior(
    problem: LLMReweight,
    entries: Sequence[str],
    sizes: Tensor,
    faults: list[str],
) -> Tensor:
    """[entries], the prior weights, which add up to 1; `sizes` are the records of each entry."""
    count = len(entries)
    if not problem.prior:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    if problem.prior == ("size",):
        return sizes / sizes.sum()
    given, everywhere = numbers("prior", problem.prior, entries, faults)
    if everywhere is not None:
        faults.append("problem.prior must be 'size', or name=weight for each, got a bare number.")
    missing = [name for name in entries if name not in given]
    if missing and given:
        faults.append(f"problem.prior lacks {', '.join(missing)}; give each a weight.")
    low = [f"{name}={value:g}" for name, value in given.items() if not value > 0]
    if low:
        faults.append(
            f"problem.prior must be positive, got {', '.join(low)}; a small weight may grow, none "
            "cannot."
        )
    values = torch.tensor([given.get(name, 1.0) for name in entries], dtype=torch.float64)
    return values / values.sum()


def floors_and_ceilings(
    problem: LLMReweight,
    names: Sequence[str],
    entries: Sequence[str],
    entry: Tensor,
    share: Tensor,
    faults: list[str],
) -> tuple[Tensor, Tensor]:
    """[entries] twice, floors and ceilings; those of a source in a group become the group's."""
    known = [*entries, *(name for name in names if name not in entries)]
    low = torch.zeros(len(entries), dtype=torch.float64)
    high = torch.ones(len(entries), dtype=torch.float64)
    for option, least in (("min_weight", True), ("max_weight", False)):
        given, everywhere = numbers(option, getattr(problem, option), known, faults)
        wrong = [f"{n}={v:g}" for n, v in given.items() if not 0 <= v <= 1]
        if everywhere is not None and not 0 <= everywhere <= 1:
            wrong.append(f"{everywhere:g}")
        zero = 0.0 in given.values() or everywhere == 0
        if wrong:
            faults.append(f"problem.{option} must be from 0 to 1, got {', '.join(wrong)}.")
        elif zero and not least:
            faults.append("problem.max_weight must be positive; leave the source out instead.")
        else:
            bound = low if least else high
            if everywhere is not None:
                bound.fill_(everywhere)
            named = torch.zeros(len(entries), dtype=torch.bool)
            for name, value in given.items():
                s = names.index(name) if name in names else None
                i = int(entry[s]) if s is not None else list(entries).index(name)
                value = value / float(share[s]) if s is not None else value
                tighter = max if least else min
                bound[i] = tighter(float(bound[i]), value) if named[i] else value
                named[i] = True
    return low, high


def infeasible(
    problem: LLMReweight, entries: Sequence[str], low: Tensor, high: Tensor
) -> list[str]:
    """Why no weights are within the bounds, as sentences."""
    what = f"{len(entries)} {'groups' if problem.groups else 'sources'}"
    keep = min(max(0, problem.max_sources) or len(entries), len(entries))
    faults = [
        f"the floor of {name} is {a:.4g}, above its ceiling {b:.4g}; see problem.min_weight, "
        "max_weight and max_epochs."
        for name, a, b in zip(entries, low.tolist(), high.tolist(), strict=True)
        if a > b + ROUNDING
    ]
    if float(low.sum()) > 1 + ROUNDING:
        faults.append(
            f"problem.min_weight adds up to {float(low.sum()):.4g} over {what}, expected at most "
            "1; lower it."
        )
    floors = int((low > 0).sum())
    if floors > keep:
        faults.append(
            f"problem.min_weight gives {floors} of {what} weight, but problem.max_sources={keep}; "
            "raise the one or give fewer floors."
        )
    else:
        must = torch.where(low > 0, 2.0, 0.0)  # those with a floor are kept first
        kept = (high + must).sort(descending=True).indices[:keep]
        room = float(high[kept].sum())
        if room < 1 - ROUNDING:
            which = f"the largest {keep} of {what}" if keep < len(entries) else what
            faults.append(
                f"the ceilings of problem.max_weight and problem.max_epochs add up to {room:.4g} "
                f"over {which}, expected at least 1; raise them."
            )
    return faults


def numbers(
    option: str, words: Sequence[str], known: Sequence[str], faults: list[str]
) -> tuple[dict[str, float], float | None]:
    """The name=number words of an option, and its bare number; what is wrong is added to faults."""
    given: dict[str, float] = {}
    everywhere: float | None = None
    for word in words:
        name, equals, text = word.rpartition("=")
        name = name.strip()
        try:
            value = float(text)
        except ValueError:
            faults.append(f"problem.{option} must be name=number or a number, got {word!r}.")
            continue
        if (not equals and everywhere is not None) or name in given:
            faults.append(f"problem.{option} is given twice for {name or 'all'}; keep one.")
        elif not equals:
            everywhere = value
        elif name not in known:
            faults.append(f"problem.{option}: nothing is called {name!r}{hint(name, known)}.")
        else:
            given[name] = value
    return given, everywhere


def hint(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(known[:12])}"
