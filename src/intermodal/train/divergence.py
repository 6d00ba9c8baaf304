"""When a run has diverged: a logged value that is far from what it usually is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

ALARM = 3.0
"""A loss this many times the usual is told of, once, where a run does not roll back."""
STEADY, RECENT = 4, 20
"""How many logged values tell what is usual: at least, and at most."""


def usual(value: float, recent: Sequence[float], limit: float) -> float | None:
    """The median of the recent values, where `value` is more than `limit` times it; None where it is not, or where nothing is usual yet.

    A multiple of a median that is zero or less says nothing of how far away a value is. Where one of the recent values is, `value` may lie
    above the median by (limit - 1) times the largest magnitude among them, which is the same where all are equal.
    """
    if len(recent) < STEADY:
        return None
    middle = statistics.median(recent)
    if min(recent) > 0:
        return middle if value > limit * middle else None
    return middle if value > middle + (limit - 1) * max(abs(one) for one in recent) else None
