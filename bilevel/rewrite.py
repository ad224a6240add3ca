"""What a traced graph leaves out, does once, and turns round, and at which stage it does what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten: Any = torch.ops.aten
SKINNY = 4  # rows for each column from which a product is faster transposed


def levels(graph: fx.Graph, counts: Sequence[int]) -> dict[fx.Node, int]:
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


def rewrite(graph: fx.Graph, level: dict[fx.Node, int]) -> None:
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
        case (aten.permute.default, (fx.Node() as turned, [1, 0])):
            return flipped(turned)
        case (aten.pow.Tensor_Scalar | aten.mul.Tensor | aten.mul.Scalar, (fx.Node() as same, 1.0)):
            return same if _alike(node, same) else None
        case (aten.pow.Tensor_Scalar, (fx.Node() as same, 0.0)):
            like = node.meta["val"]
            kind = {"dtype": like.dtype, "device": like.device}
            return call(aten.full.default, list(like.shape), 1.0, rank=0, **kind)
        case (aten.mul.Tensor, (fx.Node() as same, fx.Node() as one)) if _filled(one, 1.0):
            return same if _alike(node, same) else None
        case (
            aten.exp.default,
            (fx.Node(target=aten.sub.Tensor, args=(shifted, fx.Node() as log)),),
        ) if log.target is aten.log.default and _below_zero(shifted):
            return call(aten.div.Tensor, call(aten.exp.default, shifted), log.args[0])
        case (aten.view.default | aten._unsafe_view.default, (of, size)):
            return call(aten.reshape.default, of, size)
        case (aten.add.Tensor, (fx.Node() as same, fx.Node() as zero)) if _filled(zero, 0.0):
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


def _filled(node: fx.Node, number: float) -> bool:
    return node.target is aten.full.default and bool(node.args[1] == number)


def _below_zero(node: Any) -> bool:
    """Whether it is z less its own largest entries."""
    match node:
        case fx.Node(
            target=aten.sub.Tensor, args=(z, fx.Node(target=aten.amax.default, args=largest))
        ):
            return largest[0] is z
    return False


def _alike(a: fx.Node, b: fx.Node) -> bool:
    if "val" not in b.meta:
        return False
    one, other = a.meta["val"], b.meta["val"]
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def merge(graph: fx.Graph) -> None:
    """Do once what is done twice."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op in ("call_function", "get_attr"):
            same = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
    graph.eliminate_dead_code()


def postpone(saved: list[fx.Node], level: dict[fx.Node, int]) -> None:
    """Leave sums and products of what is saved anyway, or given, to the products with v."""
    for node in saved:
        early = [n for n in node.all_input_nodes if level[n] == 1]
        if node.target in CHEAP and all(n in saved or n.op == "placeholder" for n in early):
            level[node] = 2


CHEAP = {aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.mul.Tensor, aten.mul.Scalar}
