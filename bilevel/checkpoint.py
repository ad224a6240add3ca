"""Saving and loading a run's state: safetensors for tensors, JSON for the rest, never pickle.

Where tensors are sharded every process writes its own part through torch.distributed.checkpoint,
and any number of processes reads what it needs of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from bilevel import processes
from bilevel.errors import InputError
from bilevel.tree import is_sharded, sharded_empty

SCHEMA = "bilevel.checkpoint/2"

DAMAGES = (OSError, ValueError, KeyError, TypeError, AssertionError, SafetensorError)
"""What readers raise for files that are not what they were."""

FILES = 16
"""Of each process, where tensors are sharded: the writer holds all of a file in memory twice."""

Like = Callable[[Sequence[Any], Sequence[int]], torch.Tensor | None]
"""From the keys that lead to a tensor of a state, and its shape, to a tensor that is cut up so."""


def save(
    folder: Path,
    state: dict[str, Any],
    *,
    fingerprint: dict[str, Any],
    keep: int = 2,
    main: bool = True,
) -> Path:
    """Write `folder/step-N` atomically, N = state["step"], and keep the last `keep` of them.

    Args:
        folder: The run's checkpoint folder.
        state: Nested dicts and lists of tensors, numbers, strings, booleans and None.
        fingerprint: What a run must share with this one to continue from it.
        keep: How many checkpoints stay.
        main: Whether this process writes what all hold alike; all must call this.

    Raises:
        OSError: If the folder cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, tensors)
    _separate(tensors)
    final = folder / f"step-{state['step']:08d}"
    partial = folder / ".partial-new"
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".partial-*"):  # of a run that was killed here
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
    if any(map(is_sharded, tensors.values())):
        _save_sharded(tensors, partial)
    elif main:
        _save_whole(tensors, partial / "tensors.safetensors")
    if not main:
        return final
    files = _digests(sorted(partial.iterdir()))
    body = {"schema": SCHEMA, "fingerprint": fingerprint, "files": files, "state": tree}
    (partial / "state.json").write_text(json.dumps(body), encoding="utf-8")
    for name in (*files, "state.json"):
        _sync(partial / name)
    if final.exists():
        final.rename(folder / ".partial-old")
    partial.rename(final)
    _sync(folder)
    shutil.rmtree(folder / ".partial-old", ignore_errors=True)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # holds the system's number in words alone
        code = re.search(r"\(os error (\d+)\)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole: whoever reads it sees the old text or the new one."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, None if there is none."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def step_of(path: Path | None) -> int:
    """The step that a checkpoint is of, 0 for none."""
    return int(path.name.partition("-")[2]) if path else 0


def load(
    path: Path, *, fingerprint: dict[str, Any], like: Like = lambda keys, shape: None
) -> dict[str, Any]:
    """The state saved at `path`.

    Args:
        path: A folder that `save` has made, with any number of processes.
        fingerprint: Of the run that is to go on.
        like: Tells how tensors are cut up in this run; by default none is.

    Raises:
        InputError: If the checkpoint is damaged, or of another configuration; says which keys.
    """
    with _told(path):
        body = json.loads((path / "state.json").read_text(encoding="utf-8"))
        schema, saved, files = body["schema"], body["fingerprint"], body["files"]
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}, expected {SCHEMA!r}.")
    if other := differences(saved, fingerprint):
        raise InputError(
            f"the checkpoint {path} belongs to another configuration ({'; '.join(other)}); "
            "use the saved settings or another folder."
        )
    with _told(path):
        _verify(path, files)
        return _decode(body["state"], _load_tensors(path, body["state"], like))


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each key whose value differs between two fingerprints, in words.

    >>> differences({"lr": 0.1, "batch": (1, 2)}, {"lr": 0.2, "batch": [1, 2]})
    ['lr: 0.1 there, 0.2 now']
    """
    a, b = (json.loads(json.dumps(f)) for f in (saved, now))
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
    return [f"{k}: {a.get(k)!r} there, {b.get(k)!r} now" for k in keys]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _save_sharded(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    dist.barrier()  # until the folder is there
    writer = HuggingFaceStorageWriter(
        path=str(folder), save_distributed=True, fqn_to_index_mapping=_file_numbers(tensors)
    )
    save_parts(dict(tensors), storage_writer=writer)
    dist.barrier()  # until all have written


def _file_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Which of the files of a process each tensor goes to, about evenly."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    total, before, found = max(1, sum(sizes.values())), 0, {}
    for name, size in sizes.items():
        found[name] = 1 + FILES * before // total
        before += size
    return found


def _load_tensors(path: Path, tree: Any, like: Like) -> dict[str, torch.Tensor]:
    """The tensors of a saved tree by name, each cut up as `like` has it."""
    targets = dict(_targets(tree, like, ()))
    whole = path / "tensors.safetensors"
    if whole.exists() and not any(map(is_sharded, targets.values())):
        return load_file(whole)
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant here
        reader = HuggingFaceStorageReader(str(path))
        load_parts(targets, storage_reader=reader, no_dist=not dist.is_initialized())
    return targets


def _targets(tree: Any, like: Like, keys: tuple[Any, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """An empty tensor for every tensor of a saved tree."""
    if isinstance(tree, list):
        for i, item in enumerate(tree):
            yield from _targets(item, like, (*keys, i))
    if not isinstance(tree, dict):
        return
    kind, body = next(iter(tree.items()))
    if kind == "tensor":
        shape, dtype = tree.get("shape", ()), getattr(torch, tree.get("dtype", "float32"))
        yield body, sharded_empty(like(keys, shape), shape, dtype)
    elif kind == "tuple":
        yield from _targets(body, like, keys)
    else:
        for key, item in body:
            yield from _targets(item, like, (*keys, key))


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Within the block, what readers raise is told as damage of the checkpoint at `path`."""
    try:
        yield
    except (*DAMAGES, CheckpointException) as error:
        raise InputError(
            f"the checkpoint {path} is damaged ({error}); delete that folder to go on from the one "
            "before it, or use resume=never."
        ) from None


