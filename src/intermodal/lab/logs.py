"""What the logs of a run's stages tell of its training."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.recipe import StagedRecipe

SPIKE = 1.3
"""A logged loss this many times the median of the ten before it counts as a spike."""
CURVE = ("loss", "score_norm", "highest_score", "gradient_norm")


def logged(recipe: StagedRecipe, run: Path) -> dict[str, Any]:
    """Measures from the `metrics.jsonl` of every stage of a run.

    Each stage is looked at by itself where it must be: the next one begins with other data, so with another loss, and may have another
    batch. `curve` goes on over the stages, its steps counted from the run's beginning.
    """
    curve: list[dict[str, Any]] = []
    speeds: list[float] = []
    count = before = 0
    for number, stage in enumerate(recipe.stages, 1):
        lines = (run / f"{number}-{stage.name}" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        curve += [{"step": before + row["step"], **{key: row.get(key) for key in CURVE}} for row in rows]
        speeds += [row["samples_per_second"] * row["tokens"] / stage.data.batch for row in rows]
        count += spikes([row["loss"] for row in rows])
        before += stage.train.steps
    return {
        "tokens_per_second": statistics.median(speeds),
        "curve": curve,
        "loss_spikes": count,
        "highest_score": max(point["highest_score"] or 0.0 for point in curve),
    }


def spikes(losses: Sequence[float]) -> int:
    """How many losses stand out from the ten before them."""
    return sum(loss > SPIKE * statistics.median(losses[at - 10 : at]) for at, loss in enumerate(losses) if at >= 10)
