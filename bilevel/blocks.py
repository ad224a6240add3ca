"""The parts of a decoder: its stack of equal blocks, the embedding, the head, and the rest."""

from __future__ import annotations

from torch import nn

from bilevel.errors import InputError
from bilevel.tree import Value


def parameter_groups(value: Value) -> dict[str, list]:
    """The parameter names of a decoder: `blocks` (a list for each), `embedding`, `head`, `norms`.

    The stack of blocks is the `nn.ModuleList` of at least two equal-typed members that holds the
    most parameters. Tied embeddings count as embedding.

    Raises:
        InputError: If the value is not a module, or has no such stack; lists what was found.
    """
    if not isinstance(value, nn.Module):
        raise InputError(
            "memory=lisa needs a lower variable that is an nn.Module with a stack of blocks, "
            f"got {type(value).__name__}; use memory=full."
        )
    path, stack = _stack(value)
    blocks = [[f"{path}.{i}.{n}" for n, _ in b.named_parameters()] for i, b in enumerate(stack)]
    in_blocks = {name for block in blocks for name in block}
    rest = [n for n, _ in value.named_parameters() if n not in in_blocks]
    embedding = _names_of(value, "get_input_embeddings", rest)
    head = [n for n in _names_of(value, "get_output_embeddings", rest) if n not in embedding]
    norms = [n for n in rest if n not in embedding and n not in head]
    return {"blocks": blocks, "embedding": embedding, "head": head, "norms": norms}


def block_paths(value: Value) -> list[str]:
    """Where the blocks of a decoder stand, as `get_submodule` takes it; none without a stack."""
    if not isinstance(value, nn.Module):
        return []
    try:
        path, stack = _stack(value)
    except InputError:
        return []
    return [f"{path}.{i}" for i in range(len(stack))]


def end_paths(module: nn.Module) -> dict[str, str]:
    """Where the "embedding" and the "head" of a decoder stand, as `get_submodule` takes it."""
    names = {id(part): name for name, part in module.named_modules()}
    getters = {"embedding": "get_input_embeddings", "head": "get_output_embeddings"}
    found = {part: getattr(module, getter, None) for part, getter in getters.items()}
    parts = {part: get() for part, get in found.items() if callable(get)}
    return {part: names[id(own)] for part, own in parts.items() if id(own) in names}


def units(module: nn.Module) -> list[nn.Module]:
    """The parts that are gathered and freed by themselves when a module is sharded.

    Each block, the embedding, the head, and every other module that owns a parameter; only what is
    tied between two of these stays with the whole. None where there is no stack of blocks.
    """
    try:
        _, stack = _stack(module)
    except InputError:
        return []
    in_blocks = {id(p) for block in stack for p in block.parameters()}
    owners: dict[int, list[nn.Module]] = {}
    for part in module.modules():
        for p in part.parameters(recurse=False):
            owners.setdefault(id(p), []).append(part)
    rest = [
        part
        for part in module.modules()
        if (own := [id(p) for p in part.parameters(recurse=False)])
        and not in_blocks.intersection(own)
        and all(len(owners[p]) == 1 for p in own)
        and part is not module
    ]
    return [*stack, *reversed(rest)]  # what lies inside another comes first


def falls_apart(module: nn.Module) -> bool:
    """Whether every parameter is in exactly one unit, so that none is tied between two of them."""
    inside = [id(p) for unit in units(module) for p in unit.parameters()]
    return len(inside) == len(set(inside)) and {id(p) for p in module.parameters()} == set(inside)


def _stack(module: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) > 1
    }
    stacks = {n: c for n, c in lists.items() if len({type(b) for b in c}) == 1 and _numel(c[0]) > 0}
    if not stacks:
        found = ", ".join(f"{n} ({len(c)} members)" for n, c in lists.items()) or "none"
        raise InputError(
            "memory=lisa needs a stack of equal blocks (an nn.ModuleList), "
            f"but {type(module).__name__} has no such; lists found: {found}. Use memory=full."
        )
    return max(stacks.items(), key=lambda item: _numel(item[1]))


def _names_of(module: nn.Module, getter: str, candidates: list[str]) -> list[str]:
    get = getattr(module, getter, None)
    part = get() if callable(get) else None
    if not isinstance(part, nn.Module):
        return []
    wanted = {id(p) for p in part.parameters()}
    named = dict(module.named_parameters())
    return [n for n in candidates if id(named[n]) in wanted]


def _numel(module: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())  # ZeRO-3 shards
