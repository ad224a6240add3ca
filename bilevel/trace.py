"""A differentiable function traced once and run in stages, without autograd between its kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree  # private name, used by transformers and torch.func too

from bilevel.errors import InputError
from bilevel.rewrite import levels, merge, postpone, rewrite

Vector: TypeAlias = list[Tensor]
Function: TypeAlias = Callable[[Vector, Vector, Any], tuple[Tensor, Sequence[Tensor]]]
"""(x, s, batch) -> a scalar and tensors, differentiable functions of x and s."""

Decompositions: TypeAlias = Mapping[Any, Callable[..., Any]]
"""Kernels by functions that do the same with simpler ones."""

Saved: TypeAlias = dict[fx.Node, Tensor]
"""Tensors of a trace by their place in it."""


class Stages:
    """The graphs of F(x, s) and its pullbacks v -> (dF/ds)'v, (dF/dx)'v, cut by what they wait for.

    `first` finds `known` from x, the batch and the tensors that the function reads; `values`,
    `number` and `record` find F, the scalar, and F with what is `saved` for the pullbacks `both`,
    `pull_s` and `pull_x`. Each is a function of an environment: tensors by their place.

    Args:
        function: F, and a scalar beside it.
        x: Like those to come.
        s: Likewise.
        batch: Likewise, with `rest` around it.
        rest: The batch without the numbers of its tensors.
        decompositions: Of kernels into those that a compiler fuses. What is cheap is then done
            again for each pullback rather than saved.
    """

    def __init__(
        self,
        function: Function,
        x: Vector,
        s: Vector,
        batch: Vector,
        rest: Rest,
        decompositions: Decompositions | None = None,
    ) -> None:
        counts = (len(x) + len(batch), len(s), len(s))
        graph, outputs = _joint(function, rest, x, s, batch, decompositions)
        level = levels(graph.graph, counts)
        rewrite(graph.graph, level)
        merge(graph.graph)
        self.read = _lifted(graph, level)
        given = [node for node in graph.graph.nodes if node.op == "placeholder"]
        given = [node for node in given if node not in self.read]
        self.x, self.s, self.v = (given[i : i + c] for i, c in _spans(counts))
        out = _outputs(graph.graph)
        found, pulled = out[1 : 1 + outputs], out[1 + outputs :]
        self.both = Stage(graph, level, 2, pulled)
        if decompositions is not None:
            postpone([node for node in self.both.needs if level[node] == 1], level)
            self.both = Stage(graph, level, 2, pulled)
        self.saved = [node for node in self.both.needs if level[node] == 1]
        self.pull_s = Stage(graph, level, 2, pulled[: len(s)])
        self.pull_x = Stage(graph, level, 2, pulled[len(s) :])
        self.values = Stage(graph, level, 1, found)
        self.record = Stage(graph, level, 1, [*found, *self.saved])
        self.number = Stage(graph, level, 1, [out[0]])
        later = (self.values, self.record, self.number, self.both)
        early = {node: None for stage in later for node in stage.needs if level[node] == 0}
        self.known = [node for node in early if node.op != "placeholder"]
        self.first = Stage(graph, level, 0, self.known)


class Traced:
    """The values F(x, s) of a function and its pullbacks v -> (dF/ds)'v, (dF/dx)'v.

    What is traced are the kernels that autograd would call, first for F and then for the products;
    nothing is approximated. Each is done once at the earliest stage that knows its inputs:

        at       what depends on x, the batch and constants alone
        values   F at s; `scalar` the scalar
        record   F at s, and what the products need from there
        pull     the products with v

    so that a loop over s repeats nothing that x decides, and one over v nothing that s decides.
    Products of tall narrow matrices and their softmax run transposed, which is faster.

    Args:
        function: F, and a scalar beside it. It is run once, now: numbers of Python that it reads
            are kept as they are, tensors that it reads are read again every time.
        x: Like those to come.
        s: Likewise.
        batch: Likewise; a tree whose tensors may change, or anything else, which may not.

    Raises:
        InputError: If the function draws random numbers, changes tensors in place or asks for the
            number in one, so that a trace is not the function.
    """

    engine: ClassVar[str] = "traced"

    def __init__(self, function: Function, x: Vector, s: Vector, batch: Any) -> None:
        flat, self._batch = flattened(batch)
        self._size = len(s)
        self._stages = Stages(function, x, s, flat, self._batch)
        self._constants: Saved = {}

    def at(self, x: Vector, batch: Any) -> None:
        """Take x and the batch that all following calls are at."""
        flat, _ = flattened(batch)
        given = [p.detach() for p in (*x, *flat)]
        stages = self._stages
        with torch.no_grad():
            env = stages.read | dict(zip(stages.x, given, strict=True))
            self._constants = env | dict(zip(stages.known, stages.first(env), strict=True))

    def scalar(self, s: Vector) -> Tensor:
        """The scalar at s."""
        return self._known_at(self._stages.number, s)[0]

    def values(self, s: Vector) -> Vector:
        """F(x, s)."""
        return self._known_at(self._stages.values, s)

    def record(self, s: Vector) -> tuple[Vector, Saved]:
        """F(x, s), and what `pull` needs."""
        found, saved = split(self._known_at(self._stages.record, s), -len(self._stages.saved))
        return found, self._constants | dict(zip(self._stages.saved, saved, strict=True))

    def pull(self, saved: Saved, v: Vector) -> tuple[Vector, Vector]:
        """(dF/ds)'v and (dF/dx)'v where `saved` was recorded."""
        return split(self._run(self._stages.both, saved, v), self._size)

    def pull_s(self, saved: Saved, v: Vector) -> Vector:
        """(dF/ds)'v alone."""
        return self._run(self._stages.pull_s, saved, v)

    def pull_x(self, saved: Saved, v: Vector) -> Vector:
        """(dF/dx)'v alone."""
        return self._run(self._stages.pull_x, saved, v)

    def fits(self, batch: Any) -> bool:
        """Whether a batch differs from the traced one in the numbers of its tensors at most."""
        return flattened(batch)[1] == self._batch

    def _known_at(self, stage: Stage, s: Vector) -> Vector:
        with torch.no_grad():
            return stage(self._constants | dict(zip(self._stages.s, s, strict=True)))

    def _run(self, stage: Stage, saved: Saved, v: Vector) -> Vector:
        with torch.no_grad():
            return stage(saved | dict(zip(self._stages.v, v, strict=True)))


