"""The one loop: `solve` runs a solver on a problem, `minimize` is its face for two functions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import checkpoint, evidence
from bilevel.audit import audited
from bilevel.check import options, probe
from bilevel.errors import InputError, NonFiniteError
from bilevel.launch import Launcher, Single
from bilevel.memory import Full, Memory
from bilevel.plugins import find
from bilevel.problem import Functions, Problem
from bilevel.result import Result, Status
from bilevel.solver import Solver, State
from bilevel.tree import Value, leaves, local, map_leaves, named_leaves

GROWTH = 1e20
"""Above it, relative to the first losses or to 1, a run has diverged; some recover from 1e15."""

Callback = Callable[[State, dict[str, Any]], None]
"""Called after every step with the state and the step's record; may raise StopIteration."""


def solve(
    problem: Problem,
    solver: Solver | str = "penalty",
    *,
    steps: int = 200,
    seed: int = 0,
    memory: Memory | None = None,
    launcher: Launcher | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: Path | str | None = None,
    checkpoint_every: int = 50,
    fingerprint: dict[str, Any] | None = None,
    resume: bool = False,
    state: State | None = None,
    on_save: Callable[[Result], None] | None = None,
) -> Result:
    """Run `solver` on `problem` for at most `steps` upper steps.

    Args:
        problem: The two losses, their start and their data.
        solver: A solver or the name of one.
        steps: Upper steps, counted from the start also when resumed.
        seed: Of the generator for start values, batches and drawn blocks.
        memory: What is trainable; everything by default.
        launcher: Where it runs; this process by default.
        callbacks: Called after each step with (state, record).
        checkpoints: Folder for checkpoints; none are written without it.
        checkpoint_every: Steps between checkpoints.
        fingerprint: Settings that a checkpoint must share to be continued.
        resume: Continue from the newest checkpoint, if there is one; without it, one is a fault.
        state: What `start` returned for the same arguments; made here without it.
        on_save: Called after every checkpoint but the first, with the result so far (RUNNING).

    Raises:
        InputError: As `start`, or if the checkpoint to continue from does not fit, or is of more
            steps.

    >>> import bilevel, torch
    >>> from bilevel.problems.quadratic import Quadratic
    >>> bilevel.solve(Quadratic(), "f2ba", steps=3).nit
    3
    """
    folder = Path(checkpoints) if checkpoints else None
    if faults := _faults(folder, resume=resume, steps=steps, checkpoint_every=checkpoint_every):
        raise InputError(faults)
    solver, launcher = _solver(solver), launcher or Single()
    state = state or start(problem, solver, seed=seed, memory=memory, launcher=launcher)
    marks = {"seed": seed, **_identity(solver, state), **(fingerprint or {})}
    earlier = _resumed(folder, launcher, state, marks, steps)
    history = earlier or []

    def store(state: State) -> None:
        if folder is not None:
            body = {**state.state_dict(), "history": history}
            checkpoint.save(folder, body, fingerprint=marks, main=launcher.is_main)
            if on_save is not None and history:
                on_save(_result(state, seed, history, Status.RUNNING))

    if earlier is None:
        store(state)
    status, found = Status.STEPS, ""
    while state.step < steps:
        try:
            state = solver.step(problem, launcher, state)
        except NonFiniteError as error:
            status, found = Status.NONFINITE, f"Step {state.step + 1}: {error}. "
            break
        ended = Status.DIVERGED if _diverged(state, history) else solver.terminate(state)
        record = _record(problem, state)
        history.append(record)
        if _agreed(launcher, state, _stops(callbacks, state, record)):
            ended = Status.STOPPED
        if ended is Status.DIVERGED:  # the last checkpoint is better than this
            status, found = ended, f"After step {state.step}: "
            break
        if ended is not None or state.step == steps or state.step % checkpoint_every == 0:
            if bad := _not_finite_anywhere(launcher, state):
                status, found = Status.NONFINITE, f"After step {state.step}: {bad}. "
                break
            store(state)
        if ended is not None:
            status = ended
            break
    return _result(state, seed, history, status, found)


