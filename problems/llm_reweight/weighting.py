"""How the upper variable becomes weights of sources: groups, a prior, bounds, at most k of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel import InputError
from bilevel.problems.llm_reweight import bounds
from bilevel.projection import kl_box

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

WAITING = 0.1
"""The least weight that a dropped entry is ranked with, as a part of an even share."""


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """The weights p_s = share_s W_g(s) of the sources, where W = P(softmax(x)) over the entries.

    An entry of x is a group of sources, or a source where there are no groups. P is the projection
    on the feasible weights {low <= W <= high, sum W = 1} in relative entropy, after all but the
    `keep` largest entries are dropped where `keep` is not 0.

    The gradient is that of softmax alone: an entry at its bound, or dropped, still feels what
    weight on it would cost, and moves inward as soon as that pays. `project` takes x back into the
    bounds after every step, where P changes nothing and the gradient is exact.
    """

    entries: tuple[str, ...]
    """Names of the entries of x."""
    members: tuple[tuple[int, ...], ...]
    """The sources of each entry."""
    entry: Tensor
    """[sources], the entry of each source."""
    share: Tensor
    """[sources], the share of each source in the weight of its entry, float64."""
    prior: Tensor
    """[entries], the weights at the start, and those that a pull is to."""
    low: Tensor
    """[entries], floors."""
    high: Tensor
    """[entries], ceilings."""
    keep: int = 0
    """Most entries with weight; 0 is no limit."""
    strength: float = 0.0
    """Of the pull to the prior, in nats of target loss for a nat of relative entropy."""
    grouped: bool = False

    @property
    def bounded(self) -> bool:
        """Whether some weights that softmax can give are forbidden."""
        return bool(self.keep or (self.low > 0).any() or (self.high < 1).any())

    def start(self) -> Tensor:
        """The x whose weights are the prior, or the feasible ones nearest to it."""
        return self.project(self.prior.log())

    def weights(self, x: Tensor) -> Tensor:
        """[sources], float64: feasible at every x, with the gradient of softmax."""
        weights = x.softmax(0)
        if self.bounded:
            weights = self.feasible(weights.detach()) + (weights - weights.detach())
        return weights[self.entry] * self.share if self.grouped else weights

    def project(self, x: Tensor) -> Tensor:
        """The logits of the weights within the bounds that are nearest to softmax(x).

        Where entries are dropped, x only ranks them, and none falls so far that it cannot return.
        """
        low = self.low
        if self.keep:
            slack = min(WAITING, 1 - float(low.sum())) / len(low)
            low = torch.maximum(low, self.high.clamp(max=max(slack, 0.0)))
        if not ((low > 0).any() or (self.high < 1).any()):
            return x
        return _positive(kl_box(_positive(x.softmax(0)), low, self.high)).log()

    def feasible(self, weights: Tensor) -> Tensor:
        """[entries], P of weights: within the bounds, and at most `keep` of them not 0."""
        kept = self._kept(weights)
        inside = kl_box(_positive(weights[kept]), self.low[kept], self.high[kept])
        return torch.zeros_like(weights).index_copy(0, kept, inside)

    def pull(self, x: Tensor) -> Tensor:
        """strength KL(softmax(x) || prior), a scalar."""
        log = x.log_softmax(0)
        return self.strength * (log.exp() * (log - self.prior.log())).sum()

    def settled(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Weights of sources, such as means over steps, as a feasible mixture."""
        if not self.keep:  # a mean of points within bounds is within them
            return dict(weights)
        values = torch.tensor(list(weights.values()), dtype=torch.float64)
        sums = torch.zeros_like(self.prior).index_add(0, self.entry, values)
        settled = self.feasible(sums)[self.entry] * self.share
        return dict(zip(weights, settled.tolist(), strict=True))

    def groups(self, x: Tensor) -> dict[str, float]:
        """The weight of each group, nothing where sources have weights of their own."""
        if not self.grouped:
            return {}
        weights = self.weights(x.detach())
        sums = torch.zeros_like(self.prior).index_add(0, self.entry, weights)
        return dict(zip(self.entries, sums.tolist(), strict=True))

    def _kept(self, weights: Tensor) -> Tensor:
        """The entries that may have weight: the largest, those with a floor before all others."""
        count = len(weights)
        ranked = (weights + (self.low > 0)).sort(descending=True, stable=True).indices.tolist()
        kept, rest = ranked[: self.keep or count], ranked[self.keep or count :]
        roomy = sorted(rest, key=lambda i: -float(self.high[i]))
        while float(self.high[kept].sum()) < 1 - bounds.ROUNDING:  # these cannot hold all of it
            out = [i for i in kept if not self.low[i] > 0 and self.high[i] < self.high[roomy[0]]]
            kept[kept.index(out[-1])] = roomy.pop(0)
        return torch.tensor(sorted(kept))


