"""Published members of the penalty family, as the template with other options."""

from __future__ import annotations

from typing import Any

from bilevel.solvers.penalty.template import Penalty


def f2sa(**options: Any) -> Penalty:
    """F2SA: forward difference, one inner step, growing penalty (Kwon et al., 2301.10945)."""
    defaults = {"stencil": 1, "inner_steps": 1, "growth": 1.005, "settle": 0.0, "warmup": 0}
    return Penalty(**defaults | options)


def f2ba(**options: Any) -> Penalty:
    """F2BA: forward difference, ten warm inner steps, fixed penalty (Chen et al., 2306.14853)."""
    return Penalty(**{"stencil": 1, "growth": 1.0, "warmup": 0, "penalty": 100.0} | options)


def accf2ba(**options: Any) -> Penalty:
    """AccF2BA: F2BA with Nesterov's momentum for x and restarts (Chen et al., 2306.14853).

    Deviations: those of `f2ba` but for the optimizer of x; the last x is the answer, where the
    paper returns the mean of the extrapolated points since a restart.
    """
    defaults = {"momentum": 0.9, "upper_optimizer": "sgd"}
    return f2ba(**defaults | options)


def f2sa2(**options: Any) -> Penalty:
    """F2SA-2: central difference, ten inner steps, fixed penalty (Chen et al., 2509.02937).

    The paper's step of x is upper_optimizer=sgd upper_step=normalized. Deviation: x moves by Adam
    unless told so, and the copies go on from where they were, not from their mean.
    """
    return Penalty(**{"stencil": 2, "growth": 1.0, "penalty": 100.0} | options)


def proximal(**options: Any) -> Penalty:
    """The double loop with proximal centers, for lower levels that are not strongly convex.

    Forward difference (the central one would need g - nu f to have a minimum), ten inner steps
    around centers that follow the copies; X and Y may be constrained (Kwon et al., 2309.01753).
    """
    defaults = {"stencil": 1, "prox": 1.0, "penalty": 100.0, "growth": 1.0}
    return Penalty(**defaults | options)


def scalebio(**options: Any) -> Penalty:
    """ScaleBiO: forward difference, one AdamW step on both copies (Pan et al., ACL 2025).

    Deviations: g + nu f instead of its multiple by the penalty (equal for Adam up to eps), one
    LISA draw for both copies, the x step held during a warm-up.
    """
    defaults: dict[str, Any] = {
        "stencil": 1,
        "inner_steps": 1,
        "growth": 1.0,
        "warmup": 20,
        "lower_optimizer": "adamw",
        "lower_lr": 1e-3,
        "upper_lr": 1e-2,
    }
    return Penalty(**defaults | options)


def scalebio_votes(**options: Any) -> Penalty:
    """ScaleBiO with pairwise votes for the logits of the weights: decisive, yet still on noise.

    Deviations: those of `scalebio`, and `bilevel.PairwiseVotes` in place of Adam for x.
    """
    return scalebio(**{"upper_optimizer": "votes", "upper_lr": 0.03} | options)
