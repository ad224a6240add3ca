"""Values: a tensor, a nest of tensors, or an `nn.Module`, and what can be done with each alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree  # private name, used by transformers and torch.func too

Value: TypeAlias = Any
"""A tensor, any nest of dicts, lists and tuples of tensors, or an `nn.Module`."""


class Part(nn.Module, ABC):
    """A module that computes with all of `whole` and trains a part, of which its twins have others.

    Its parameters are those of the part alone.
    """

    whole: nn.Module

    @abstractmethod
    def twin(self, name: str) -> Part:
        """The part of that name, made equal to this one."""


def leaves(value: Value) -> list[Tensor]:
    """The tensors of a value, in a fixed order; the parameters of a module.

    >>> [t.shape[0] for t in leaves({"a": torch.zeros(2), "b": [torch.zeros(3)]})]
    [2, 3]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return pytree.tree_leaves(value)


def named_leaves(value: Value) -> dict[str, Tensor]:
    """The tensors of a value by name: parameter names of a module, key paths of a tree.

    >>> list(named_leaves({"a": torch.zeros(2)}))
    ["['a']"]
    """
    if isinstance(value, nn.Module):
        return dict(value.named_parameters())
    pairs, _ = pytree.tree_flatten_with_path(value)
    return {pytree.keystr(path) or "value": leaf for path, leaf in pairs}


def snapshot(value: Value) -> list[Tensor]:
    """Detached copies of the leaves of a value."""
    return [leaf.detach().clone() for leaf in leaves(value)]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of tensors in one vector.

    >>> flatten([torch.zeros(2), torch.ones(1, 2)])
    tensor([0., 0., 1., 1.])
    """
    return torch.cat([tensor.flatten() for tensor in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The entries of a vector as tensors like these, of their shapes, types and devices.

    >>> unflatten(torch.arange(3.0), [torch.zeros(1), torch.zeros(2, 1)])[1].tolist()
    [[1.0], [2.0]]
    """
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(t.shape).to(t) for part, t in zip(parts, like, strict=True)]


def map_leaves(function: Callable[[Tensor], Tensor], value: Value) -> Value:
    """The same tree with `function` applied to each tensor; not for modules.

    >>> map_leaves(lambda t: 2 * t, [torch.ones(1)])
    [tensor([2.])]
    """
    return pytree.tree_map(function, value)


def with_leaves(
    function: Callable[..., Tensor], value: Value, tensors: list[Tensor], *rest: Any
) -> Any:
    """function(value, *rest) with the leaves of `value` replaced by `tensors`, differentiably.

    >>> one = torch.ones(2)
    >>> with_leaves(lambda v: v["a"].sum(), {"a": one}, [3 * one])
    tensor(6.)
    """
    if isinstance(value, nn.Module):
        names = [f"value.{name}" for name in named_leaves(value)]
        given = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(_Call(function, value), given, rest)
    _, shape = pytree.tree_flatten(value)
    return function(pytree.tree_unflatten(tensors, shape), *rest)


def clone(value: Value, shared: Sequence[str] = ()) -> Value:
    """A copy of a value; for a tree, detached leaves that require gradients.

    Args:
        value: The tree or module.
        shared: Paths of submodules that the copy uses too; all else is independent.
    """
    if isinstance(value, nn.Module):
        return _clone_module(value, shared)
    return map_leaves(lambda t: t.detach().clone().requires_grad_(), value)


def twin(value: Value, name: str, shared: Sequence[str] = ()) -> Value:
    """A copy that moves by itself: the part of that name, where the value is part of a whole.

    Args:
        value: The tree, module or part.
        name: Of the part.
        shared: As in `clone`.
    """
    return value.twin(name) if isinstance(value, Part) else clone(value, shared)


def dtypes(value: Value) -> set[torch.dtype]:
    """The types of all numbers that a value computes with, whether they move or not.

    >>> dtypes([torch.zeros(1)])
    {torch.float32}
    """
    own = value.whole if isinstance(value, Part) else value
    return {leaf.dtype for leaf in leaves(own) if leaf.is_floating_point()}


FIRST = 64
"""Entries of a leaf that tell it from others."""


def first_entries(leaf: Tensor) -> Tensor:
    """The first `FIRST` entries of a leaf in float64."""
    return leaf.detach().flatten()[:FIRST].double()


def digest(value: Value) -> str:
    """What tells one value from another: shapes, types and the first entries of every leaf."""
    outline = vars(value).get("outline") if isinstance(value, nn.Module) else None
    parts = []
    for name, leaf in named_leaves(value).items():
        first = outline.first(leaf) if outline and leaf.is_meta else first_entries(leaf)
        parts.append(f"{name} {leaf.dtype} {tuple(leaf.shape)} {first.tolist()}")
    return "\n".join(parts)


