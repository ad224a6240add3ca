"""A differentiable function traced once and run in stages, without autograd between its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree  # private name, used by transformers and torch.func too

from bilevel.errors import InputError

Vector: TypeAlias = list[Tensor]
Function: TypeAlias = Callable[[Vector, Vector, Any], tuple[Tensor, Sequence[Tensor]]]
"""(x, s, batch) -> a scalar and tensors, differentiable functions of x and s."""

Saved: TypeAlias = dict[fx.Node, Tensor]
"""Tensors of a trace by their place in it."""

aten: Any = torch.ops.aten
SKINNY = 4  # rows for each column from which a product is faster transposed


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

    def __init__(self, function: Function, x: Vector, s: Vector, batch: Any) -> None:
        flat, self._batch = _flattened(batch)
        self._sizes = (len(x), len(s), len(flat))
        graph, outputs = _joint(function, self._batch, x, s, flat)
        level = _levels(graph.graph, self._counts())
        _rewrite(graph.graph, level)
        out = _outputs(graph.graph)
        scalar, found = out[0], out[1 : 1 + outputs]
        pulled = out[1 + outputs :]
        values = _Stage(graph, level, 1, found)
        both = _Stage(graph, level, 2, pulled)
        self._saved = [node for node in both.needs if level[node] == 1]
        record = _Stage(graph, level, 1, [*found, *self._saved])
        number = _Stage(graph, level, 1, [scalar])
        given = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._given = [given[i : i + c] for i, c in _spans(self._counts())]
        early = {
            n: None
            for stage in (values, record, number, both)
            for n in stage.needs
            if level[n] == 0
        }
        self._known = [node for node in early if node.op != "placeholder"]
        self._first = _Stage(graph, level, 0, self._known)
        self._values, self._record, self._number, self._both = values, record, number, both
        self._pull_s = _Stage(graph, level, 2, pulled[: len(s)])
        self._pull_x = _Stage(graph, level, 2, pulled[len(s) :])
        self._outputs = outputs
        self._constants: Saved = {}

    def at(self, x: Vector, batch: Any) -> None:
        """Take x and the batch that all following calls are at."""
        flat, _ = _flattened(batch)
        given = [p.detach() for p in (*x, *flat)]
        with torch.no_grad():
            env = dict(zip(self._given[0], given, strict=True))
            self._constants = env | dict(zip(self._known, self._first(env), strict=True))

    def scalar(self, s: Vector) -> Tensor:
        """The scalar at s."""
        return self._known_at(self._number, s)[0]

    def values(self, s: Vector) -> Vector:
        """F(x, s)."""
        return self._known_at(self._values, s)

    def record(self, s: Vector) -> tuple[Vector, Saved]:
        """F(x, s), and what `pull` needs."""
        found = self._known_at(self._record, s)
        saved = dict(zip(self._saved, found[self._outputs :], strict=True))
        return found[: self._outputs], self._constants | saved

    def pull(self, saved: Saved, v: Vector) -> tuple[Vector, Vector]:
        """(dF/ds)'v and (dF/dx)'v where `saved` was recorded."""
        found = self._run(self._both, saved, v)
        return found[: self._sizes[1]], found[self._sizes[1] :]

    def pull_s(self, saved: Saved, v: Vector) -> Vector:
        """(dF/ds)'v alone."""
        return self._run(self._pull_s, saved, v)

    def pull_x(self, saved: Saved, v: Vector) -> Vector:
        """(dF/dx)'v alone."""
        return self._run(self._pull_x, saved, v)

    def fits(self, batch: Any) -> bool:
        """Whether a batch differs from the traced one in the numbers of its tensors at most."""
        return _flattened(batch)[1] == self._batch

    def _known_at(self, stage: _Stage, s: Vector) -> Vector:
        with torch.no_grad():
            return stage(self._constants | dict(zip(self._given[1], s, strict=True)))

    def _run(self, stage: _Stage, saved: Saved, v: Vector) -> Vector:
        with torch.no_grad():
            return stage(saved | dict(zip(self._given[2], v, strict=True)))

    def _counts(self) -> tuple[int, int, int]:
        """Inputs of each stage."""
        x, s, batch = self._sizes
        return x + batch, s, s


class _Stage:
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
                if level[node] == rank:
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
    function: Function, rest: _Rest, x: Vector, s: Vector, batch: Vector
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
        graph = make_fx(torch.func.functionalize(joint, remove="mutations"))(*given)
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


