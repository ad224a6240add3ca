"""A result held against its lower level, which is solved again at the final x."""

from __future__ import annotations

from dataclasses import replace

from bilevel.errors import InputError
from bilevel.problem import Problem
from bilevel.resolve import resolve
from bilevel.result import Result

AUDIT = 500
"""Most iterations of the solve that checks a result: less than a usual run spends."""


def audited(problem: Problem, result: Result) -> Result:
    """The result with its upper loss held against that of the lower level solved again.

    Adds `honest_upper`, f(x, y*(x)) as `resolve` finds it from the solver's y, to the evidence, and
    a warning where the solver's own upper loss differs from it by more than a tenth.
    """
    if not result.success:
        return result
    try:
        lower = resolve(problem, result.x, result.y, steps=AUDIT)
    except (InputError, ArithmeticError):
        return result
    honest, own = lower.upper, result.upper
    found = list(result.warnings)
    if lower.converged and abs(honest - own) > 0.1 * max(abs(honest), abs(own), 1e-12):
        found.append(
            f"the upper loss is {own:.3g} at the solver's own y, and {honest:.3g} where the lower "
            "level is solved: x may be wrong. Raise inner_steps or lower_lr, or try solver=auto."
        )
    elif not lower.converged:
        found.append(
            f"the lower level could not be solved at the final x (|grad_y g| is still "
            f"{lower.gradient:.2g}): has it a minimizer, and is it scaled?"
        )
    evidence = {**result.evidence, "honest_upper": honest}
    return replace(result, evidence=evidence, warnings=found)
