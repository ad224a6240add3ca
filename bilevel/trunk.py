"""The frozen bottom of a decoder, passed once for all copies of y that see the same tokens."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # private name, used by transformers and torch.func too

from bilevel.blocks import block_paths, end_paths
from bilevel.tree import size_bytes
from bilevel.variable import Variable

log = logging.getLogger("bilevel")


class Trunk:
    """Keeps what the lowest blocks make of a batch, and lets other copies of y go on from there.

        h = block_{k-1}(... block_0(embedding(ids)) ...)

    is the same for all copies where nothing in it ever trains and all started alike. So the copy
    that comes first computes it, without a graph, and the others get the very same numbers. Only
    passes that shall be differentiated count. Tokens are compared by value. What no other copy asks
    for is dropped when the copy that computed it starts its next sweep, after a step of its own.

    The blocks themselves are still called, so that engines gather and free them as ever. A copy
    computes for itself, as if there were no trunk, where something in it trains, where arguments
    are not whole numbers, and where blocks tell others more than their output (caches, states of
    other blocks).

    Args:
        depth: How many blocks it has.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._copies: dict[str, _Copy] = {}
        self._kept: dict[Any, _Kept] = {}

    def adopt(self, variables: Sequence[Variable]) -> None:
        """Serve these copies of y from now on; what is hooked to them leaves with the trunk."""
        if variables[0].name in self._copies or len(variables) < 2:
            return
        me = weakref.ref(self)
        for variable in variables:
            name, module = variable.name, variable.value
            blocks = [module.get_submodule(path) for path in block_paths(module)[: self.depth]]
            below = [module.get_submodule(p) for k, p in end_paths(module).items() if k != "head"]
            self._copies[name] = _Copy(module=module, blocks=blocks, below=below)

            def enter(called: nn.Module, given: Any, named: Any, name: str = name) -> None:
                trunk = me()
                if trunk and trunk._copies[name].module is called:  # not what is copied from it
                    trunk._enter(name, given, named)

            def leave(called: nn.Module, *_: Any, name: str = name) -> None:
                trunk = me()
                if trunk and trunk._copies[name].module is called:
                    trunk._copies[name].patched.close()

            def stepped(*_: Any, name: str = name) -> None:
                if trunk := me():
                    trunk._copies[name].stepped = True

            for handle in (
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, always_call=True),
                variable.optimizer.register_step_post_hook(stepped),
            ):
                weakref.finalize(self, handle.remove)
        log.info(
            "embedding and lowest blocks (%d) never train: one pass serves all copies of y",
            self.depth,
        )

    @property
    def bytes(self) -> int:
        """What is kept now."""
        found = [t for kept in self._kept.values() for t in pytree.tree_leaves(kept.output)]
        return size_bytes([t for t in found if isinstance(t, Tensor)])

    def _enter(self, name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Prepare the blocks of a copy for one pass: to keep what they give, or to give it."""
        copy = self._copies[name]
        parts = [*copy.below, *copy.blocks]
        trains = any(p.requires_grad for part in parts for p in part.parameters())
        key = _key(given, named) if torch.is_grad_enabled() and not trains else None
        if key is None:
            return
        if copy.stepped:
            self._kept = {k: kept for k, kept in self._kept.items() if kept.owner != name}
            copy.stepped = False
        kept = self._kept.get(key)
        if kept is None:
            last = copy.blocks[-1]
            copy.patch(last, partial(self._keep, last.forward, name, key))
            return
        kept.awaited.discard(name)
        if not kept.awaited:
            del self._kept[key]
        for block in copy.blocks:
            copy.patch(block, lambda *_, **__: kept.output)

    def _keep(self, forward: Any, name: str, key: Any, *given: Any, **named: Any) -> Any:
        """The forward of the last block, and a note of what it gave."""
        output = forward(*given, **named)
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        plain = all(map(_is_plain, [*given, *named.values()]))
        if plain and not any(t.requires_grad for t in tensors):
            others = self._copies.keys() - {name}
            self._kept[key] = _Kept(output=output, owner=name, awaited=set(others))
        return output


@dataclass(kw_only=True)
class _Copy:
    module: nn.Module
    blocks: list[nn.Module]
    """Those of the trunk, lowest first."""
    below: list[nn.Module]
    """The embedding."""
    patched: ExitStack = field(default_factory=ExitStack)
    """Gives the blocks their own forward back."""
    stepped: bool = True
    """Whether its optimizer has stepped since its last pass."""

    def patch(self, block: nn.Module, forward: Any) -> None:
        """Let a block compute something else, between its hooks as ever, until `patched` closes."""
        own = vars(block).get("forward")  # hooks of accelerate put one there
        undo = partial(vars(block).pop, "forward")
        self.patched.callback(partial(setattr, block, "forward", own) if own else undo)
        block.forward = forward


@dataclass(kw_only=True)
class _Kept:
    output: Any
    owner: str
    awaited: set[str]
    """Copies that have not used it."""


def _key(given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What tells the arguments of two passes apart, by value; None where that cannot be told."""
    found = []
    for name, value in [*enumerate(given), *sorted(named.items())]:
        if isinstance(value, Tensor) and not value.is_floating_point():
            own = value.detach().cpu().contiguous()
            found.append((name, own.dtype, tuple(own.shape), own.numpy().tobytes()))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((name, value))
        else:
            return None
    return tuple(found)


def _is_plain(value: Any) -> bool:
    """Whether an argument of a block is one that the block cannot write to."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)
