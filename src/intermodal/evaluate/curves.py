"""What a run logged, as one figure: losses, and what tells of its stability or of its codebook."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "loss": "loss",
    "loss_text": "loss of words",
    "loss_image": "loss of codes",
    "entropy": "entropy, nats",
    "log_z": "log Z",
    "highest_score": "highest score",
    "score_norm": "norm of a token's scores",
    "attention_score": "largest score in attention",
    "gradient_norm": "norm of the gradient",
    "accuracy": "batch accuracy",
    "scale": "scale",
    "reconstruction_error": "reconstruction error",
    "psnr": "PSNR, dB",
    "codebook_use": "share of codes in use",
    "perplexity": "perplexity of the codes",
    "lr": "learning rate",
}
LOGARITHMIC = ("score_norm", "attention_score", "gradient_norm")
COLOURS = ("#2b5fb3", "#3a8f4d", "#c05a1e", "#7a4bb0")


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG with a panel for each value that any run logged.

    Args:
        runs: for each name the lines of its `metrics.jsonl`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {key: title for key, title in PANELS.items() if any(key in row for rows in runs.values() for row in rows)}
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(3.3 * across, 2.5 * down), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (key, title) in zip(axes.flat, shown.items(), strict=False):
        for number, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points, strict=True), label=name, color=COLOURS[number % len(COLOURS)], linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.set_yscale("log" if key in LOGARITHMIC else "linear")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    pyplot.close(figure)
    return buffer.getvalue()


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw_curves(run: Path) -> list[Path]:
    """Draw `curves.png` beside every `metrics.jsonl` of a run folder that has lines; returns the pictures' paths."""
    drawn = []
    for log in sorted([*run.glob("metrics.jsonl"), *run.glob("[0-9]*-*/metrics.jsonl")]):
        if rows := logged(log.parent):
            drawn.append(log.with_name("curves.png"))
            drawn[-1].write_bytes(curves({log.parent.name: rows}))
    return drawn
