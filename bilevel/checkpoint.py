"""Saving and loading a run's state: safetensors for tensors, JSON for the rest, never pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bilevel.errors import InputError

SCHEMA = "bilevel.checkpoint/1"


def save(
    folder: Path, state: dict[str, Any], *, fingerprint: dict[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step-N` atomically, N = state["step"], and keep the last `keep` of them.

    Args:
        folder: The run's checkpoint folder.
        state: Nested dicts and lists of tensors, numbers, strings, booleans and None.
        fingerprint: What a run must share with this one to continue from it.
        keep: How many checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, tensors)
    final = folder / f"step-{state['step']:08d}"
    for stale in folder.glob(".partial-*"):  # of a run that was killed here
        shutil.rmtree(stale, ignore_errors=True)
    partial = folder / ".partial-new"
    partial.mkdir()
    save_file(tensors, partial / "tensors.safetensors")
    body = {"schema": SCHEMA, "fingerprint": fingerprint, "state": tree}
    (partial / "state.json").write_text(json.dumps(body), encoding="utf-8")
    for name in ("tensors.safetensors", "state.json"):
        _sync(partial / name)
    if final.exists():
        final.rename(folder / ".partial-old")
    partial.rename(final)
    _sync(folder)
    shutil.rmtree(folder / ".partial-old", ignore_errors=True)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole: whoever reads it sees the old text or the new one."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, None if there is none."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load(path: Path, *, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The state saved at `path`.

    Raises:
        InputError: If the checkpoint is damaged, or of another configuration; says which keys.
    """
    remedy = "delete that folder to go on from the one before it, or use resume=never."
    try:
        body = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "tensors.safetensors")
        state = _decode(body["state"], tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"the checkpoint {path} is damaged ({error}); {remedy}") from None
    if body.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {body.get('schema')!r}, expected {SCHEMA!r}.")
    other = differences(body["fingerprint"], fingerprint)
    if other:
        raise InputError(
            f"the checkpoint {path} belongs to another configuration ({'; '.join(other)}); "
            "use the saved settings or another folder."
        )
    return state


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


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_encode(v, tensors) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers and strings, got {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, body),) = value.items()
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
