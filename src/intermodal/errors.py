"""Errors that are the user's to mend. The command line prints them as one line; `--debug` shows where they came from. Any other error is
a fault of this library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IntermodalError(Exception):
    """Something in the input, the files or the settings is wrong; the message says what, where, and what to do."""


class InputError(IntermodalError, ValueError):
    """A value that a function cannot take; a ValueError too, for callers from Python."""


class CheckpointError(IntermodalError):
    """A checkpoint directory that cannot be read as it claims to be."""


class SampleError(IntermodalError):
    """One sample that cannot be used. Loaders count it, name it in `rejects.jsonl` and go on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint ", did you mean 'x'?" or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""
