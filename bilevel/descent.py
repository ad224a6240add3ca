"""Steps that solver families share: begin with variables, descend on the lower loss, move x."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.errors import InputError, NonFiniteError
from bilevel.launch import Launcher
from bilevel.linear import LinearResult, LinearSolver, LinearStatus, Matvec
from bilevel.memory import Memory
from bilevel.oracle import Curvature, Gradients, Vector
from bilevel.problem import Problem, constrained
from bilevel.result import Status
from bilevel.solver import State, finite_loss
from bilevel.tree import dot, leaves, norm, snapshot, structure_faults
from bilevel.variable import OptimizerFactory, Variable

COUNTS = ("upper_grad", "lower_grad", "hvp", "cross")
"""Oracle calls that every solver counts: gradients of f and of g, products H v and J'v."""


def begin(
    problem: Problem,
    memory: Memory,
    launcher: Launcher,
    generator: torch.Generator,
    *,
    upper: OptimizerFactory,
    lower: OptimizerFactory,
    twins: Sequence[str] = (),
) -> State:
    """A state with variables x and y, twins of y by name, streams, memory, and counts at zero.

    Raises:
        InputError: If x or y is nothing to train, such as a parameter that requires no gradient.
    """
    with memory.loading():
        x0, y0 = launcher.begin(problem, generator)
    y0 = memory.prepare(y0, ("y", *twins))
    looked = problem.probed and not hasattr(y0, "outline")  # whose numbers the launcher reads
    if looked and (faults := structure_faults("x0", x0) + structure_faults("y0", y0)):
        raise InputError(faults)
    lower = memory.optimizer(lower, generator)
    bounds = {
        "x": problem.project_upper if constrained(problem, "upper") else None,
        "y": problem.project_lower if constrained(problem, "lower") else None,
    }
    x = launcher.variable("x", x0, upper, bounds["x"])
    shared = () if bounds["y"] else memory.shared(y0)
    y = launcher.variable("y", y0, lower, bounds["y"], shared, switches=memory.switches)
    copies = {name: launcher.twin(y, name, lower, shared) for name in twins}
    streams = problem.batches(generator)
    return State(
        variables={"x": x, "y": y, **copies},
        streams={"upper": streams[0], "lower": streams[1]},
        memory=memory.init(y.value, generator),
        counts=dict.fromkeys(COUNTS, 0),
    )


def descend(
    problem: Problem, launcher: Launcher, state: State, *, steps: int, last: Vector | None = None
) -> None:
    """`steps` steps of y's optimizer on g, each on the stream's next batch; x stays.

    Sets `state.lower` and `numbers["lower_gradient"]`, |grad_y g| before the last step.

    Args:
        problem: Whose lower loss it is.
        launcher: Runs the backward passes and the steps.
        state: Whose y moves.
        steps: Their number.
        last: Is made to hold copies of grad_y g before the last step, which may use it up.
    """
    x, y = state.variables["x"], state.variables["y"]
    for _ in range(steps):
        batch = next(state.streams["lower"])
        total = 0.0
        with x.frozen():
            for part in problem.split(batch):
                loss = problem.lower(x.value, y.value, part)
                launcher.backward(loss)
                total += finite_loss("lower", loss, problem, x, y, part)
        state.counts["lower_grad"] += 1
        state.lower = total
        state.numbers["lower_gradient"] = finite_norm(problem, x, y, batch)
        if last is not None:
            last[:] = [g.clone() for g in y.gradient()]
        launcher.step([y])


def implicit_gradient(
    state: State,
    upper: Gradients,
    bend: Curvature,
    linear: LinearSolver,
    *,
    start: Vector | None = None,
    hvp: Matvec | None = None,
) -> Vector:
    """grad_x f - J'v with v ~ H^{-1} grad_y f; sets the losses, `vectors["v"]` and evidence.

    Args:
        state: Whose numbers are set.
        upper: The derivatives of f at (x, y).
        bend: H and J at (x, y).
        linear: Solves H v = grad_y f.
        start: First guess of v.
        hvp: v -> H v in place of `bend.hvp`.
    """
    result = linear.solve(hvp or bend.hvp, upper.y, start)
    state.lower = bend.value
    note_solve(state, upper, bend.gradient, result)
    return plus(upper.x, bend.cross(result.solution), -1.0)


def note_solve(state: State, upper: Gradients, gradient: Vector, result: LinearResult) -> None:
    """Keep v and the evidence of a solve H v = grad_y f at y, `gradient` being grad_y g there."""
    v = result.solution
    state.vectors["v"] = v
    state.upper = upper.value
    state.numbers |= {
        "lower_gradient": norm(gradient),
        "lower_error": abs(float(dot(v, gradient))),
        "curvature": float(result.status is LinearStatus.CURVATURE),
    }
    if result.residual == result.residual:  # not measured by every solver
        state.numbers["linear_residual"] = result.residual / max(norm(upper.y), 1e-300)


def warm_start(state: State) -> Vector | None:
    """The v of the last `implicit_gradient`, None where it met no or negative curvature.

    A start from such a v lets what it has along those directions grow from step to step.
    """
    return None if state.numbers.get("curvature") else state.vectors.get("v")


def move_upper(launcher: Launcher, state: State, gradient: Vector) -> None:
    """One step of x's optimizer along `gradient`; sets `numbers["change"]`.

    Raises:
        NonFiniteError: If the gradient is not finite; x has not moved then.
    """
    x = state.variables["x"]
    x.clear()
    x.gather(gradient)
    step_with_upper(launcher, state, [])


def step_with_upper(launcher: Launcher, state: State, others: Sequence[Variable]) -> None:
    """Step `others` and x together along what they have gathered; sets `numbers["change"]`.

    Raises:
        NonFiniteError: If what x gathered is not finite; nothing has moved then.
    """
    x = state.variables["x"]
    if not all(bool(g.isfinite().all()) for g in x.gradient()):
        raise NonFiniteError("the gradient of x is not finite")
    before = snapshot(x.value)
    launcher.step([*others, x])
    moves = ((p.detach() - b).abs().amax() for p, b in zip(leaves(x.value), before, strict=True))
    state.numbers["change"] = max(map(float, moves))


def converged(state: State, tolerance: float) -> Status | None:
    """CONVERGED where the last step changed every entry of x by less than a tolerance; 0: never."""
    small = tolerance and state.numbers.get("change", tolerance) < tolerance
    return Status.CONVERGED if small else None


def finite_norm(problem: Problem, x: Variable, copy: Variable, *batches: object) -> float:
    """The norm of what a copy of y has gathered.

    Raises:
        NonFiniteError: If it is not finite, with the problem's words about the batches.
    """
    gathered = [p.grad for p in leaves(copy.value) if p.grad is not None]
    size = norm(gathered) if gathered else 0.0
    if not math.isfinite(size):
        copy.fetch()
        words = [problem.explain(x.value, copy.value, batch) for batch in batches]
        raise NonFiniteError(
            "; ".join(filter(None, [f"the gradient of {copy.name} has norm {size}", *words]))
        )
    return size


def set_lr(variable: Variable, lr: float) -> None:
    """Give every parameter group of a variable's optimizer the step size `lr`."""
    for group in variable.optimizer.param_groups:
        group["lr"] = lr


def zeros(like: Sequence[Tensor]) -> Vector:
    """The zero vector of a shape."""
    return [torch.zeros_like(p, requires_grad=False) for p in like]


def plus(a: Vector, b: Vector, factor: float = 1.0) -> Vector:
    """a + factor b."""
    return [torch.add(p, q, alpha=factor) for p, q in zip(a, b, strict=True)]
