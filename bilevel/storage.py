"""Live storage counted while code runs, on fake tensors: what a step would need, without memory."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

READS = {torch.bool: True, torch.int64: 1}
"""What a fake number reads as in Python: true, 1, or 1.0."""


class LiveStorage(TorchDispatchMode):
    """Within the block, the bytes of all fake storages that are alive, and their peak.

    Storages are counted when an operation returns a tensor on them for the first time, and until
    they are freed; those made under `on_host` by themselves. An operation on real tensors alone
    stays real, and so does counting up, since models look at positions. Reading a fake number gives
    1; fake tensors of one shape are equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.host = 0
        """Bytes alive in host memory, which are in neither of the others."""
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        solid = bool(tensors) or func.overloadpacket is torch.ops.aten.arange or _draws(kwargs)
        if solid and not any(isinstance(t, FakeTensor) for t in tensors):
            with real():
                return func(*args, **kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            return READS.get(tensors[0].dtype, 1.0)
        if func is torch.ops.aten.equal.default:
            return tensors[0].shape == tensors[1].shape
        out = func(*args, **kwargs or {})
        for tensor in [] if func.is_view else tree_leaves(out):  # a view of a copied fake tensor
            if isinstance(tensor, FakeTensor):  # has a storage of its own, which is not real
                self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        if _HOST.get():
            self.host += storage.nbytes()
        else:
            self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, _HOST.get())

    def reset(self) -> None:
        """Start a new peak at what is alive."""
        self.peak = self.live

    def _free(self, key: int, host: bool) -> None:
        size = self._seen.pop(key)
        if host:
            self.host -= size
        else:
            self.live -= size


@contextmanager
def fake() -> Iterator[LiveStorage]:
    """Within the block tensors have shapes but no memory; gives the count of what they take."""
    with warnings.catch_warnings():
        # deepcopy asks a fake parameter for its address, torch 2.13 warns of it and answers 0
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with FakeTensorMode(allow_non_fake_inputs=True), LiveStorage() as storage:
            yield storage


@contextmanager
def on_host() -> Iterator[None]:
    """Within the block new tensors lie in host memory, for who counts; fake ones have no device."""
    token = _HOST.set(True)
    try:
        yield
    finally:
        _HOST.reset(token)


_HOST = ContextVar("host", default=False)

real = _disable_current_modes
"""Within the block of this, tensors are real again."""


def _draws(kwargs: dict[str, Any] | None) -> bool:
    """Whether an operation draws from a generator of its own, which only real tensors can."""
    return bool(kwargs) and isinstance(kwargs.get("generator"), torch.Generator)