def start(
    problem: Problem,
    solver: Solver | str = "penalty",
    *,
    seed: int = 0,
    memory: Memory | None = None,
    launcher: Launcher | None = None,
) -> State:
    """The state before the first step; all that can be wrong is found here, nothing is written.

    Args:
        problem: As for `solve`, like all others.
        solver: A solver or the name of one.
        seed: Of the generator for start values, batches and drawn blocks.
        memory: What is trainable; everything by default.
        launcher: Where it runs; this process by default.

    Raises:
        InputError: If problem, solver and memory do not fit together.
    """
    kinds = (
        ("problem", problem, Problem, "a bilevel.Problem"),
        ("memory", memory, Memory | None, "a bilevel.Memory"),
        ("launcher", launcher, Launcher | None, "a bilevel.Launcher"),
        ("seed", seed, int, "a whole number"),
    )
    faults = [
        f"{name} must be {words}, got {type(value).__name__}."
        for name, value, kind, words in kinds
        if not isinstance(value, kind)
    ]
    if faults:
        raise InputError(faults)
    solver = _solver(solver)
    launcher = launcher or Single()
    faults = options(problem, solver, memory or Full(), launcher)
    if faults:
        raise InputError(faults)
    launcher.open()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for modules that draw from the global generator when built
    state = solver.init(problem, memory or Full(), launcher, generator)
    launcher.prime(problem, state.variables["x"], state.copies)
    return state


def minimize(
    upper: Callable[[Value, Value], Tensor],
    lower: Callable[[Value, Value], Tensor],
    x0: Value,
    y0: Value,
    *,
    solver: Solver | str = "penalty",
    steps: int = 200,
    seed: int = 0,
    project_upper: Callable[[Value], Value] | None = None,
    project_lower: Callable[[Value], Value] | None = None,
    callback: Callback | None = None,
) -> Result:
    """Minimize upper(x, y*(x)) over x, where y*(x) minimizes lower(x, y) over y.

    Args:
        upper: f(x, y), a scalar tensor.
        lower: g(x, y), a scalar tensor.
        x0: Start of x: a tensor, or a nest of tensors.
        y0: Start of y: likewise, or an `nn.Module`.
        solver: A solver or the name of one.
        steps: Upper steps.
        seed: Of the generator, for solvers that draw.
        project_upper: Projection on the feasible set of x.
        project_lower: Projection on the feasible set of y.
        callback: Called after each step with (state, record); may raise StopIteration.

    Raises:
        InputError: With every fault that `bilevel.check` finds in losses, start and projections.

    >>> import torch
    >>> t = torch.zeros((), dtype=torch.float64)
    >>> r = minimize(lambda x, y: (y - 1) ** 2, lambda x, y: (y - x) ** 2, t, t, steps=500)
    >>> round(float(r.x), 2)
    1.0
    """
    problem = Functions(
        upper, lower, x0, y0, project_upper=project_upper, project_lower=project_lower
    )
    solver = _solver(solver)
    if faults := options(problem, solver, Full(), Single()) or probe(problem, solver.order):
        raise InputError(faults)
    callbacks = [callback] if callback else []
    return audited(problem, solve(problem, solver, steps=steps, seed=seed, callbacks=callbacks))


def _result(
    state: State, seed: int, history: list[dict[str, Any]], status: Status, found: str = ""
) -> Result:
    return Result(
        x=_detached(state.variables["x"].value),
        y=_detached(state.variables["y"].value),
        status=status,
        message=found + status.value,
        nit=state.step,
        upper=state.upper,
        lower=state.lower,
        counts=dict(state.counts),
        history=history,
        evidence=dict(state.numbers),
        warnings=evidence.warnings(history) if status.success else [],
        seed=seed,
    )


def _faults(folder: Path | None, *, resume: bool, **counts: int) -> list[str]:
    """What is wrong with the counts of a run, or stands where its checkpoints shall go."""
    faults = [
        f"{name} must be a whole number of at least 1, got {name}={number!r}."
        for name, number in counts.items()
        if not isinstance(number, int) or number < 1
    ]
    if folder and not resume and checkpoint.latest(folder):
        faults.append(f"{folder} holds checkpoints; pass resume=True to go on, or another folder.")
    return faults


