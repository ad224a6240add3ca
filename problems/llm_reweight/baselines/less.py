"""LESS: for each row, how well the step of Adam that it alone would cause helps the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bilevel.problems.llm_reweight.baselines.lab import Lab, tokens
from bilevel.problems.llm_reweight.baselines.method import Found, Method, normalized, require
from bilevel.problems.llm_reweight.baselines.sketch import Sketch
from bilevel.problems.llm_reweight.targets import shared_out
from bilevel.problems.llm_reweight.tokens import Rows, cut

Direction = Callable[[Tensor, Tensor], Tensor]
"""From a parameter and its gradient to the direction that counts."""


@dataclass(frozen=True, kw_only=True)
class LESS(Method):
    """Scores of rows, summed over checkpoints of a training on the uniform mixture.

        a_i = sum_c lr_c cos(S mean_j grad l_j(y_c), S step_c(grad l_i(y_c)))

    with j over rows of the target, S a random projection, and step_c(g) the update of Adam from g,

        m / (sqrt(v) + eps),    m = (b1 m_c + (1 - b1) g) / (1 - b1^t),    v likewise of squares

    from the moments m_c, v_c of the training; t counts its steps, with the one to come. l_i is the
    mean over tokens and the cosine divides by the length, so that short rows are not preferred. The
    weight of a source is its share among the `top` rows, of equally many that are scored of each.

    Reference: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning, ICML
    2024 (2402.04333), section 3. Deviations: a sparse projection; one target task, or several by
    their weights rather than the best of each row; no adapter unless the run has one; checkpoints
    in the middle of equal parts of the training, where the step size is not yet 0; aggregated to
    sources.
    """

    warmup: float = 0.6
    """Share of the budget that the training takes; the gradients have the rest, at most."""
    checkpoints: int = 3
    """Points of the training at which gradients are taken."""
    rows: int = 128
    """Rows of each source that are scored, and of the target, at most."""
    size: int = 2048
    """Dimensions of the projection."""
    top: float = 0.2
    """Share of the scored rows whose sources are counted."""

    def __post_init__(self) -> None:
        require(
            self,
            warmup="in (0, 1)",
            checkpoints="at least 1",
            rows="at least 1",
            size="at least 1",
            top="in (0, 1]",
        )

    def search(self, lab: Lab) -> Found:
        scores = self.scores(lab)
        kept = max(1, round(self.top * sum(map(len, scores))))
        least = torch.cat(scores).topk(kept).values[-1]
        counted = [float((a >= least).double().mean()) for a in scores]
        means = ", ".join(
            f"{n} {float(a.mean()):.3g}" for n, a in zip(lab.names, scores, strict=True)
        )
        return Found(weights=normalized(lab.names, counted), note=f"mean score: {means}")

    def scores(self, lab: Lab) -> list[Tensor]:
        """For each source [rows], a_i of the rows that `lab.rows` takes of it."""
        problem = lab.problem
        steps = lab.steps(self.warmup * lab.budget)
        marks = {int((c + 0.5) * steps / self.checkpoints) + 1 for c in range(self.checkpoints)}
        row = sum(lab.lengths) + sum(lab.lengths) / len(lab.lengths)
        spend = (1 - self.warmup) * lab.budget / len(marks)
        count = max(1, min(self.rows, int(spend / row)))
        totals = [torch.zeros(min(count, len(rows))) for rows in problem.rows]
        sketch = Sketch(self.size, seed=lab.seed)
        for step in lab.path(lab.uniform, steps=steps):
            if step.number not in marks:
                continue
            lr = step.optimizer.param_groups[0]["lr"]
            plain = torch.zeros(self.size)
            for own, n in zip(problem.targets, shared_out(problem.targets, count), strict=True):
                found = features(lab, step.model, own.rows, n, sketch, lambda p, g: g)
                plain += own.weight * found.mean(0)
            target = nn.functional.normalize(plain, dim=0)
            update = adam_direction(step.optimizer)
            for total, rows in zip(totals, problem.rows, strict=True):
                found = features(lab, step.model, rows, count, sketch, update)
                total += lr * (nn.functional.normalize(found, dim=1) @ target)
        return totals


def features(
    lab: Lab,
    model: nn.Module,
    source: Rows,
    count: int,
    sketch: Sketch,
    direction: Direction,
) -> Tensor:
    """[rows, size], the projected direction of the gradient of each of about `count` rows."""
    moving = [p for p in model.parameters() if p.requires_grad]
    found = []
    for batch in lab.rows(source, count):
        for row in cut(batch, 1):
            found.append(
                projected(
                    lambda row=row: lab.problem.losses(model, row).sum(), moving, sketch, direction
                )
            )
            lab.tokens += tokens(row)
    return torch.stack(found)


def projected(
    loss: Callable[[], Tensor], moving: Sequence[Tensor], sketch: Sketch, direction: Direction
) -> Tensor:
    """[size], the sketch of the direction of a loss's gradient, parameter by parameter.

    Each gradient is projected when it is whole and freed at once.
    """
    total = torch.zeros(sketch.size)

    def take(number: int, p: Tensor) -> None:
        if p.grad is not None:
            sketch.add(total, number, direction(p, p.grad))
            p.grad = None

    with _hooked(moving, take):
        loss().backward()
    return total


def adam_direction(optimizer: torch.optim.Optimizer) -> Direction:
    """What Adam would add to a parameter for a gradient, up to its step size and sign."""
    group = optimizer.param_groups[0]
    (b1, b2), eps = group["betas"], group["eps"]

    @torch.no_grad()
    def direction(p: Tensor, gradient: Tensor) -> Tensor:
        state = optimizer.state[p]
        t = float(state["step"]) + 1
        g = gradient.float()
        m = (b1 * state["exp_avg"] + (1 - b1) * g) / (1 - b1**t)
        v = (b2 * state["exp_avg_sq"] + (1 - b2) * g.square()) / (1 - b2**t)
        return m / (v.sqrt() + eps)

    return direction


@contextmanager
def _hooked(moving: Sequence[Tensor], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    handles = [
        p.register_post_accumulate_grad_hook(lambda p, k=k: take(k, p))
        for k, p in enumerate(moving)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
