"""What the logs of a run's stages tell of its training."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.recipe import StagedRecipe

WINDOW, FEWEST = 20, 10
"""How many logged losses tell what is usual: at most, and at least."""
SPREADS = 6.0
"""A logged loss is a spike where it lies so many spreads above the median of the losses before it. The spread is 1.48 times their median
distance from that median, which is the standard deviation of a normal distribution. A batch's loss is a mean over few tokens, and how much
it varies is the data's: a fixed multiple of the median would count that."""
LEAST_RISE = 0.05
"""And at least by this share of the median: where losses hardly vary, a rise that nobody would see is no spike."""
SPIKES_ARE = (
    f"A loss spike is a logged loss, or several in a row, more than {SPREADS:g} spreads (1.48 times the median distance from the median) "
    f"and more than {100 * LEAST_RISE:.0f} % above the median of the {WINDOW} before it"
)
CURVE = ("loss", "score_norm", "highest_score", "gradient_norm")


def logged(recipe: StagedRecipe, run: Path) -> dict[str, Any]:
    """Measures from the logs of every stage of a run, of what it trained and went back from too.

    Each stage is looked at by itself where it must be: the next one begins with other data, so with another loss, and may have another
    batch. `curve` goes on over the stages, its steps counted from the run's beginning, without what was gone back from.
    """
    curve: list[dict[str, Any]] = []
    speeds: list[float] = []
    every: list[dict[str, Any]] = []
    count = rollbacks = before = 0
    for number, stage in enumerate(recipe.stages, 1):
        folder = run / f"{number}-{stage.name}"
        rows, lost = _rows(folder / "metrics.jsonl"), _attempts(_rows(folder / "metrics-lost.jsonl"))
        curve += [{"step": before + row["step"], **{key: row.get(key) for key in CURVE}} for row in rows]
        speeds += [row["samples_per_second"] * row["tokens"] / stage.data.batch for row in rows]
        count += spikes([row["loss"] for row in rows])
        for attempt in lost:
            kept = [row["loss"] for row in rows if row["step"] < attempt[0]["step"]]
            count += spikes([*kept, *(row["loss"] for row in attempt)]) - spikes(kept)
        every += [*rows, *(row for attempt in lost for row in attempt)]
        rollbacks += len(_rows(folder / "rollbacks.jsonl"))
        before += stage.train.steps
    return {
        "tokens_per_second": statistics.median(speeds),
        "curve": curve,
        "loss_spikes": count,
        "rollbacks": rollbacks,
        "highest_score": _highest(every, "highest_score"),
        "highest_norm": _highest(every, "score_norm"),
    }


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _attempts(lost: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The lines that each roll-back has lost: a run that goes on from an earlier step logs smaller numbers again."""
    out: list[list[dict[str, Any]]] = []
    for row in lost:
        if not out or row["step"] <= out[-1][-1]["step"]:
            out.append([])
        out[-1].append(row)
    return out


def _highest(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    return max((row[key] for row in rows if row.get(key) is not None), default=None)


def spikes(losses: Sequence[float]) -> int:
    """How many times the losses stand out from those before them (`SPIKES_ARE`); losses in a row that do are one spike."""
    high = [_stands_out(loss, losses[max(0, at - WINDOW) : at]) for at, loss in enumerate(losses)]
    return sum(now and not before for before, now in zip([False, *high], high, strict=False))


def _stands_out(loss: float, before: Sequence[float]) -> bool:
    if len(before) < FEWEST:
        return False
    middle = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in before)
    return loss > middle + max(SPREADS * spread, LEAST_RISE * abs(middle))
