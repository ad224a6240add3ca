"""What a run's own numbers say about whether its answer can be believed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

RESIDUAL = 0.1  # relative; the error of a hypergradient is about as large
SHARE = 0.1  # of the largest upper loss seen

NUMBERS = {
    "honest_upper": "f(x, y*(x)), the lower level solved again at the final x",
    "change": "largest change of an entry of x in the last step",
    "lower_gradient": "|grad_y g| where the hypergradient was taken",
    "lower_error": "|<v, grad_y g>|, the first-order estimate of f(x, y) - f(x, y*(x))",
    "linear_residual": "|H v - grad_y f| / |grad_y f|",
    "curvature": "1 if the linear solver met a direction of non-positive curvature, else 0",
    "penalty": "the penalty, 1/nu",
    "penalty_gap": "penalty (g(x, y) - g(x, z)): O(nu) for the forward stencil, else O(nu^2); "
    "negative for the forward one only while z is not the minimizer of g",
    "stencil": "the order of the finite difference now in use",
    "lag": "|H v + grad_y f| / |grad_y f| for the v that the copies of y stand for",
    "doubts": "steps in a row at which g - nu f looked as if it had no minimum",
    "bound": "certified bound on |estimate - dF|",
    "accuracy": "certified bound on |y - y*(x)| where the hypergradient was taken",
    "value_bound": "certified bound on |f(x, y) - F(x)| there",
    "gradient": "norm of the hypergradient, or of the projected step over its size",
    "lr": "the step size of x that was taken",
    "trials": "step sizes tried for it",
    "goal": "what |grad_y g| and |H v - grad_y f| had to be brought below",
    "tightening": "factor on the goals, halved where the upper loss rose",
    "smoothness": "the curvature of F that the step of x assumes, one over its size",
    "least_smoothness": "what that may not fall below",
    "moved": "|x - x_before| of the last step",
    "inner_steps": "the steps of y that were needed",
    "q": "g(x, y) - g(x, z), the lower gap",
    "multiplier": "the weight of the gradient of q in the step",
}
"""What a solver may put into `State.numbers`, and what each means."""


def warnings(history: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on what is too large for the answer to mean much, each with its remedy.

    Args:
        history: The records of a run, which hold the solver's numbers.

    >>> warnings([{"step": i, "upper": 1.0, "change": 0.0} for i in (1, 2)])[0][:14]
    'x never moved:'
    """
    if not history:
        return []
    last = history[-1]
    scale = max(abs(row.get("upper", 0.0)) for row in history)
    return [*_unmoved(history), *_implicit(last), *_lower(last, scale)]


def _unmoved(history: Sequence[dict[str, Any]]) -> Iterator[str]:
    changes = [row["change"] for row in history if "change" in row]
    if not changes:
        yield (
            "no step has moved x: all were within the solver's warm-up. Allow more steps, or lower "
            "warmup."
        )
    elif len(changes) > 1 and not any(changes):
        yield (
            "x never moved: its gradient was zero at every step, or within what the solver takes "
            "for noise, or bounds hold x. Check that a loss depends on x, allow more steps, raise "
            "upper_lr, or choose a method that sees x through the lower level."
        )


def _implicit(last: dict[str, Any]) -> Iterator[str]:
    """On v ~ H^-1 grad_y f."""
    if last.get("linear_residual", 0.0) > RESIDUAL:
        yield (
            f"the linear system was solved only to a relative residual of "
            f"{last['linear_residual']:.2g}; raise linear_steps (inner_steps of "
            "itd, linear_lr of single-loop methods), or add damping."
        )
    if last.get("curvature"):
        yield (
            "the lower loss is not strongly convex at y, so v = H^-1 grad_y f is not unique; add "
            "damping, or use a penalty solver."
        )


def _lower(last: dict[str, Any], scale: float) -> Iterator[str]:
    """On y and its twins; `scale` is the largest upper loss seen."""
    error = last.get("lower_error", 0.0)
    if error > SHARE * scale:
        yield (
            f"the lower level is not solved: the upper loss is off by about {error:.2g}; raise "
            "inner_steps or lower_lr."
        )
    gap = last.get("penalty_gap", 0.0)
    if last.get("stencil", 1) > 1:  # there either sign is bias
        gap = abs(gap)
    if gap > SHARE * scale:
        yield (
            f"the penalized value is off by about {gap:.2g}; raise the penalty, its growth or "
            "inner_steps."
        )
    if gap < -scale:
        yield (
            f"the lower level is not solved: y, which also follows the upper loss, has the smaller "
            f"lower loss (penalty_gap {gap:.2g}); raise inner_steps or lower_lr."
        )
