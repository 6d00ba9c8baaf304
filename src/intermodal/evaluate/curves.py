"""What a run of conversations logged, as one figure: losses of words and of pictures' codes, and what tells of its stability."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

PANELS = {
    "loss": "loss a token",
    "loss_text": "loss of words",
    "loss_image": "loss of codes",
    "entropy": "entropy, nats",
    "log_z": "log Z",
    "score_norm": "norm of a token's scores",
    "attention_score": "largest score in attention",
    "gradient_norm": "norm of the gradient",
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
