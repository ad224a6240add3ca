"""Modules without numbers, and where these are: engines read only what they hold of them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import processes
from bilevel.tree import FIRST, first_entries, is_sharded, local


class Outline(ABC):
    """Where the numbers are of a module whose parameters are on the meta device.

    `attach` leaves it at the module as the attribute `outline`, for an engine to take. Parameters
    are known by the names that they have now, whatever is put around their modules later.
    """

    def __init__(self, module: nn.Module) -> None:
        self.held = dict(module.named_parameters())  # kept, so that no other gets the id of one
        self.names = {id(p): name for name, p in self.held.items()}

    @abstractmethod
    def first(self, leaf: Tensor) -> Tensor:
        """The `tree.first_entries` of a parameter of the module."""

    @abstractmethod
    def read(self, wanted: Mapping[str, Tensor]) -> None:
        """Overwrite tensors by name, sharded or whole; all processes must call this together."""


class Files(Outline):
    """Numbers in safetensors files, of which every process reads what it holds.

    Args:
        module: On the meta device but for its buffers.
        places: The file of each of its parameters and saved buffers, which have their names there.
    """

    def __init__(self, module: nn.Module, places: Mapping[str, Path]) -> None:
        super().__init__(module)
        self.places = places

    def first(self, leaf: Tensor) -> Tensor:
        name = self.names[id(leaf)]
        with _opened(self.places[name]) as file:
            width = leaf[:1].numel() if leaf.dim() else 1
            rows = slice(0, -(-FIRST // max(1, width)))
            part = file.get_slice(name)[rows] if leaf.dim() else file.get_tensor(name)
            return first_entries(part.to(leaf.dtype))

    def read(self, wanted: Mapping[str, Tensor]) -> None:
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.places[name], []).append(name)
        for path, names in by_file.items():
            with _opened(path) as file:
                for name in names:
                    _read_part(file, name, wanted[name])


class Sent(Outline):
    """Numbers that the main process has, and sends one parameter after the other.

    Args:
        module: On the meta device but for its buffers.
        source: The same with its numbers, on the main process alone; what is sent is gone there.

    Raises:
        InputError: On every process, if the two have other parameters.
    """

    def __init__(self, module: nn.Module, source: nn.Module | None) -> None:
        super().__init__(module)
        self.source = source
        told = json.loads(processes.on_main(self._heads))
        own = {name: list(p.shape) for name, p in self.held.items()}
        if own != {name: shape for name, (shape, _) in told.items()}:
            raise processes.ProcessError(
                f"the files of {type(module).__name__} hold other parameters than its config.json "
                "describes, so it cannot be shared out; save it again with save_pretrained."
            )
        self.heads: dict[str, list[float]] = {name: head for name, (_, head) in told.items()}

    def first(self, leaf: Tensor) -> Tensor:
        return torch.tensor(self.heads[self.names[id(leaf)]], dtype=torch.float64)

    def read(self, wanted: Mapping[str, Tensor]) -> None:
        from torch.distributed.tensor import distribute_tensor

        source = dict(self.source.named_parameters()) if self.source else {}
        source |= dict(self.source.named_buffers()) if self.source else {}
        for name, held in wanted.items():
            own = source.get(name)
            whole = torch.empty(held.shape, dtype=held.dtype) if own is None else own.detach()
            if is_sharded(held):
                cut: Any = held
                part = distribute_tensor(whole, cut.device_mesh, cut.placements)
                local(held).copy_(part.to_local())
            else:
                held.copy_(processes.sent(whole))
            if own is not None:
                own.data = own.new_empty(0)

    def _heads(self) -> str:
        assert self.source is not None
        own = self.source.named_parameters()
        return json.dumps({n: (list(p.shape), first_entries(p).tolist()) for n, p in own})


def attach(module: nn.Module, outline: Outline) -> nn.Module:
    """The module with its outline, and with the buffers that are saved with it read."""
    saved = module.state_dict().keys()
    outline.read({name: b for name, b in module.named_buffers() if name in saved})
    vars(module)["outline"] = outline
    return module


def detach(module: nn.Module) -> Outline | None:
    """The outline of a module, which it loses; None if it has none."""
    return vars(module).pop("outline", None)


def blueprint(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters take no memory; its buffers are copies."""
    from copy import deepcopy

    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    return deepcopy(module, memo)


@contextmanager
def stood_in(module: nn.Module) -> Iterator[None]:
    """Within the block parameters on the meta device have numbers, which take next to no memory.

    Entry [i, j] of a matrix is r[i + j], r random with variance 1 / columns, so that what a model
    computes has about the size of what it is given. What trains is decided as in the block.
    """
    draw = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    places = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner.named_parameters(recurse=False)
        if p.is_meta
    ]
    for owner, name, p in places:
        if id(p) not in made:
            entries = torch.randn(sum(p.shape) + 1, generator=draw)
            entries /= sqrt(p.shape[-1]) if p.dim() > 1 else 1.0
            view = entries.to(p.dtype).as_strided(p.shape, [1] * p.dim())
            made[id(p)] = nn.Parameter(view, p.requires_grad)
        setattr(owner, name, made[id(p)])
    try:
        yield
    finally:
        for owner, name, p in places:
            p.requires_grad_(made[id(p)].requires_grad)
            setattr(owner, name, p)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise processes.ProcessError(
            f"{path} cannot be read by process {processes.rank()} ({error}); all processes need "
            "the same files under the same path."
        ) from None


@torch.no_grad()
def _read_part(file: Any, name: str, held: Tensor) -> None:
    """Overwrite a tensor with the part of the file's that it stands for."""
    own = local(held)
    if not own.numel():
        return
    if not is_sharded(held):
        own.copy_(file.get_tensor(name))
        return
    cut: Any = held
    (chunk,) = cut.__create_chunk_list__()  # as torch.distributed.checkpoint asks for it
    ends = zip(chunk.offsets, chunk.sizes, strict=True)
    own.copy_(file.get_slice(name)[tuple(slice(a, a + size) for a, size in ends)])
