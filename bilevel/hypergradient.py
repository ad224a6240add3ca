"""The hypergradient at one x: exact where that can be had, or as any solver estimates it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InputError, NonFiniteError
from bilevel.launch import Launcher, Single
from bilevel.linear import CG, LinearStatus, norm
from bilevel.memory import Full
from bilevel.oracle import Curvature, Oracle, Vector
from bilevel.plugins import find
from bilevel.problem import Problem, constrained
from bilevel.resolve import Lower, resolve
from bilevel.solver import Solver, State
from bilevel.tree import Value, clone, dot, flatten, leaves, shape_faults, unflatten
from bilevel.variable import OptimizerFactory, Variable

DENSE = 2000  # entries of y up to which H is formed: 32 MB and seconds
DIFFERENCES = 50  # entries of x up to which F is differenced: two lower solves each


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """dF at one x, one tensor for each leaf of x, with what it cost and what speaks against it.

    `evidence` has, as far as they are known, the norm of grad_y g, the relative residual of the
    linear system, and the extreme eigenvalues of H (`smallest`, `largest`).
    """

    value: Vector
    method: str
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    evidence: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{k} {v:.3g}" for k, v in self.evidence.items())
        lines = [
            f"hypergradient ({self.method}, {self.seconds:.2g} s): |dF| = {norm(self.value):.6g}",
            f"   counts: {self.counts}",
            f" evidence: {numbers}",
            *(f"  warning: {words}" for words in self.warnings),
        ]
        return "\n".join(lines)


def hypergradient(
    problem: Problem,
    x: Value | None = None,
    *,
    method: str | Solver = "exact",
    steps: int = 100,
    seed: int = 0,
) -> Hypergradient:
    """dF(x) = grad_x f - J'H^{-1} grad_y f at y*(x), exact or as a solver sees it.

    "exact" solves the lower level on all data and then the system: with a dense H up to 2,000
    entries of y, by conjugate gradients above; "difference", also taken for "exact" where Y is
    constrained, is the central difference of F(x) = f(x, y*(x)) for up to 50 entries of x. The
    name of a solver, or a solver, gives its estimate after `steps` of its steps with x held.

    Args:
        problem: The two losses.
        x: Where; the problem's own start without it.
        method: "exact", "difference", a solver or its name.
        steps: Steps of a solver.
        seed: Of its generator.

    Raises:
        InputError: If the method is unknown or cannot be used on the problem, or x is not shaped as
            the problem's.

    >>> from bilevel.problems.quadratic import Quadratic
    >>> problem = Quadratic()
    >>> x = torch.ones(3, dtype=torch.float64)
    >>> found = hypergradient(problem, x)
    >>> bool(torch.allclose(found.value[0], problem.solution().hypergradient(x)))
    True
    """
    if x is None:
        x = problem.init(torch.Generator().manual_seed(seed))[0]
    if method == "exact" and constrained(problem, "lower"):
        method = "difference"
    if method == "exact":
        return _exact(problem, x, seed)
    if method == "difference":
        return _difference(problem, x)
    path = Estimates(problem, x, method, seed=seed)
    for _ in range(steps):
        path.advance()
    return path.latest()


class Estimates:
    """The estimates of dF that a solver makes step by step while x is held at one place.

    Args:
        problem: The two losses.
        x: Where x is held.
        method: A solver or its name.
        seed: Of its generator.
    """

    def __init__(self, problem: Problem, x: Value, method: str | Solver, *, seed: int = 0) -> None:
        solver = find("solver", method)() if isinstance(method, str) else method
        assert isinstance(solver, Solver)
        self.name = method if isinstance(method, str) else type(solver).__name__
        faults = [*problem.check(), *solver.check(problem)]
        if faults:
            raise InputError(faults)
        self._problem, self._solver = problem, solver
        self._launcher = _Holding()
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.state: State = solver.init(problem, Full(), self._launcher, generator)
        if faults := shape_faults("x", x, self.state.variables["x"].value):
            raise InputError(faults)
        self.state.variables["x"].assign([p.detach() for p in leaves(x)])
        self.seconds = 0.0

    def advance(self) -> None:
        """One step of the solver.

        Raises:
            InputError: If its numbers are not finite.
        """
        begun = time.perf_counter()
        try:
            self.state = self._solver.step(self._problem, self._launcher, self.state)
        except NonFiniteError as error:
            raise InputError(
                f"{self.name} diverged at step {self.state.step + 1}: {error}; lower its steps."
            ) from None
        self.seconds += time.perf_counter() - begun

    def latest(self) -> Hypergradient:
        """What the last step would have moved x along; zero if no step has moved x yet."""
        optimizer = self.state.variables["x"].optimizer
        assert isinstance(optimizer, _Hold)
        zero = [torch.zeros_like(p) for p in leaves(self.state.variables["x"].value)]
        found = [] if optimizer.seen else ["no step moved x yet: allow more steps."]
        return Hypergradient(
            value=optimizer.seen or zero,
            method=self.name,
            seconds=self.seconds,
            counts=dict(self.state.counts),
            evidence={k: v for k, v in self.state.numbers.items() if k != "change"},
            warnings=found,
        )


def _exact(problem: Problem, x: Value, seed: int) -> Hypergradient:
    begun = time.perf_counter()
    solved = resolve(problem, x)
    oracle = Oracle(problem, {})
    upper_batch, lower_batch = problem.whole()
    upper = oracle.upper(x, solved.y, upper_batch)
    try:
        bend = oracle.curvature(x, solved.y, lower_batch)
    except RuntimeError as error:
        raise InputError(
            f"the lower loss has no second derivatives ({error}); use method='difference'."
        ) from None
    size = sum(p.numel() for p in leaves(solved.y))
    solve = _dense if size <= DENSE else _iterative
    v, evidence, found = solve(bend, upper.y)
    evidence = {"lower_gradient": solved.gradient, **evidence}
    cross = bend.cross(v)
    return Hypergradient(
        value=[a - b for a, b in zip(upper.x, cross, strict=True)],
        method="exact",
        seconds=time.perf_counter() - begun,
        counts=dict(oracle.counts) | {"resolve": solved.gradients},
        evidence=evidence,
        warnings=found + _doubts(problem, x, solved, v, bend, seed),
    )


Solved = tuple[Vector, dict[str, float], list[str]]


def _dense(bend: Curvature, r: Vector) -> Solved:
    flat = flatten(r)
    rows = []
    for i in range(len(flat)):
        unit = torch.zeros_like(flat)
        unit[i] = 1.0
        rows.append(flatten(bend.hvp(unflatten(unit, r))))
    h = torch.stack(rows).double()
    spectrum, basis = torch.linalg.eigh((h + h.T) / 2)
    low, high = float(spectrum[0]), float(spectrum[-1])
    tiny = len(flat) * torch.finfo(flat.dtype).eps * max(abs(low), abs(high), 1e-300)
    inverse = torch.where(spectrum.abs() > tiny, 1 / spectrum, 0.0)
    v = basis @ (inverse * (basis.T @ flat.double()))
    rest = float((h @ v - flat.double()).norm() / flat.double().norm().clamp(min=1e-300))
    found = []
    if low < -tiny:
        found.append(
            f"the lower loss is not convex at y (smallest curvature {low:.2g}): y may be no "
            "minimizer, and the number means nothing there."
        )
    elif low <= tiny:
        found.append(
            "the lower level has several minimizers here (H is singular): this is the least-norm "
            "hypergradient at the y that was found; regularize g, or use a penalty solver, which "
            "takes the y best for f."
        )
    evidence = {"linear_residual": rest, "smallest": low, "largest": high}
    return unflatten(v, r), evidence, found


def _iterative(bend: Curvature, r: Vector) -> Solved:
    result = CG(steps=2000, tolerance=1e-10).solve(bend.hvp, r)
    found = [result.status.value] if result.status is LinearStatus.CURVATURE else []
    return result.solution, {"linear_residual": result.residual / max(norm(r), 1e-300)}, found


def _doubts(
    problem: Problem, x: Value, solved: Lower, v: Vector, bend: Curvature, seed: int
) -> list[str]:
    """What speaks against the number: an unsolved lower level, or other minimizers of it."""
    found = []
    error = abs(float(dot(v, bend.gradient)))
    if not solved.converged and not error <= 1e-3 * max(abs(solved.upper), 1e-12):
        found.append(
            f"the lower level is not solved (|grad_y g| = {solved.gradient:.2g}, which puts the "
            f"upper loss off by about {error:.2g}): scale g, or regularize it."
        )
    generator = torch.Generator().manual_seed(seed + 1)
    other = clone(solved.y)  # to be the far side, -y, and a unit away from it
    with torch.no_grad():
        noise = [torch.randn(p.shape, generator=generator).to(p) for p in leaves(other)]
        factor = max(1.0, norm([p.detach() for p in leaves(other)])) / max(norm(noise), 1e-300)
        for p, n in zip(leaves(other), noise, strict=True):
            p.copy_(factor * n - p)
    again = resolve(problem, x, other)
    gap = abs(again.upper - solved.upper)
    if again.converged and solved.converged and gap > 1e-3 * max(abs(solved.upper), 1e-12):
        found.append(
            f"from another start the lower level ends at another y, with an upper loss of "
            f"{again.upper:.6g} instead of {solved.upper:.6g}: it has several minimizers."
        )
    return found


def _difference(problem: Problem, x: Value) -> Hypergradient:
    begun = time.perf_counter()
    x = clone(x)
    size = sum(p.numel() for p in leaves(x))
    if size > DIFFERENCES:
        raise InputError(
            f"method='difference' takes two lower solves for each of the {size} entries of x, "
            f"which is done up to {DIFFERENCES}; use a solver as method."
        )
    first = resolve(problem, x, tolerance=1e-10)
    spent, worst, value, unsolved = first.gradients, first.gradient, [], not first.converged
    for leaf in leaves(x):
        slope = torch.zeros_like(leaf, requires_grad=False)
        eps = torch.finfo(leaf.dtype).eps ** (1 / 3)
        for i in range(leaf.numel()):
            with torch.no_grad():
                entry = leaf.view(-1)[i : i + 1]
                kept = entry.clone()
                e = eps * max(1.0, abs(float(kept)))
                ends = []
                for sign in (1.0, -1.0):
                    entry.copy_(kept + sign * e)
                    with torch.enable_grad():
                        solved = resolve(problem, x, first.y, tolerance=1e-10)
                    ends.append(solved.upper)
                    spent, worst = spent + solved.gradients, max(worst, solved.gradient)
                    unsolved |= not solved.converged
                entry.copy_(kept)
                slope.view(-1)[i] = (ends[0] - ends[1]) / (2 * e)
        value.append(slope)
    return Hypergradient(
        value=value,
        method="difference",
        seconds=time.perf_counter() - begun,
        counts={"resolve": spent},
        evidence={"lower_gradient": worst},
        warnings=[
            f"the lower level is not solved (|grad_y g| = {worst:.2g}), so that differences of F "
            "may mean nothing: has it a minimizer, and is it scaled?"
        ][: int(unsolved)],
    )


class _Hold(torch.optim.Optimizer):
    """Keeps the gradient that it is asked to move along, and moves nothing."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(list(parameters), {"lr": 1.0})
        self.seen: Vector = []

    def step(self, closure: Any = None) -> Any:
        own = [p for group in self.param_groups for p in group["params"]]
        self.seen = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own]


class _Holding(Launcher):
    """One process in which x never moves."""

    def __init__(self) -> None:
        self._inner = Single()

    def variable(
        self,
        name: str,
        value: Value,
        optimizer: OptimizerFactory,
        project: Callable[[Value], Value] | None = None,
        shared: Sequence[str] = (),
        *,
        switches: bool = False,
    ) -> Variable:
        if name == "x":
            return self._inner.variable(name, value, _Hold)
        return self._inner.variable(name, value, optimizer, project, shared)

    def twin(
        self,
        original: Variable,
        name: str,
        optimizer: OptimizerFactory,
        shared: Sequence[str] = (),
    ) -> Variable:
        return self._inner.twin(original, name, optimizer, shared)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._inner.backward(loss, last=last)

    def step(self, variables: Sequence[Variable]) -> None:
        self._inner.step(variables)
