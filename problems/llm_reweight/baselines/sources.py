"""Single sources and leave-one-out: what each source does alone, and what is lost without it."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.problems.llm_reweight.baselines.lab import Lab
from bilevel.problems.llm_reweight.baselines.method import Found, Method, normalized


@dataclass(frozen=True, kw_only=True)
class Single(Method):
    """All weight on the source whose own model has the lowest target loss; one run for each.

    For few sources the note is the ground truth of what each is worth by itself.
    """

    def search(self, lab: Lab) -> Found:
        spend = lab.budget / len(lab.names)
        losses = {n: lab.trial({m: float(m == n) for m in lab.names}, spend) for n in lab.names}
        best = min(losses, key=lambda name: losses[name])
        weights = {name: float(name == best) for name in lab.names}
        return Found(weights=weights, note=f"target loss alone: {shown(losses)}")


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Method):
    """w_s ~ max(L_-s - L, 0), L the target loss of a short run on all, L_-s on all but s.

    A source whose absence does not hurt gets no weight, nor do two that stand in for each other.
    """

    def search(self, lab: Lab) -> Found:
        spend = lab.budget / (len(lab.names) + 1)
        whole = lab.trial(lab.uniform, spend)
        share = 1 / (len(lab.names) - 1)
        harm = {
            n: lab.trial({m: 0.0 if m == n else share for m in lab.names}, spend) - whole
            for n in lab.names
        }
        weights = normalized(lab.names, [max(harm[n], 0.0) for n in lab.names])
        return Found(weights=weights, note=f"target loss rises without: {shown(harm)}")


def shown(values: dict[str, float]) -> str:
    """Numbers by name in one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
