"""Nesterov's extrapolation of x with restarts, for accelerated outer steps."""

from __future__ import annotations

import torch

from bilevel.solver import State
from bilevel.tree import leaves, snapshot

SMALLEST = 0.1  # B_0 of the authors' runs: below it the bound no longer shrinks
SHRINK = 0.99  # of the bound at every restart, likewise


def extrapolate(state: State, momentum: float) -> None:
    """Move x_t to w_t = x_t + momentum (x_t - x_{t-1}), projected on X."""
    x = state.variables["x"]
    now = snapshot(x.value)
    before = state.vectors.get("previous", now)
    state.vectors["previous"] = now
    x.assign([a + momentum * (a - b) for a, b in zip(now, before, strict=True)])
    if x.project is not None:
        with torch.no_grad():
            x.assign([p.clone() for p in leaves(x.project(x.value))])


def restart(state: State, bound: float) -> None:
    """Forget the momentum once k sum_{i<=k} |x_i - x_{i-1}|^2 > max(B, B_0)^2, k since the last."""
    x, before = leaves(state.variables["x"].value), state.vectors["previous"]
    kept = state.vectors.get("restart")
    count, total, bound = kept[0].tolist() if kept else (0.0, 0.0, bound)
    count += 1
    total += sum(float((p.detach() - b).square().sum()) for p, b in zip(x, before, strict=True))
    if count * total > max(bound, SMALLEST) ** 2:
        state.vectors["previous"] = [p.detach().clone() for p in x]
        count, total, bound = 0.0, 0.0, SHRINK * bound
    state.vectors["restart"] = [torch.tensor([count, total, bound], dtype=torch.float64)]
