"""A bilevel problem: two losses, their start, their data and their feasible sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from bilevel.tree import Value, clone, structure_faults

Level: TypeAlias = Literal["upper", "lower"]
"""Of the two: upper has x and f, lower has y and g."""


class Stream(ABC):
    """An endless iterator of batches whose position can be saved."""

    @abstractmethod
    def __next__(self) -> Any: ...

    def __iter__(self) -> Iterator[Any]:
        return self

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Always(Stream):
    """The same batch for ever: the stream of a deterministic loss.

    >>> next(Always("everything"))
    'everything'
    """

    def __init__(self, batch: Any = None) -> None:
        self.batch = batch

    def __next__(self) -> Any:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What is known of a problem's answer; used by tests and comparisons."""

    x: Value = None
    """An upper optimum, if known."""
    lower: Callable[[Value], Value] | None = None
    """y*(x)."""
    hypergradient: Callable[[Value], Value] | None = None
    """dF(x) = grad_x f - J^T H^{-1} grad_y f at y*(x)."""


class Exporter(ABC):
    """Writes what a run left in the forms that other tools take; a dataclass of options."""

    @abstractmethod
    def write(self, run: Path) -> list[str]:
        """Write files below the run's folder; returns lines for the user.

        Raises:
            InputError: If something is missing, has changed, or would be written over.
        """


class Problem(ABC):
    """min_x f(x, y*(x)) subject to y*(x) in argmin_y g(x, y), with f = `upper` and g = `lower`.

    Losses are pure: the same arguments give the same number. A loss over a large batch may be
    computed in parts: `split` cuts a batch and the losses of the parts add up to the whole.
    """

    default_solver: ClassVar[str] = "penalty"
    """The solver of the command line when none is named."""
    default_steps: ClassVar[int] = 200
    """The upper steps of the command line when none are given."""
    probed: ClassVar[bool] = True
    """Whether the command line evaluates both losses at the start first, to find their faults."""
    solver_options: ClassVar[dict[str, Any]] = {}
    """Options of the command line, where its solver has them and they are not given."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> tuple[Value, Value]:
        """The start (x0, y0): trees of floating-point tensors or modules."""

    def outline(self, generator: torch.Generator) -> tuple[Value, Value]:
        """`init`, where y may be a module on the meta device with a `bilevel.outline.Outline`.

        For launchers that cut y up, called by all their processes together. By default every
        process makes all of y.
        """
        return self.init(generator)

    @abstractmethod
    def upper(self, x: Value, y: Value, batch: Any) -> Tensor:
        """f(x, y) on a batch, a scalar."""

    @abstractmethod
    def lower(self, x: Value, y: Value, batch: Any) -> Tensor:
        """g(x, y) on a batch, a scalar."""

    def batches(self, generator: torch.Generator) -> tuple[Stream, Stream]:
        """The streams of batches for `upper` and `lower`; by default one batch, None, for ever."""
        return Always(), Always()

    def whole(self) -> tuple[Any, Any]:
        """The batches of all data for `upper` and `lower`, for honest evaluations.

        By default the first batches of the streams, which is right where these never change.
        """
        upper, lower = self.batches(torch.Generator().manual_seed(0))
        return next(upper), next(lower)

    def pieces(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Batches whose mean losses are those of `whole`, for methods that visit finite sums.

        By default one piece each, the whole.
        """
        upper, lower = self.whole()
        return (upper,), (lower,)

    def split(self, batch: Any) -> Sequence[Any]:
        """The micro-batches of a batch, whose losses add up to the loss of the batch."""
        return (batch,)

    def share(self, batch: Any, index: int, count: int) -> Any:
        """Share `index` of `count` of a batch; the losses of the shares add up to its loss.

        Every share must split into equally many micro-batches. Called on several processes only.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define share")

    def check_share(self, count: int) -> list[str]:
        """Why batches cannot be shared out to `count` processes, as sentences."""
        name = type(self).__name__
        own = type(self).share is not Problem.share
        remedy = "define share(batch, index, count), or use launcher=single."
        return [] if own else [f"{name} does not say how to share its batches out; {remedy}"]

    def project_upper(self, x: Value) -> Value:
        """The nearest point of X; by default X is the whole space."""
        return x

    def project_lower(self, y: Value) -> Value:
        """The nearest point of Y; by default Y is the whole space."""
        return y

    def solver_wishes(self) -> dict[str, Any]:
        """`solver_options`, or others where the problem's own options call for them."""
        return dict(self.solver_options)

    def precise(self) -> Problem:
        """The problem in full precision where its options leave that open; by default itself.

        A run takes it for solvers that are not `parallel`: those compare values of y close to each
        other, or take second derivatives.
        """
        return self

    def solution(self) -> Solution | None:
        """What is known of the answer, None if nothing is."""
        return None

    def metrics(self, x: Value, y: Value) -> dict[str, float]:
        """Numbers worth logging besides the two losses."""
        return {}

    def explain(self, x: Value, y: Value, batch: Any) -> str:
        """Where in a batch a loss or gradient that is not finite comes from, if that is known."""
        return ""

    def check(self) -> list[str]:
        """Every fault of options and data, as sentences; called before anything slow is done."""
        return []

    def prepare(self) -> list[str]:
        """Do what takes long before the first step; returns lines on the data for the user."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        """What a run must share with another to go on from its state; by default the fields."""
        own = fields(self) if is_dataclass(self) else ()
        return {field.name: getattr(self, field.name) for field in own}

    def rooted(self) -> Problem:
        """The problem with paths that hold from any folder, as a run keeps them; by default itself.

        What the paths lead to, and what its parts are called, stays as it is.
        """
        return self

    def headline(self, record: dict[str, Any]) -> str:
        """A step's record in the few words of a progress line."""
        return f"upper {record['upper']:.4g}"

    def interim(self, result: Any, out: Path) -> None:  # noqa: B027 - for problems with files
        """Write what is known so far into `out`, after every checkpoint and where a run ends early.

        `result` is as for `finish`, its status RUNNING in the first case.
        """

    def finish(self, result: Any, out: Path) -> list[str]:
        """Write files into the folder `out` after a run; returns the closing lines.

        `result.repeats` holds the results of all seeds where several were asked for.
        """
        return [repr(result)]

    def exporter(self) -> Exporter | None:
        """What writes a run's answer for other tools, by python -m bilevel.export; None if nothing.

        A dataclass with a default for every field; the fields are its options.
        """
        return None


