"""The step of softmax logits that a data mixture needs: decisive on signal, still on noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InputError

LARGEST = 4096  # entries; every pair is compared, so state and time grow with the square


class PairwiseVotes(torch.optim.Optimizer):
    """Mirror descent on the simplex, each weight moved by the others that it is known to beat.

    For x the logits of p = softmax(x) along the last dimension and G the gradient of the loss,
    G_s / p_s is what weight on s costs, up to a constant common to all s. Its running mean m_s and
    the running variance V_st of the paired difference give a score for every pair, and a vote that
    is 0 within noise and full at twice the threshold:

        z_st = (m_s - m_t) / sqrt(V_st / n)
        vote_st = sign(z_st) clip(|z_st| / threshold - 1, 0, 1)
        x_s <- x_s - lr mean_t vote_st

    n is the effective number of steps in the running means. Entries that cannot be told apart get
    the same step, so they stay even; pure noise moves nothing. The scale of the gradient cancels,
    so the step does not depend on a penalty factor. Where all pairs are equally noisy the step is
    monotone in m, hence a descent direction (Chebyshev's sum inequality under p).

    Args:
        params: Logits, [..., n] each.
        lr: Log-ratio that one step opens between two groups, one of which beats the other.
        horizon: Steps that the running means remember.
        threshold: Standard errors below which a difference counts as noise.
        hold: Gradients gathered before the first move.

    Raises:
        InputError: If an option is out of range, or a tensor has too many entries to pair.

    Example:
        >>> x = torch.zeros(3, requires_grad=True)
        >>> optimizer = PairwiseVotes([x], lr=0.3, hold=2)
        >>> for noise in (0.01, -0.01):
        ...     x.grad = torch.tensor([-1.0 + noise, -1.0 - noise, 2.0])
        ...     optimizer.step()
        >>> [round(v, 3) for v in x.tolist()]
        [0.1, 0.1, -0.2]

    Reference: our own; what it was measured against is in docs/log.md.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.03,
        *,
        horizon: int = 100,
        threshold: float = 2.5,
        hold: int = 10,
    ) -> None:
        faults = [
            f"{name} must be {what}, got {name}={value}."
            for name, what, value, bad in (
                ("lr", "positive", lr, not lr > 0),
                ("horizon", "at least 2", horizon, horizon < 2),
                ("threshold", "positive", threshold, not threshold > 0),
                ("hold", "at least 2", hold, hold < 2),
            )
            if bad
        ]
        params = list(params)
        faults += [
            "votes compares all pairs of entries along the last dimension: expected shape [..., n] "
            f"with n at most {LARGEST}, got {list(p.shape)}; use adam."
            for p in params
            if p.dim() == 0 or p.shape[-1] > LARGEST
        ]
        if faults:
            raise InputError(faults)
        options = {"lr": lr, "horizon": horizon, "threshold": threshold, "hold": hold}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._move(x, self.state[x], group)
        return loss

    def _move(self, x: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["weight"], state["squares"] = x.new_zeros(()), x.new_zeros(())
            state["mean"], state["spread"] = torch.zeros_like(x), torch.zeros_like(_pairs(x))
        keep = (options["horizon"] - 1) / (options["horizon"] + 1)
        cost = x.grad / x.softmax(-1)  # type: ignore[operator]
        cost = cost - cost.mean(-1, keepdim=True)
        state["step"] += 1
        state["weight"].mul_(keep).add_(1)
        state["squares"].mul_(keep * keep).add_(1)
        before = _pairs(state["mean"])
        state["mean"] += (cost - state["mean"]) / state["weight"]
        gaps, now = _pairs(state["mean"]), _pairs(cost)
        state["spread"].mul_(keep).add_((now - before) * (now - gaps))  # West, 1979, weighted
        if state["step"] < options["hold"]:
            return
        count = state["weight"].square() / state["squares"]
        variance = state["spread"] / (state["weight"] - state["squares"] / state["weight"])
        error = (variance.clamp_min(0) / count).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        score = gaps / error
        votes = score.sign() * (score.abs() / options["threshold"] - 1).clamp(0, 1)
        x.sub_(votes.mean(-1), alpha=options["lr"])


def _pairs(values: Tensor) -> Tensor:
    """[..., n, n], values_s - values_t."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)