def structure_faults(name: str, value: Value) -> list[str]:
    """Why a value cannot be a variable, as sentences: it must hold finite floating-point tensors.

    >>> structure_faults("x0", [1.0])
    ['x0[0] must be a tensor, got float 1.0.']
    """
    own = named_leaves(value)
    faults = []
    if not own:
        faults.append(
            f"{name} holds no tensor, got {type(value).__name__}; give a tensor, a nest of "
            "tensors or a module."
        )
    for key, leaf in own.items():
        where = name if key == "value" else f"{name}{key if key[0] == '[' else '.' + key}"
        if not isinstance(leaf, Tensor):
            faults.append(f"{where} must be a tensor, got {type(leaf).__name__} {leaf!r:.40}.")
        elif is_lazy(leaf):
            faults.append(f"{where} has no shape yet; call the module once before.")
        elif leaf.is_meta:
            faults.append(f"{where} is on the meta device, without numbers; make it on another.")
        elif leaf.numel() == 0:
            faults.append(f"{where} has no entries, shape {tuple(leaf.shape)}; leave it out.")
        elif not leaf.is_floating_point():
            fix = "torch.view_as_real" if leaf.is_complex() else ".double()"
            faults.append(f"{where} must be floating point, got {leaf.dtype}; use {fix}.")
        elif not bool(leaf.detach().isfinite().all()):
            faults.append(f"{where} is not finite; choose a finite start.")
    if not faults and isinstance(value, nn.Module) and not isinstance(value, Part):
        fixed = [f"{name}.{key}" for key, leaf in own.items() if not leaf.requires_grad]
        if fixed:
            more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
            faults.append(
                f"{', '.join(fixed[:3])}{more} must require gradients, for all parameters of a "
                "module are trained; make a buffer of what shall stay as it is."
            )
    if not faults and not isinstance(value, nn.Module):
        for what in ("dtype", "device"):
            kinds = sorted({str(getattr(leaf, what)) for leaf in own.values()})
            if len(kinds) > 1:
                faults.append(f"{name} must have one {what}, got {', '.join(kinds)}.")
    return faults


def shape_faults(name: str, value: Value, like: Value) -> list[str]:
    """Why a value cannot stand where `like` does, as sentences: names and shapes must be the same.

    >>> shape_faults("x", torch.zeros(3), torch.zeros(()))
    ["x must be shaped as the problem's start, value (), got value (3,)."]
    """
    own, other = (
        {k: tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for k, p in pairs.items()}
        for pairs in (named_leaves(value), named_leaves(like))
    )
    if own == other:
        return []
    came, due = (
        ", ".join(f"{k} {shape}" for k, shape in pairs.items() if against.get(k) != shape)
        for pairs, against in ((own, other), (other, own))
    )
    return [f"{name} must be shaped as the problem's start, {due or 'less'}, got {came or 'less'}."]


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered from the processes, which must call this together.

    Of a parameter that ZeRO-3 shards a copy, where the module was made to compute.
    """
    if hasattr(tensor, "ds_id"):
        return _gathered(tensor)
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_empty(leaf: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without content, cut up as the leaf is, or whole on the CPU."""
    if leaf is None or not is_sharded(leaf):
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.empty_like(leaf.detach(), dtype=dtype)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, told without importing that package."""
    return hasattr(tensor, "to_local")


def size_bytes(tensors: list[Tensor]) -> int:
    """Bytes of storage that the tensors' elements take in this process."""
    return sum(t.numel() * t.element_size() for t in map(local, tensors))


def dot(a: Value, b: Value) -> Tensor:
    """Inner product of two values of one structure, summed in float32 or wider.

    >>> dot([torch.ones(2)], [torch.full((2,), 3.0)])
    tensor(6.)
    """
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    parts = [
        torch.linalg.vecdot(_wide(local(p)).flatten(), _wide(local(q)).flatten()) for p, q in pairs
    ]
    return _over_shards(_column(parts).sum() if parts[1:] else parts[0], pairs[0][0])


def norm(value: Value) -> float:
    """The Euclidean norm of a value, summed in float32 or wider.

    >>> norm([torch.tensor([3.0]), torch.tensor([4.0])])
    5.0
    """
    own = leaves(value)
    parts = [torch.linalg.vector_norm(_wide(local(p.detach()))) for p in own]
    size = torch.linalg.vector_norm(_column(parts)) if parts[1:] else parts[0]
    return float(_over_shards(size.square(), own[0]).sqrt() if is_sharded(own[0]) else size)


class _Call(nn.Module):
    """A function of a module, as a module that `torch.func.functional_call` can substitute in."""

    def __init__(self, function: Callable[..., Any], value: nn.Module) -> None:
        super().__init__()
        self.function, self.value = function, value

    def forward(self, *rest: Any) -> Any:
        return self.function(self.value, *rest)


def _column(numbers: list[Tensor]) -> Tensor:
    """Numbers of leaves that may lie on several devices, on that of the first."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def _over_shards(number: Tensor, of: Tensor) -> Tensor:
    """The sum of a number over the processes that hold the shards of a tensor."""
    if is_sharded(of):
        from torch.distributed import all_reduce

        mesh: Any = of.device_mesh  # type: ignore[attr-defined]
        for i, placement in enumerate(of.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                all_reduce(number, group=mesh.get_group(i))
    return number


def _gathered(parameter: Any) -> Tensor:
    with import_module("deepspeed").zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _clone_module(module: nn.Module, shared: Sequence[str]) -> nn.Module:
    from copy import deepcopy

    memo: dict[int, Any] = {id(part): part for part in map(module.get_submodule, shared)}
    kept = {id(p) for part in memo.values() for p in part.parameters()}
    twin = deepcopy(module, memo)
    for parameter in twin.parameters():
        if id(parameter) not in kept:
            parameter.grad = None
    return twin
