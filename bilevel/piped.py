"""Printing that outlives its reader: `... | head` ends the pipe, not the run; and its record."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def unbroken() -> Iterator[None]:
    """Within the block what is printed after the reader of a pipe has gone is lost, silently."""
    with (
        contextlib.redirect_stdout(_Stream(sys.stdout)),
        contextlib.redirect_stderr(_Stream(sys.stderr)),
    ):
        yield


@contextmanager
def recorded(record: Callable[[str], None]) -> Iterator[None]:
    """Within the block what is printed is handed to `record` too, by lines; of a bar its end."""
    with (
        contextlib.redirect_stdout(_Recorded(sys.stdout, record)),
        contextlib.redirect_stderr(_Recorded(sys.stderr, record)),
    ):
        yield


class _Recorded:
    """A text stream that hands on every whole line it writes."""

    def __init__(self, inner: Any, record: Callable[[str], None]) -> None:
        self.inner, self.record = inner, record
        self._rest = ""

    def write(self, text: str) -> int:
        written = self.inner.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        self._rest = self._rest[self._rest.rstrip("\r").rfind("\r") + 1 :]
        for line in lines:
            if shown := line.rstrip("\r").rpartition("\r")[2].rstrip():
                self.record(shown)
        return written

    def flush(self) -> None:
        self.inner.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Stream:
    """A text stream that writes nowhere from the first broken pipe on."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def write(self, text: str) -> int:
        try:
            return self.inner.write(text)
        except BrokenPipeError:
            return self._ended(text)

    def flush(self) -> None:
        try:
            self.inner.flush()
        except BrokenPipeError:
            self._ended("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _ended(self, text: str) -> int:
        """Lead the descriptor elsewhere: Python flushes it once more when it exits."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.inner.fileno())
        os.close(nowhere)
        return len(text)
