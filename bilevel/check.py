"""Everything that speaks against a problem, solver and memory together, found before a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InputError
from bilevel.launch import Launcher, Single
from bilevel.linear import norm
from bilevel.memory import Full, Memory
from bilevel.oracle import Oracle
from bilevel.plugins import find
from bilevel.problem import Level, Problem, constrained
from bilevel.solver import Solver
from bilevel.tree import Value, leaves, structure_faults


def check(
    problem: Problem,
    solver: Solver | str = "penalty",
    *,
    memory: Memory | None = None,
    launcher: Launcher | None = None,
) -> list[str]:
    """Every incompatibility, as sentences; an empty list if there is none.

    Runs the problem's and the solver's own checks, then both losses once or twice at the start:
    are they finite, differentiable scalars, pure, of x and y, are the projections projections, and
    does the lower loss have second derivatives where the solver takes them.

    Args:
        problem: The two losses.
        solver: A solver or its name.
        memory: What is trainable; everything by default.
        launcher: Where it is to run; this process by default.

    >>> from bilevel.problems.quadratic import Quadratic
    >>> check(Quadratic(), "aid")
    []
    """
    made = find("solver", solver)() if isinstance(solver, str) else solver
    assert isinstance(made, Solver)
    faults = options(problem, made, memory or Full(), launcher or Single())
    faults = faults or probe(problem, made.order)
    if not faults:
        try:
            made.init(problem, memory or Full(), Single(), torch.Generator().manual_seed(0))
        except InputError as error:
            faults = list(error.faults)
    return faults


def options(problem: Problem, solver: Solver, memory: Memory, launcher: Launcher) -> list[str]:
    """What the four say of each other without computing anything."""
    return [*problem.check(), *solver.check(problem), *fit(problem, solver, memory, launcher)]


def fit(problem: Problem, solver: Solver, memory: Memory, launcher: Launcher) -> list[str]:
    """What solver, memory and launcher cannot do with each other."""
    bound = constrained(problem, "lower")
    own = fields(solver) if is_dataclass(solver) else ()
    options = {field.name: getattr(solver, field.name) for field in own}
    faults = launcher.check(
        problem,
        memory,
        order=solver.order,
        parallel=solver.parallel,
        direct=solver.direct(),
        constrained=bound,
        options=options,
    )
    faults += memory.check(constrained=bound, direct=solver.direct(), options=options)
    if solver.order > 1 and not isinstance(memory, Full):
        faults.append(
            f"{type(solver).__name__} takes second derivatives of all of y; use memory=full, or a "
            "first-order solver such as penalty."
        )
    return faults


def probe(problem: Problem, order: int = 1) -> list[str]:
    """What two evaluations of each loss at the start show to be wrong."""
    x, y = problem.init(torch.Generator().manual_seed(0))
    faults = [*structure_faults("x0", x), *structure_faults("y0", y)]
    if faults:
        return faults
    upper_batch, lower_batch = problem.whole()
    used: dict[str, tuple[bool, bool]] = {}
    for name, loss, batch in (
        ("upper", problem.upper, upper_batch),
        ("lower", problem.lower, lower_batch),
    ):
        part = problem.split(batch)[0]
        found = _loss(name, loss, x, y, part, used)
        faults += found
    if not faults:
        if not used["lower"][1]:
            faults.append("lower does not depend on y, so y*(x) is not defined.")
        if not used["upper"][0] and not used["lower"][0]:
            faults.append("neither loss depends on x, so there is nothing to learn.")
        if not used["upper"][1] and not used["upper"][0]:
            faults.append("upper depends on neither x nor y; use the arguments it is given.")
    faults += _projection(problem, "upper", x) + _projection(problem, "lower", y)
    if order > 1 and not faults:
        faults += _second(problem, x, y, lower_batch)
    return faults


def _loss(
    name: str,
    loss: Callable[..., Tensor],
    x: Value,
    y: Value,
    batch: Any,
    used: dict[str, tuple[bool, bool]],
) -> list[str]:
    """Is it a finite scalar, the same twice, of what arguments, which it leaves as they are."""
    inputs = [*leaves(x), *leaves(y)]
    kept = [p.detach().clone() for p in inputs]
    for p in inputs:
        p.requires_grad_()
    try:
        value, again = loss(x, y, batch), loss(x, y, batch)
    except Exception as error:
        words = str(error).splitlines()[0] if str(error) else ""
        return [f"{name} raised {type(error).__name__} at the start: {words}"]
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return [f"{name} must return a scalar tensor, got {came}; sum or average it."]
    faults = []
    if not bool(torch.isfinite(value.detach())):
        faults.append(f"{name} is {value.item()} at the start; choose a finite start.")
    elif not torch.equal(value.detach(), again.detach()):
        faults.append(
            f"{name} is not pure: two calls with the same arguments gave {value.item()} and "
            f"{again.item()}; move randomness into the batches, and switch dropout off."
        )
    if not all(torch.equal(p.detach(), k) for p, k in zip(inputs, kept, strict=True)):
        faults.append(f"{name} changes its arguments in place; work on copies.")
    if faults:
        return faults
    if not value.requires_grad:
        return [f"{name} depends on neither x nor y; use the arguments it is given."]
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    bad = [g for g in grads if g is not None and not bool(g.isfinite().all())]
    if bad:
        return [f"the gradient of {name} is not finite at the start; choose another start."]
    edge = len(leaves(x))
    depends = [g is not None for g in grads]
    used[name] = any(depends[:edge]), any(depends[edge:])
    return []


def _projection(problem: Problem, level: Level, value: Value) -> list[str]:
    if not constrained(problem, level):
        return []
    project = getattr(problem, f"project_{level}")
    with torch.no_grad():
        try:
            once = project(value)
            twice = project(once)
            pairs = list(zip(leaves(once), leaves(twice), leaves(value), strict=True))
        except Exception as error:
            return [f"project_{level} failed at the start: {type(error).__name__}: {error}"]
    if any(
        not isinstance(a, Tensor) or a.shape != v.shape or a.dtype != v.dtype for a, _, v in pairs
    ):
        return [f"project_{level} must keep structure, shape and dtype."]
    if not all(bool(a.isfinite().all()) for a, _, _ in pairs):
        return [f"project_{level} is not finite at the start."]
    # 1e-5 in single precision, 1e-12 in double: a few units of rounding in the worst projections
    if any(
        (a - b).abs().max() > 100 * torch.finfo(a.dtype).eps * (1 + a.abs().max())
        for a, b, _ in pairs
    ):
        return [f"project_{level} is not idempotent: projecting twice moves the point again."]
    return []


def _second(problem: Problem, x: Value, y: Value, batch: Any) -> list[str]:
    """Do second derivatives exist, and agree with differences of first ones along one direction?

    A function without them may give zeros instead of an error, so that only numbers tell.
    """
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=generator).to(p) for p in leaves(y)]
    oracle = Oracle(problem, {})
    remedy = (
        "use solver.products=finite where the solver has it, or a first-order solver such as "
        "penalty."
    )
    try:
        products = oracle.curvature(x, y, batch).both(v)
    except RuntimeError as error:
        words = str(error).splitlines()[0]
        return [f"the lower loss has no second derivatives ({words}); {remedy}"]
    differences = oracle.finite_curvature(x, y, batch).both(v)
    for name, found, expected in zip(("H v", "J'v"), products, differences, strict=True):
        gap = norm([a - b for a, b in zip(found, expected, strict=True)])
        # generous: differences cross kinks, and in single precision they are rough
        if not gap <= 0.5 * norm(expected) + 1e-3 * norm(v):
            return [
                f"the second derivatives of the lower loss are wrong: {name} has norm "
                f"{norm(found):.3g} by autograd and {norm(expected):.3g} by differences of "
                f"gradients, as with functions whose backward cannot be differentiated; {remedy}"
            ]
    return []
