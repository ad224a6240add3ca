"""What a run has computed already, kept line by line so that an interruption loses little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Values by key in a file of JSON Lines; without a file it forgets with the process.

    A line is written as soon as its value is there. A last line cut short by a crash is passed
    over, and its value computed again.

    >>> journal = Journal()
    >>> journal.keep({"a": 1}, lambda: [2.0]), journal.keep({"a": 1}, lambda: [3.0])
    ([2.0], [2.0])
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path and path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
                self._values[_written(row["key"])] = row["value"]
            except (ValueError, KeyError, TypeError):
                continue
        self._torn = bool(lines) and not lines[-1].endswith(b"\n")

    def __contains__(self, key: dict[str, Any]) -> bool:
        return _written(key) in self._values

    def keep(self, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The value of a key: the one that was kept, else what `compute` returns, which is kept.

        Args:
            key: Everything that the value depends on; JSON, like the value.
            compute: Called if there is no such value.
        """
        name = _written(key)
        if name not in self._values:
            value = compute()
            if self.path:
                with self.path.open("a", encoding="utf-8") as file:
                    start = "\n" if self._torn else ""
                    file.write(start + json.dumps({"key": key, "value": value}) + "\n")
                self._torn = False
            self._values[name] = value
        return self._values[name]


def _written(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
