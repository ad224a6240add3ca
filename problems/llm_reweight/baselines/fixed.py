"""Weights that need no training: equal shares, shares by size, and shares that are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel import InputError
from bilevel.problems.llm_reweight.baselines.lab import Lab
from bilevel.problems.llm_reweight.baselines.method import Found, Method, normalized


@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """w_s = 1 / n."""

    def search(self, lab: Lab) -> Found:
        return Found(weights=lab.uniform)


@dataclass(frozen=True, kw_only=True)
class Temperature(Method):
    """w_s ~ rows_s^power: 0 is uniform, 1 is what shuffling all files together gives.

    Reference: Arivazhagan et al., Massively Multilingual Neural Machine Translation in the Wild,
    2019 (1907.05019), section 4.2, with power = 1 / T.
    """

    power: float = 0.5
    """Of the number of rows."""

    def search(self, lab: Lab) -> Found:
        sizes = [float(len(rows)) ** self.power for rows in lab.problem.rows]
        return Found(weights=normalized(lab.names, sizes))


@dataclass(frozen=True, kw_only=True)
class Given(Method):
    """Weights from a file: a run's weights.json or .yaml, or any JSON or YAML of name: number."""

    file: str = ""
    """The file."""

    def search(self, lab: Lab) -> Found:
        weights = read_weights(Path(self.file), lab.names)
        return Found(weights=normalized(lab.names, [weights.get(n, 0.0) for n in lab.names]))

    def check(self, names: list[str]) -> list[str]:
        if not self.file:
            return ["given needs the file of the weights: given:file=PATH."]
        try:
            read_weights(Path(self.file), names)
        except InputError as error:
            return list(error.faults)
        return []


def read_weights(path: Path, names: list[str]) -> dict[str, float]:
    """The weights of a file, by name; a source it does not name has none.

    Raises:
        InputError: If it cannot be read, names other sources, or holds no weights.
    """
    import yaml

    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise InputError(
            f"the weights {path} cannot be read ({reason}); expected an existing file, such as a "
            "run's weights.json."
        ) from None
    found = _mapping(body)
    if not found:
        raise InputError(
            f"{path} holds no weights; expected a run's weights.json or .yaml, or name: number."
        )
    other = [name for name in found if name not in names]
    faults = []
    if other:
        faults.append(
            f"{path} has weights for {', '.join(other[:5])}, but the sources are "
            f"{', '.join(names[:20])}; use the same names."
        )
    bad = [f"{name}: {value!r}" for name, value in found.items() if not _is_weight(value)]
    if bad:
        faults.append(f"{path}: expected numbers of at least 0, got {', '.join(bad[:5])}.")
    elif not sum(found.values()) > 0:
        faults.append(f"{path}: all weights are 0; expected one above it.")
    if faults:
        raise InputError(faults)
    return {name: float(value) for name, value in found.items()}


def _mapping(body: Any) -> dict[str, Any]:
    if isinstance(body, dict) and isinstance(body.get("sources"), list):  # weights.json of a run
        rows = [row for row in body["sources"] if isinstance(row, dict)]
        return {str(row["name"]): row["weight"] for row in rows if {"name", "weight"} <= row.keys()}
    return {str(k): v for k, v in body.items()} if isinstance(body, dict) else {}


def _is_weight(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")
