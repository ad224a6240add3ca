"""Contracts that every problem and every solver keeps, for the tests of ours and of strangers."""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import torch

from bilevel.check import probe
from bilevel.hypergradient import hypergradient
from bilevel.problem import Level, Problem, constrained
from bilevel.resolve import resolve
from bilevel.solve import solve
from bilevel.solver import Solver
from bilevel.tree import Value, leaves, named_leaves

ROUNDING = 1e3  # units of rounding that sums in another order may differ by


def check_problem(problem: Problem, *, order: int = 1) -> None:
    """Assert that a problem keeps its contracts.

    `init` gives fresh values that depend on the generator alone; losses are finite, pure scalars of
    x and y; micro-batches add up to their batch; streams go on from a saved position; projections
    project; and what `solution` says is so: y*(x) is stationary, dF is the slope of f(x, y*(x)).

    Args:
        problem: A small instance.
        order: 2 if its lower loss should have second derivatives.

    Raises:
        AssertionError: With every broken contract.

    >>> from bilevel.problems.quadratic import Quadratic
    >>> check_problem(Quadratic(), order=2)
    """
    faults = problem.check() or probe(problem, order)
    if not faults:
        faults = [*_start(problem), *_streams(problem), *_parts(problem), *_known(problem)]
    _raise(f"{type(problem).__name__} breaks its contract", faults)