def _resumed(
    folder: Path | None, launcher: Launcher, state: State, marks: dict[str, Any], steps: int
) -> list[dict[str, Any]] | None:
    """The history up to the newest checkpoint, which the state takes over; None without one.

    Raises:
        InputError: If the checkpoint does not fit, or is of more steps.
    """
    newest = launcher.told(str(checkpoint.latest(folder) or "")) if folder else ""
    if not newest:
        return None
    saved = checkpoint.load(Path(newest), fingerprint=marks, like=state.like)
    history = saved.pop("history")
    state.load_state_dict(saved)
    if state.step > steps:
        raise InputError(
            f"{newest} is of {state.step} steps, more than steps={steps}; give steps="
            f"{state.step} or more, or another folder."
        )
    return history


def _solver(solver: Solver | str) -> Solver:
    found = find("solver", solver)() if isinstance(solver, str) else solver
    if not isinstance(found, Solver):
        came = found.__name__ if isinstance(found, type) else type(found).__name__
        raise InputError(f"solver must be a name or a bilevel.Solver made by a call, got {came}.")
    return found


def _identity(solver: Solver, state: State) -> dict[str, Any]:
    """What every run can compare with another to go on from its checkpoint."""
    options = {
        f"solver.{field.name}": getattr(solver, field.name)
        for field in (fields(solver) if is_dataclass(solver) else ())
    }
    plain = {k: v for k, v in options.items() if isinstance(v, bool | int | float | str)}
    shapes = {
        name: [
            f"{p.dtype} {list(getattr(p, 'ds_shape', p.shape))}"  # ds_shape where ZeRO-3 shards
            for p in leaves(state.variables[name].value)
        ]
        for name in ("x", "y")
    }
    return {"solver": type(solver).__name__, **plain, **shapes}


def _record(problem: Problem, state: State) -> dict[str, Any]:
    state.variables["y"].fetch()
    values = problem.metrics(state.variables["x"].value, state.variables["y"].value)
    return {
        "step": state.step,
        "upper": state.upper,
        "lower": state.lower,
        **state.numbers,
        **values,
    }


def _diverged(state: State, history: list[dict[str, Any]]) -> bool:
    """Whether a loss is larger than the first by twenty orders of magnitude."""
    if not history:
        return False
    pairs = ((getattr(state, level), history[0][level]) for level in ("upper", "lower"))
    return any(abs(now) > GROWTH * max(1.0, abs(first)) for now, first in pairs)


def _stops(callbacks: Sequence[Callback], state: State, record: dict[str, Any]) -> bool:
    """Whether a callback wants to stop; those after it are not called then."""
    try:
        for callback in callbacks:
            callback(state, record)
    except StopIteration:
        return True
    return False


def _agreed(launcher: Launcher, state: State, stopped: bool) -> bool:
    """Whether any process wants to stop.

    Raises:
        InputError: If the processes are not at the same step, or do not train the same blocks.
    """
    if launcher.world_size == 1:
        return stopped
    chosen = f"{state.step} {state.memory.state_dict().get('active')}"
    mark = float(zlib.crc32(chosen.encode()))
    stops, marks = launcher.total([stopped, mark])
    if marks != launcher.world_size * mark:
        raise InputError(
            f"after step {state.step} the processes train different blocks; start all of them "
            "with the same options, seed and versions."
        )
    return stops > 0


def _not_finite_anywhere(launcher: Launcher, state: State) -> str:
    """As `_not_finite`, of what all processes hold; the same on none or on all of them."""
    bad = _not_finite(state)
    if launcher.total([bool(bad)])[0]:
        return bad or "a part that another process holds is not finite"
    return ""


def _not_finite(state: State) -> str:
    """In words, the first value or optimizer state that is not finite; nothing if all are."""
    for variable in state.variables.values():
        for name, leaf in named_leaves(variable.value).items():
            held = [leaf, *variable.optimizer.state.get(leaf, {}).values()]
            if not all(bool(local(t).isfinite().all()) for t in held if torch.is_tensor(t)):
                return f"{variable.name} or its optimizer state is not finite ({name})"
        inside = variable.tensors() if variable.holder else {}
        held = [*inside.get("value", []), *inside.get("optimizer", [])]
        if not all(bool(t.isfinite().all()) for t in held):
            return f"{variable.name} or its optimizer state is not finite"
    return ""


def _detached(value: Value) -> Value:
    return value if isinstance(value, torch.nn.Module) else map_leaves(Tensor.detach, value)
