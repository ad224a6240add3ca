"""Few-shot learning: an initialization from which new digits are told apart after few examples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import Functions, InputError, Problem, datasets, picture, resolve
from bilevel.fields import out_of_range

PIXELS, CLASSES = 64, 10
Tree = dict[str, Tensor]


class Tasks(NamedTuple):
    """Classification tasks: rows to adapt to, and rows to be judged on.

    Pixels are [tasks, rows, 64], labels [tasks, rows] and number the classes of each task.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


@dataclass(frozen=True, kw_only=True)
class FewShot(Problem):
    """g = sum_t loss_t(y_t; support) + strength |y_t - x|^2/2, f = mean_t loss_t(y_t; query).

    x is the common start of a network with one hidden layer (64 -> hidden -> ways, tanh), y_t the
    network adapted to task t; a task tells `ways` digits apart, in an order of its own, from
    `shots` examples of each. The learned start is judged on new tasks. The proximal term keeps the
    lower level well posed, though not convex: below a strength of about 1 conjugate gradients meet
    negative curvature.

    Reference: Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit Gradients, 2019
    (1909.04630). Deviations: a fixed set of tasks in full batches, the lower level warm-started.
    """

    default_solver: ClassVar[str] = "aid"
    default_steps: ClassVar[int] = 60

    ways: int = 5
    """Classes of a task, 2 to 5."""
    shots: int = 1
    """Examples of each class to adapt to."""
    queries: int = 10
    """Examples of each class to be judged on."""
    tasks: int = 60
    """Training tasks."""
    test_tasks: int = 100
    """Tasks that the learned start is judged on after the run."""
    hidden: int = 24
    """Hidden units."""
    strength: float = 1.0
    """Of the pull towards the common start."""
    held_out: Literal["images", "classes"] = "images"
    """What test tasks do not share with training tasks. With classes, five digits train and five
    test: too few to learn from, the learned start is then worse than a random one."""
    data_seed: int = 0
    """Of the classes and tasks."""

    def __post_init__(self) -> None:
        names = ("shots", "queries", "tasks", "test_tasks", "hidden")
        ranges = dict.fromkeys(names, "at least 1") | {"strength": "positive"}
        faults = out_of_range("problem", self, **ranges)
        if not 2 <= self.ways <= CLASSES // 2:
            faults.append(f"problem.ways must be between 2 and 5, got {self.ways}.")
        if self.shots + self.queries > 80:  # half of the rarest digit has 87 images
            faults.append(
                "problem.shots and problem.queries must add up to at most 80, "
                f"got {self.shots} and {self.queries}."
            )
        if faults:
            raise InputError(faults)

    def check(self) -> list[str]:
        return [*datasets.missing(), *picture.missing()]

    @cached_property
    def data(self) -> tuple[Tasks, Tasks]:
        """The training and the test tasks."""
        generator = torch.Generator().manual_seed(self.data_seed)
        labels = datasets.digits()[1]
        order = torch.randperm(CLASSES, generator=generator)
        later = torch.arange(len(labels)) % 2 == 1
        if self.held_out == "classes":
            later = torch.isin(labels, order[CLASSES // 2 :])
        seen = self._tasks(~later, self.tasks, generator)
        return seen, self._tasks(later, self.test_tasks, generator)

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        x = self.random_start(generator)
        return x, {k: t.expand(self.tasks, *t.shape).clone() for k, t in x.items()}

    def random_start(self, generator: torch.Generator) -> Tree:
        """A network with small random weights, as training usually starts from."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5

        zero = torch.zeros(1, self.hidden, dtype=torch.float64)
        return {
            "weight": normal(PIXELS, self.hidden),
            "bias": zero,
            "head": normal(self.hidden, self.ways),
        }

    def lower(self, x: Tree, y: Tree, batch: Any) -> Tensor:
        return self._adapted(x, y, self.data[0])

    def upper(self, x: Tree, y: Tree, batch: Any) -> Tensor:
        tasks = self.data[0]
        return _loss(y, tasks.query, tasks.query_labels) / len(tasks.query)

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        """The share of right answers on the queries of the training tasks."""
        return {"accuracy": float(_accuracy(y, self.data[0]).mean())}

    def finish(self, result: Any, out: Path) -> list[str]:
        """Adapt to the test tasks from the learned and from three random starts; draw both."""
        generator = torch.Generator().manual_seed(self.data_seed + 1)
        learned = _accuracy(self.adapt(result.x), self.data[1])
        starts = [self.random_start(generator) for _ in range(3)]
        random = torch.stack([_accuracy(self.adapt(x), self.data[1]) for x in starts]).mean(0)
        gain = learned - random
        drawn, axes = picture.figure()
        bins = torch.linspace(0, 1, 26).tolist()
        named = {"random start": random, "learned start": learned}
        for (name, values), color in zip(named.items(), picture.COLORS[1::-1], strict=True):
            label = f"{name}, mean {float(values.mean()):.3f}"
            axes.hist(values.tolist(), bins=bins, alpha=0.6, label=label, color=color)
        axes.set(xlabel="accuracy after adaptation", ylabel="test tasks")
        axes.set_title(f"{self.ways} classes, examples of each: {self.shots}", fontsize=10)
        axes.legend(frameon=False, loc="upper left")
        error = float(gain.std() / len(gain) ** 0.5)
        return [
            f"accuracy on new tasks, learned start: {float(learned.mean()):.3f}",
            f"accuracy on new tasks, random start: {float(random.mean()):.3f}",
            f"gain {float(gain.mean()):.3f}, standard error {error:.3f}, of {len(gain)} tasks",
            picture.save(drawn, out / "accuracy.png"),
        ]

    def adapt(self, x: Tree) -> Tree:
        """The networks adapted to the test tasks, y*(x) there."""
        tasks = self.data[1]

        def lower(x: Tree, y: Tree) -> Tensor:
            return self._adapted(x, y, tasks)

        start = {k: t.detach().expand(len(tasks.support), *t.shape).clone() for k, t in x.items()}
        return resolve(Functions(lower, lower, x, start), x, tolerance=1e-3, steps=100).y

    def _adapted(self, x: Tree, y: Tree, tasks: Tasks) -> Tensor:
        far = torch.stack([(y[k] - x[k]).square().sum() for k in x]).sum()
        return _loss(y, tasks.support, tasks.support_labels) + 0.5 * self.strength * far

    def _tasks(self, allowed: Tensor, count: int, generator: torch.Generator) -> Tasks:
        pixels, labels = datasets.digits()
        present = labels[allowed].unique()
        drawn: list[Tensor] = []
        for _ in range(count):
            chosen = present[torch.randperm(len(present), generator=generator)[: self.ways]]
            for c in chosen:
                rows = ((labels == c) & allowed).nonzero()[:, 0]
                order = torch.randperm(len(rows), generator=generator)
                drawn.append(rows[order[: self.shots + self.queries]])
        images = pixels[torch.stack(drawn)] - 0.5
        images = images.view(count, self.ways, self.shots + self.queries, PIXELS)
        support, query = images.split([self.shots, self.queries], dim=2)
        answers = torch.arange(self.ways)
        return Tasks(
            support.reshape(count, -1, PIXELS),
            answers.repeat_interleave(self.shots).expand(count, -1),
            query.reshape(count, -1, PIXELS),
            answers.repeat_interleave(self.queries).expand(count, -1),
        )


def _scores(y: Tree, pixels: Tensor) -> Tensor:
    return (pixels @ y["weight"] + y["bias"]).tanh() @ y["head"]


def _loss(y: Tree, pixels: Tensor, labels: Tensor) -> Tensor:
    """The sum over tasks of the mean loss of each."""
    losses = cross_entropy(_scores(y, pixels).flatten(0, 1), labels.flatten(), reduction="sum")
    return losses / labels.shape[1]


def _accuracy(y: Tree, tasks: Tasks) -> Tensor:
    """The share of right answers to the queries of each task."""
    with torch.no_grad():
        right = _scores(y, tasks.query).argmax(2) == tasks.query_labels
    return right.double().mean(1)