class Stage:
    """The part of a graph that can be done at one stage, as a function of what is known before."""

    def __init__(
        self, whole: fx.GraphModule, level: dict[fx.Node, int], rank: int, wanted: Sequence[fx.Node]
    ) -> None:
        needed: set[fx.Node] = set()
        todo = list(wanted)
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                if level[node] >= rank:  # or postponed, and wanted here, too
                    todo.extend(node.all_input_nodes)
        order = [node for node in whole.graph.nodes if node in needed]
        outside = [n for n in order if n.op != "get_attr" and level[n] < rank]
        self.needs = [*outside, *(n for n in order if n.op == "placeholder" and level[n] == rank)]
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in self.needs}
        for node in order:
            if node not in copies:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output([copies[node] for node in wanted])
        self.code = fx.GraphModule(whole, graph)
        self._function = self.code.forward

    def __call__(self, env: Saved) -> Vector:
        return self._function(*[env[node] for node in self.needs])


def _joint(
    function: Function,
    rest: Rest,
    x: Vector,
    s: Vector,
    batch: Vector,
    decompositions: Decompositions | None,
) -> tuple[fx.GraphModule, int]:
    """The graph of (scalar, F, (dF/ds)'v, (dF/dx)'v) as a function of x, batch, s, v."""
    from torch.fx.experimental.proxy_tensor import make_fx

    count = 0

    def joint(*given: Tensor) -> Vector:
        nonlocal count
        parts = [list(given[i : i + c]) for i, c in _spans((len(x), len(batch), len(s), len(s)))]

        def own(s: Vector, x: Vector) -> tuple[list[Tensor], Tensor]:
            scalar, found = function(x, s, rest.filled(parts[1]))
            return list(found), scalar

        both: Any = torch.func.vjp(own, parts[2], parts[0], has_aux=True)
        found, pull, scalar = both
        count = len(found)
        along_s, along_x = pull(parts[3])
        return [scalar, *found, *along_s, *along_x]

    given = [p.detach() for p in (*x, *batch, *s, *s)]
    try:
        pure = torch.func.functionalize(joint, remove="mutations")
        graph = make_fx(pure, dict(decompositions or {}))(*given)
    except RuntimeError as error:
        raise InputError(
            f"the lower loss cannot be traced ({error}); use engine=autograd."
        ) from None
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                raise InputError(_untraceable(f"changes a tensor in place ({node.target})"))
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise InputError(_untraceable(f"draws random numbers ({node.target})"))
    return graph, count


def _untraceable(what: str) -> str:
    return f"the lower loss cannot be traced: it {what}; use engine=autograd."


def _lifted(whole: fx.GraphModule, level: dict[fx.Node, int]) -> Saved:
    """Make the tensors that a graph reads inputs of it, and what they are."""
    found: Saved = {}
    for node in list(whole.graph.nodes):
        value = getattr(whole, node.target) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            with whole.graph.inserting_before(next(iter(whole.graph.nodes))):
                new = whole.graph.placeholder(str(node.target))
            found[new], level[new] = value, 0
            node.replace_all_uses_with(new)
            whole.graph.erase_node(node)
    return found


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    (end,) = (node for node in graph.nodes if node.op == "output")
    return list(end.args[0])  # type: ignore[arg-type]


def split(tensors: Vector, at: int) -> tuple[Vector, Vector]:
    """Two parts of a list; a negative place counts from the end."""
    at = at if at > 0 else len(tensors) + at
    return tensors[:at], tensors[at:]


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Start and length of consecutive parts."""
    return [(sum(counts[:i]), count) for i, count in enumerate(counts)]


@dataclass(frozen=True)
class Rest:
    """A batch without the numbers of its tensors."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    def filled(self, tensors: Vector) -> Any:
        given = iter(tensors)
        own = [next(given) if isinstance(leaf, _Place) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(own, self.spec)


@dataclass(frozen=True)
class _Place:
    """Where a tensor of this kind belongs."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def flattened(batch: Any) -> tuple[Vector, Rest]:
    leaves, spec = pytree.tree_flatten(batch)
    marks = (_Place(p.shape, p.dtype, p.device) if isinstance(p, Tensor) else p for p in leaves)
    return [p for p in leaves if isinstance(p, Tensor)], Rest(spec, tuple(marks))