def _levels(graph: fx.Graph, counts: Sequence[int]) -> dict[fx.Node, int]:
    """The stage that each node belongs to."""
    given = iter([rank for rank, count in enumerate(counts) for _ in range(count)])
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            level[node] = next(given)
        elif node.target in FILLED:
            level[node] = 0
        elif node.op != "output":
            level[node] = max((level[n] for n in node.all_input_nodes), default=0)
    return level


FILLED = {aten.ones_like.default: 1.0, aten.zeros_like.default: 0.0}
"""Kernels that read only the shape of their input, and what they fill it with."""


def _rewrite(graph: fx.Graph, level: dict[fx.Node, int]) -> None:
    """Leave out what does nothing without autograd, and transpose tall narrow products.

    Transposed results have other strides, so a view of them may have to copy; a graph that says
    strides in numbers keeps them.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.target is aten.as_strided.default for node in nodes):
        nodes = [node for node in nodes if node.target in FILLED]
    for node in nodes:
        with graph.inserting_before(node):
            new = _replaced(graph, node, level)
        if new is not None:
            new.meta = new.meta or node.meta
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _replaced(graph: fx.Graph, node: fx.Node, level: dict[fx.Node, int]) -> fx.Node | None:
    """What takes the place of a node, None where it stays."""

    def call(target: Any, *arguments: Any, rank: int = level[node], **options: Any) -> fx.Node:
        new = graph.call_function(target, arguments, options)
        level[new] = rank
        return new

    def flipped(of: fx.Node) -> fx.Node:
        twice = of.target is aten.t.default
        return of.args[0] if twice else call(aten.t.default, of, rank=level[of])  # type: ignore

    match node.target, node.args:
        case (aten.detach.default, (fx.Node() as same,)):
            return same
        case (aten.pow.Tensor_Scalar | aten.mul.Tensor | aten.mul.Scalar, (fx.Node() as same, 1.0)):
            return same if _alike(node, same) else None
        case (aten.view.default | aten._unsafe_view.default, (of, size)):
            return call(aten.reshape.default, of, size)
        case (aten.add.Tensor, (fx.Node() as same, fx.Node() as zero)) if _zero(zero):
            return same if _alike(node, same) else None
        case (aten.t.default, (fx.Node(target=aten.t.default) as turned,)):
            return turned.args[0]  # type: ignore[return-value]
        case (target, _) if target in FILLED:
            like = node.meta["val"]
            kind = {"dtype": like.dtype, "device": like.device}
            return call(aten.full.default, list(like.shape), FILLED[target], rank=0, **kind)
        case (aten.mm.default, (fx.Node() as a, fx.Node() as b)) if _tall(node):
            at = flipped(a)
            if level[a] == 0:  # once for all: most of the gain
                at = call(aten.clone.default, at, rank=0, memory_format=torch.contiguous_format)
            return flipped(call(aten.mm.default, flipped(b), at))
        case (aten._log_softmax.default, (fx.Node() as a, 1 | -1, False)) if _tall(node):
            return flipped(call(node.target, flipped(a), 0, False))
        case (
            aten._log_softmax_backward_data.default,
            (fx.Node() as a, fx.Node() as b, 1 | -1, kind),
        ) if _tall(node):
            return flipped(call(node.target, flipped(a), flipped(b), 0, kind))
    return None


def _tall(node: fx.Node) -> bool:
    shape = node.meta["val"].shape
    return len(shape) == 2 and shape[0] >= SKINNY * shape[1]


def _zero(node: fx.Node) -> bool:
    return node.target is aten.full.default and bool(node.args[1] == 0.0)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    if "val" not in b.meta:
        return False
    one, other = a.meta["val"], b.meta["val"]
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    (end,) = (node for node in graph.nodes if node.op == "output")
    return list(end.args[0])  # type: ignore[arg-type]


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Start and length of consecutive parts."""
    return [(sum(counts[:i]), count) for i, count in enumerate(counts)]


@dataclass(frozen=True)
class _Rest:
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


def _flattened(batch: Any) -> tuple[Vector, _Rest]:
    leaves, spec = pytree.tree_flatten(batch)
    marks = (_Place(p.shape, p.dtype, p.device) if isinstance(p, Tensor) else p for p in leaves)
    return [p for p in leaves if isinstance(p, Tensor)], _Rest(spec, tuple(marks))