def _verify(folder: Path, files: dict[str, str]) -> None:
    """Check the content of every file; each process reads a part of them.

    Raises:
        ValueError: On every process, if any file is not what was written.
    """
    together = dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    mine = sorted(files)[rank::count]
    missing = [name for name in mine if not (folder / name).is_file()]
    found = _digests([folder / name for name in mine if name not in missing])
    wrong = missing + [name for name, digest in found.items() if digest != files[name]]
    if wrong or (together and processes.total([len(wrong)])[0]):
        names = ", ".join(wrong) or "a file that another process read"
        raise ValueError(f"{names} is missing or not as it was written")


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of every file by name."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip([p.name for p in paths], pool.map(digest, paths), strict=True))


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        own = value.detach()
        tensors[name] = own if is_sharded(own) else own.cpu().contiguous()
        dtype = str(own.dtype).removeprefix("torch.")
        return {"tensor": name, "shape": list(own.shape), "dtype": dtype}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_encode(v, tensors) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers and strings, got {type(value).__name__}")


def _separate(tensors: dict[str, torch.Tensor]) -> None:
    """Copy those that share memory with another, or have only a part of it: the writer takes none.

    The others are written from where they are, since a copy of all would be as much again.
    """
    taken: set[int] = set()
    for name, own in tensors.items():
        if is_sharded(own):
            continue
        storage = own.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != own.numel() * own.element_size():
            tensors[name] = own.clone()
        taken.add(storage.data_ptr())


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    kind, body = next(iter(value.items()))
    if kind == "tensor":
        return tensors[body]
    if kind == "tuple":
        return tuple(_decode(v, tensors) for v in body)
    return {k: _decode(v, tensors) for k, v in body}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
