"""The one error that users are meant to read: it says what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class LcSparkError(Exception):
    """Bad input, a bad setting or a machine that lacks something; printed without a stack trace."""


class RankError(RuntimeError):
    """What went wrong on one rank alone: it must end that rank, or the others wait for it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name nearest to word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
