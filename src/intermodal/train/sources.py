"""What the loop asks of its sources before it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.loader import DataError


def refuse_cut(source: Any, problems: Sequence[tuple[str, str]], most: float) -> None:
    """Raises DataError: more than this share of the files of a source were not read to their end.

    They are found before the first sample is read, and say nothing of how many samples are lost: so files are counted against files.
    A problem within a file (a line of a folder's metadata) is no cut file: the sample that it leaves without a caption is a reject.
    """
    files = {str(file) for file in getattr(within(source), "files", ())}
    cut = [(key, reason) for key, reason in problems if key in files]
    if len(cut) > most * len(files):
        raise DataError(
            f"{source.name}: {len(cut)} of {len(files)} files cannot be read to their end, more than data.max_reject_share={most}: "
            f"fetch them again, or raise it; the last: {cut[-1][0]}: {cut[-1][1]}"
        )


def within(source: Any) -> Any:
    """The source that conversations are made from, or the source itself."""
    return getattr(source, "source", None) or getattr(source, "scenes", source)