class Functions(Problem):
    """The problem of two plain functions of (x, y) and a start; what `minimize` solves.

    >>> one = torch.ones(())
    >>> problem = Functions(lambda x, y: y**2, lambda x, y: (y - x) ** 2, one, one)
    >>> problem.upper(one, torch.full((), 3.0), None)
    tensor(9.)
    """

    def __init__(
        self,
        upper: Callable[[Value, Value], Tensor],
        lower: Callable[[Value, Value], Tensor],
        x0: Value,
        y0: Value,
        *,
        project_upper: Callable[[Value], Value] | None = None,
        project_lower: Callable[[Value], Value] | None = None,
    ) -> None:
        self._upper, self._lower = upper, lower
        self._start = (x0, y0)
        given = {"project_upper": project_upper, "project_lower": project_lower}
        vars(self).update({name: own for name, own in given.items() if own is not None})

    def check(self) -> list[str]:
        x0, y0 = self._start
        return structure_faults("x0", x0) + structure_faults("y0", y0)

    def init(self, generator: torch.Generator) -> tuple[Value, Value]:
        return clone(self._start[0]), clone(self._start[1])

    def upper(self, x: Value, y: Value, batch: Any) -> Tensor:
        return self._upper(x, y)

    def lower(self, x: Value, y: Value, batch: Any) -> Tensor:
        return self._lower(x, y)


def constrained(problem: Problem, level: Level) -> bool:
    """Whether a problem has a feasible set of its own for x ("upper") or y ("lower").

    >>> one = torch.ones(())
    >>> constrained(Functions(lambda x, y: y, lambda x, y: y * y, one, one), "lower")
    False
    """
    own = getattr(problem, f"project_{level}")
    return getattr(own, "__func__", own) is not getattr(Problem, f"project_{level}")