def weighting(problem: LLMReweight) -> Weighting:
    """What the options of a problem say of its sources.

    Raises:
        InputError: With everything that is wrong with the groups, the prior and the bounds.
    """
    faults: list[str] = []
    names = problem.names
    groups = _groups(problem, names, faults)
    if len(groups) < 2 and not faults:
        faults.append("problem.groups leaves one weight, for all sources; nothing can be learned.")
    if faults:
        raise InputError(faults)
    records = [len(source.examples) for source in problem.data.sources.values()]
    place = {name: i for i, name in enumerate(names)}
    members = tuple(tuple(place[name] for name in group) for group in groups.values())
    entries = tuple(groups)
    share = torch.ones(len(names), dtype=torch.float64)
    entry = torch.empty(len(names), dtype=torch.long)
    for i, group in enumerate(members):
        entry[list(group)] = i
        if len(group) > 1:
            sizes = [records[s] if problem.group_share == "size" else 1 for s in group]
            share[list(group)] = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    made = {"entries": entries, "members": members, "entry": entry, "share": share}
    sizes = torch.tensor(records, dtype=torch.float64)
    prior = bounds.prior(
        problem, entries, torch.zeros(len(entries)).double().index_add(0, entry, sizes), faults
    )
    low, high = bounds.floors_and_ceilings(problem, names, entries, entry, share, faults)
    if problem.max_epochs:
        ceilings = problem.max_epochs * sizes / (problem.train_examples or sizes.sum()) / share
        high = high.scatter_reduce(0, entry, ceilings, "amin")
    faults += bounds.infeasible(problem, entries, low, high)
    if faults:
        raise InputError(faults)
    own = {"prior": prior, "low": low, "high": high, "strength": problem.prior_strength}
    keep = problem.max_sources if problem.max_sources < len(entries) else 0
    return Weighting(**made, **own, keep=keep, grouped=bool(problem.groups))


def settled(problem: LLMReweight, weights: dict[str, float]) -> dict[str, float]:
    """Weights of sources, such as means over steps, as the mixture that the options allow."""
    return problem.weighting.settled(weights) if problem.max_sources else weights


def groups(problem: LLMReweight) -> dict[str, str]:
    """The group of each source that is in one."""
    if not problem.groups:
        return {}
    found = problem.weighting
    named = {word.partition("=")[0] for word in problem.groups}
    pairs = zip(found.entries, found.members, strict=True)
    return {problem.names[s]: name for name, members in pairs if name in named for s in members}


CONSTRAINTS = ("prior", "min_weight", "max_weight", "max_epochs", "max_sources", "prior_strength")
"""Options on weights of sources."""


def is_plain(problem: LLMReweight) -> bool:
    """Whether every source has a weight of its own, with nothing asked of it."""
    return problem.weigh != "examples" and not any(
        getattr(problem, name) for name in ("groups", *CONSTRAINTS)
    )


def without(problem: LLMReweight) -> LLMReweight:
    """The problem with plain weights of sources."""
    empty = {f.name: f.default for f in fields(problem) if f.name in ("groups", *CONSTRAINTS)}
    return replace(problem, weigh="sources", **empty)


def options_faults(problem: LLMReweight) -> list[str]:
    """What is wrong with the options whatever the data; `weighting` finds the rest."""
    faults = []
    if problem.groups and problem.weigh not in ("auto", "groups"):
        faults.append(f"problem.groups cannot be used with problem.weigh={problem.weigh}.")
    if problem.weigh == "groups" and not problem.groups:
        faults.append("problem.weigh=groups needs problem.groups, such as 'math=gsm8k,aqua'.")
    for name in ("prior_strength", "max_epochs", "train_examples", "max_sources"):
        if not 0 <= getattr(problem, name) < float("inf"):
            faults.append(f"problem.{name} must be at least 0, got {getattr(problem, name)}.")
    if problem.weigh == "examples":
        if problem.batch < 2:
            faults.append(
                "problem.batch must be at least 2 with problem.weigh=examples, where the weight of "
                f"a row is relative to the others of its batch, got {problem.batch}."
            )
        used = [name for name in CONSTRAINTS if getattr(problem, name)]
        faults += [
            f"problem.{name} is about weights of sources and cannot be used with "
            "problem.weigh=examples; leave it out."
            for name in used
        ]
    return faults


def _groups(problem: LLMReweight, names: Sequence[str], faults: list[str]) -> dict[str, list[str]]:
    """The sources of each entry, groups first; a source of no group is an entry of its own."""
    found: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for word in problem.groups:
        name, _, listed = word.partition("=")
        sources = [source.strip() for source in listed.split(",") if source.strip()]
        if not name.strip() or not sources:
            faults.append(f"problem.groups must be name=source,source, got {word!r}.")
            continue
        if name in found:
            faults.append(f"problem.groups has {name!r} twice; join the two.")
        if name in names:
            faults.append(f"problem.groups: {name!r} is the name of a source; choose another.")
        for source in sources:
            if source not in names:
                faults.append(f"problem.groups: no source {source!r}{bounds.hint(source, names)}.")
            elif source in owner:
                faults.append(
                    f"problem.groups has source {source!r} twice, in {owner[source]!r} and "
                    f"{name!r}; keep one."
                )
            owner[source] = name
        found[name] = sources
    return found | {name: [name] for name in names if name not in owner}


def _positive(weights: Tensor) -> Tensor:
    """Far below what a sum notices, far above where a quotient overflows."""
    return weights.clamp(min=1e-100)
