"""The two errors of our own: wrong input, and numbers that are no longer finite."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """What the caller gave cannot be used; `faults` holds one sentence for each reason.

    The command line prints the faults and exits with 2. Each sentence says what was expected,
    what came and what to do.

    Args:
        faults: One sentence, or several when several things are wrong.

    >>> str(InputError(["a is missing.", "b must be positive, got b=-1."]))
    'a is missing.\\nb must be positive, got b=-1.'
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is not finite; the message says which, and on what data.

    A solver raises it inside a step, before it moves anything by such numbers; `solve` ends the run
    with `Status.NONFINITE` and this message.
    """
