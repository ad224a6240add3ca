"""Tables and lines of Markdown that hold text from anywhere."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence

MARKS = re.compile(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)")
"""What means something to Markdown; an underscore within a word does not."""


def escaped(text: str) -> str:
    """A text on one line, shown as it is, within a table and outside.

    >>> print(escaped("a|b <i>_c_</i> d_e"))
    a\\|b &lt;i&gt;\\_c\\_&lt;/i&gt; d_e
    """
    return MARKS.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, every cell escaped.

    >>> print("\\n".join(table(["name", "loss"], [["a|b", "0.5"]])))
    | name | loss |
    | --- | --- |
    | a\\|b | 0.5 |
    """
    for number, cells in enumerate((heads, *rows)):
        yield f"| {' | '.join(map(escaped, cells))} |"
        if number == 0:
            yield "|" + " --- |" * len(heads)