def check_solver(solver: Solver, problem: Problem, *, steps: int = 4) -> None:
    """Assert that a solver keeps its contracts on a problem.

    Values keep structure, dtype and device; the same seed gives the same numbers, bit for bit, also
    through a checkpoint in the middle; counts only grow; every iterate is feasible; and the start
    that a problem hands out is not shared between runs.

    Args:
        solver: Any.
        problem: One that it can solve; small.
        steps: Upper steps, at least 2.

    Raises:
        AssertionError: With every broken contract.

    >>> from bilevel.problems.quadratic import Quadratic
    >>> from bilevel.solvers.implicit import AID
    >>> check_solver(AID(), Quadratic())
    """
    faults = []
    worst: dict[Level, float] = {"upper": 0.0, "lower": 0.0}
    counted: list[dict[str, int]] = []

    def watch(state: Any, record: dict[str, Any]) -> None:
        for level, name in zip(worst, "xy", strict=True):
            value = state.variables[name].value
            worst[level] = max(worst[level], _outside(problem, level, value))
        counted.append(dict(state.counts))

    x0, y0 = problem.init(torch.Generator().manual_seed(0))
    first = solve(problem, solver, steps=steps, callbacks=[watch])
    for name, start, end in (("x", x0, first.x), ("y", y0, first.y)):
        faults += _same_kind(name, start, end)
    for level, gap in worst.items():
        if gap > 1e-12:
            faults.append(f"an iterate left the feasible set of {level} by {gap:.2g}.")
    for earlier, later in itertools.pairwise(counted):
        if any(later.get(key, 0) < number for key, number in earlier.items()):
            faults.append(f"counts must not fall, got {earlier} and then {later}.")
    if counted and not any(counted[-1].values()):
        faults.append("no oracle call was counted.")
    if not counted and first.success:  # else it said why no step can be done
        faults.append("no step was done, yet the status is a success.")
    if _differ(first.x, (again := solve(problem, solver, steps=steps)).x, first.y, again.y):
        faults.append("two runs with the same seed differ.")
    with tempfile.TemporaryDirectory() as folder:
        solve(problem, solver, steps=steps // 2, checkpoints=folder)
        resumed = solve(problem, solver, steps=steps, checkpoints=folder, resume=True)
    if _differ(first.x, resumed.x, first.y, resumed.y):
        faults.append("a run resumed from a checkpoint differs from an uninterrupted one.")
    if resumed.counts != first.counts:
        faults.append(f"a resumed run counts {resumed.counts}, a whole one {first.counts}.")
    _raise(f"{type(solver).__name__} on {type(problem).__name__} breaks its contract", faults)


def _start(problem: Problem) -> list[str]:
    starts = [problem.init(torch.Generator().manual_seed(0)) for _ in range(2)]
    for name, a, b in zip(("x0", "y0"), *starts, strict=True):
        if {p.data_ptr() for p in leaves(a)} & {p.data_ptr() for p in leaves(b)}:
            return [f"init hands out the same {name} twice; return a copy."]
    return []


def _streams(problem: Problem) -> list[str]:
    faults = []
    streams = problem.batches(torch.Generator().manual_seed(0))
    others = problem.batches(torch.Generator().manual_seed(0))
    for name, stream, other in zip(("upper", "lower"), streams, others, strict=True):
        for _ in range(2):
            next(stream)
        other.load_state_dict(stream.state_dict())
        if not _equal(next(stream), next(other)):
            faults.append(f"the stream of {name} does not go on from its saved position.")
    return faults


def _parts(problem: Problem) -> list[str]:
    faults = []
    x, y = problem.init(torch.Generator().manual_seed(0))
    streams = problem.batches(torch.Generator().manual_seed(0))
    for name, stream, loss in zip(
        ("upper", "lower"), streams, (problem.upper, problem.lower), strict=True
    ):
        batch = next(stream)
        with torch.no_grad():
            whole = loss(x, y, batch)
            parts = sum(loss(x, y, part) for part in problem.split(batch))
        room = ROUNDING * torch.finfo(whole.dtype).eps * (1 + abs(float(whole)))
        if abs(float(whole) - float(parts)) > room:
            faults.append(
                f"the parts of a batch of {name} add up to {parts}, the batch is {whole}."
            )
    return faults


def _known(problem: Problem) -> list[str]:
    known = problem.solution()
    if known is None:
        return []
    faults = []
    x, _ = problem.init(torch.Generator().manual_seed(0))
    if known.lower is not None:
        star = known.lower(x)
        solved = resolve(problem, x, star)
        value = sum(float(problem.lower(x, star, b).detach()) for b in _whole_lower(problem))
        if value > solved.lower + 1e-6 * (1 + abs(solved.lower)):
            faults.append(f"solution().lower has g = {value}, and {solved.lower} is possible.")
    if known.hypergradient is not None:
        given = leaves(known.hypergradient(x))
        found = hypergradient(problem, x, method="difference").value
        gap = max(float((a - b).abs().max()) for a, b in zip(given, found, strict=True))
        size = max(float(a.abs().max()) for a in found)
        if gap > 1e-4 * (1 + size):
            faults.append(f"solution().hypergradient is off the slope of F by {gap:.2g}.")
    return faults


def _whole_lower(problem: Problem) -> list[Any]:
    return list(problem.split(problem.whole()[1]))


def _outside(problem: Problem, level: Level, value: Value) -> float:
    if not constrained(problem, level):
        return 0.0
    with torch.no_grad():
        nearest = getattr(problem, f"project_{level}")(value)
        pairs = zip(leaves(nearest), leaves(value), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)


def _same_kind(name: str, start: Value, end: Value) -> list[str]:
    a, b = named_leaves(start), named_leaves(end)
    if a.keys() != b.keys():
        return [f"{name} changed its structure."]
    kinds = [(p.shape, p.dtype, p.device) for p in a.values()]
    if kinds != [(p.shape, p.dtype, p.device) for p in b.values()]:
        return [f"{name} changed shape, dtype or device."]
    return []


def _differ(*values: Value) -> bool:
    pairs = zip(values[::2], values[1::2], strict=True)
    return any(
        not torch.equal(a, b)
        for one, two in pairs
        for a, b in zip(leaves(one), leaves(two), strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _raise(head: str, faults: list[str]) -> None:
    if faults:
        raise AssertionError("\n  ".join([f"{head}:", *faults]))
