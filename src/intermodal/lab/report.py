"""The comparison's report: one table, four plots, pictures that were drawn, and what the numbers do and do not show."""

from __future__ import annotations

import html
import io
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluate.report import STYLE, inline
from .sides import Settings
from .words import ALL, Rows, beside, findings, head, kinds, limits, percent, same_kinds, title

COLOURS = ("#2b5fb3", "#c05a1e")
SHOWN = 12
NONE = "none"
"""In a cell: the side has no such measure."""


def write(out: Path, results: Rows, settings: Settings, overrides: Sequence[Sequence[str]] = ((), ())) -> Path:
    """Write `report.json`, `report.md` and `report.html`; returns the page.

    Args:
        overrides: settings of each side that differ from its recipe.
    """
    lines, said = table(results), findings(results)
    top, not_shown = head(results, settings, overrides), limits(results, settings)
    (out / "report.json").write_text(json.dumps({"table": lines, "findings": said, "runs": results}, indent=1) + "\n")
    plots = {name: _figure(results, draw) for name, draw in PLOTS.items()}
    for name, data in plots.items():
        (out / f"{name}.png").write_bytes(data)
    names = list(results)
    rows = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    rows += [f"| {label} | {' | '.join(values)} |" for label, values in lines]
    pictures = "\n\n".join(f"![{name.replace('_', ' ')}]({name}.png)" for name in plots)
    parts = [f"# {title(results)}", top, "\n".join(rows), "\n".join(f"- {line}" for line in said), not_shown, pictures]
    (out / "report.md").write_text("\n\n".join(parts) + "\n")
    cells = "".join(
        f"<tr><td>{html.escape(label)}</td>{''.join(f'<td>{html.escape(value)}</td>' for value in values)}</tr>"
        for label, values in lines
    )
    figures = "".join(f'<p><img src="{inline(data)}" alt="{name.replace("_", " ")}"></p>' for name, data in plots.items())
    page = (
        f"<!doctype html><meta charset='utf-8'><title>intermodal compare</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title(results))}</h1>"
        f"<p>{html.escape(top)}</p><table><tr><th></th>{''.join(f'<th>{html.escape(n)}</th>' for n in names)}</tr>{cells}</table>"
        f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in said)}</ul><p>{html.escape(not_shown)}</p>{figures}"
        f"{_drawings(out, results)}\n"
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def spread(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    """ "43 % (40 to 47)", or "none" where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    mean, low, high = form(statistics.mean(known)), form(min(known)), form(max(known))
    return mean if low == high else f"{mean} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"


def _score_size(norm: float | None, row: dict[str, Any]) -> float | None:
    """Root mean square of a token's scores from their norm, which grows with the number of words that are scored."""
    return norm / row["vocabulary"] ** 0.5 if norm is not None else None


def _encoder(results: Rows) -> str:
    """The kind of model that ranked captions for drawings; SigLIP where none did."""
    rows = (row for rows in results.values() for row in rows if row.get("drawn"))
    return next((row["drawn"]["ranked_by"] for row in rows if row["drawn"]["ranked_by"]), "SigLIP")


def table(results: Rows) -> list[tuple[str, list[str]]]:
    """(label, a value for each side) of every measure that one of them has, with its spread over seeds."""
    out: list[tuple[str, list[str]]] = []

    def add(label: str, read: Callable[[dict[str, Any]], float | None], form: Callable[[float], str]) -> None:
        out.append((label, [spread([read(row) for row in rows], form) for rows in results.values()]))

    def drawn(row: dict[str, Any], column: str, key: str) -> float | None:
        return row["drawn"][column][key] if row.get("drawn") else None

    for kind in kinds(results):
        most = beside("most common answer", results, lambda row, kind=kind: row["questions_majority"].get(kind))
        label = kind if kind != ALL or same_kinds(results) else "all that a side is asked"
        add(f"questions, {label}{most}", lambda row, kind=kind: row["questions"].get(kind), percent)
    add("captions, exactly right", lambda row: row["captions"]["exact"], percent)
    add("captions, named things that are named", lambda row: row["captions"]["things"], percent)
    for height in sorted({height for rows in results.values() for row in rows for height in row["signs"]}, key=int):
        guess = beside("a guess", results, lambda row, height=height: row["signs_guess"].get(height))
        add(f"signs of {height} px read exactly{guess}", lambda row, height=height: row["signs"].get(height), percent)
    add("kept by the eyes: linear read-out, dB", lambda row: row["kept"]["linear"], lambda value: f"{value:.1f}")
    add("kept by the eyes: own decoder, dB", lambda row: row["kept"]["decoder"], lambda value: f"{value:.1f}")
    add("tokens an image", lambda row: row["tokens_per_image"], lambda value: f"{value:.0f}")
    add("parameters, millions (decoder)", lambda row: row["decoder_parameters"] / 1e6, lambda value: f"{value:.2f}")
    add("training seconds, eyes and decoder", lambda row: row["seconds"], lambda value: f"{value:.0f}")
    add("seconds with measuring", lambda row: row["seconds_with_measuring"], lambda value: f"{value:.0f}")
    add("decoder steps", lambda row: row["steps"], lambda value: f"{value:.0f}")
    add("training tokens/s (decoder)", lambda row: row["tokens_per_second"], lambda value: f"{value:,.0f}")
    add("peak memory, MB", lambda row: row["peak_megabytes"], lambda value: f"{value:.0f}")
    add("loss spikes (as defined below)", lambda row: row["loss_spikes"], lambda value: f"{value:.1f}")
    if any(row["rollbacks"] for rows in results.values() for row in rows):
        add("times that training went back to a checkpoint", lambda row: row["rollbacks"], lambda value: f"{value:.1f}")
    add("highest score (logit)", lambda row: row["highest_score"], lambda value: f"{value:.1f}")
    add(
        "highest size of a token's scores (root mean square, mean of a step)",
        lambda row: _score_size(row["highest_norm"], row),
        lambda value: f"{value:.2f}",
    )
    for column, label in (
        ("drawn", "drawn for its caption"),
        ("drawn for another caption", "for another caption"),
        ("noise", "random codes"),
    ):
        add(f"named things found, {label}", lambda row, column=column: drawn(row, column, "things"), percent)
    add("named things found, real scenes", lambda row: drawn(row, "real", "things"), percent)
    add("pairs found and placed right, drawn", lambda row: drawn(row, "drawn", "place"), percent)
    add("pairs found and placed right, real scenes", lambda row: drawn(row, "real", "place"), percent)
    encoder = _encoder(results)
    add(f"own caption among {encoder}'s first five, drawn", lambda row: drawn(row, "drawn", "ranked"), percent)
    add(f"own caption among {encoder}'s first five, real scenes", lambda row: drawn(row, "real", "ranked"), percent)
    return [(label, values) for label, values in out if any(value != NONE for value in values)]


def _answers(axis: Any, results: Rows) -> None:
    asked = kinds(results, everywhere=True)
    for number, (name, rows) in enumerate(results.items()):
        means = [statistics.mean(row["questions"][kind] for row in rows) for kind in asked]
        low = [mean - min(row["questions"][kind] for row in rows) for mean, kind in zip(means, asked, strict=True)]
        high = [max(row["questions"][kind] for row in rows) - mean for mean, kind in zip(means, asked, strict=True)]
        places = [at + 0.38 * number for at in range(len(asked))]
        axis.bar(places, means, 0.36, yerr=[low, high], color=COLOURS[number % 2], label=name, capsize=3)
        for place, kind in zip(places, asked, strict=True):  # of each side: they may be asked about other scenes
            most = [row["questions_majority"][kind] for row in rows if kind in row["questions_majority"]]
            if most:
                axis.plot([place - 0.19, place + 0.19], [most[0]] * 2, color="#555", linestyle=":")
    axis.set_xticks([at + 0.19 for at in range(len(asked))], asked)
    axis.set_title("questions, exactly right (dotted: most common answer)", fontsize=10)
    _of_one(axis)


def _signs(axis: Any, results: Rows) -> None:
    for number, (name, rows) in enumerate(results.items()):
        heights = list(rows[0]["signs"])
        if not heights:
            continue
        values = [[row["signs"][height] for row in rows] for height in heights]
        places = [int(height) for height in heights]
        axis.plot(places, [statistics.mean(found) for found in values], color=COLOURS[number % 2], marker="o", label=name)
        axis.fill_between(places, [min(f) for f in values], [max(f) for f in values], color=COLOURS[number % 2], alpha=0.15)
    axis.set_xlabel("size of the font, pixels", fontsize=9)
    axis.set_title("signs read exactly", fontsize=10)
    _of_one(axis)


def _of_one(axis: Any) -> None:
    """Shares: always from none to all, so that plots of two comparisons can be held side by side."""
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(lambda value, _: percent(value))


def _curve(
    key: str, heading: str, value: Callable[[float, dict[str, Any]], float | None] = lambda logged, row: logged
) -> Callable[[Any, Rows], None]:
    def draw(axis: Any, results: Rows) -> None:
        for number, (name, rows) in enumerate(results.items()):
            for at, row in enumerate(rows):
                points = [(point["step"], value(point[key], row)) for point in row["curve"] if point.get(key) is not None]
                label, mark = name if not at else None, "o" if len(points) == 1 else None  # a single point has no line
                axis.plot(*zip(*points, strict=True), color=COLOURS[number % 2], alpha=0.7, label=label, linewidth=1, marker=mark)
        axis.set_xlabel("step", fontsize=9)
        axis.locator_params(axis="x", integer=True)
        axis.set_title(heading, fontsize=10)

    return draw


PLOTS: dict[str, Callable[[Any, Rows], None]] = {
    "answers": _answers,
    "signs": _signs,
    "losses": _curve("loss", "loss a supervised token"),
    "score_norms": _curve("score_norm", "size of a token's scores (root mean square)", _score_size),
}


def _figure(results: Rows, draw: Callable[[Any, Rows], None]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 3), layout="constrained")
    draw(axis, results)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _drawings(out: Path, results: Rows) -> str:
    """Cards of what the first seed of each side that draws has drawn."""
    parts = []
    for name, rows in results.items():
        folder = out / f"{name}-seed{rows[0]['seed']}" / "drawn"
        if not (folder / "said.json").exists():
            continue
        said = json.loads((folder / "said.json").read_text())
        sheet, side, cards = Image.open(folder / "drawn.png"), said["side"], []
        for index, (caption, drew) in enumerate(zip(said["captions"][:SHOWN], said["drew"][:SHOWN], strict=True)):
            picture = sheet.crop((index * side, 0, (index + 1) * side, side))
            text = html.escape(caption if drew else f"{caption} (drew nothing)")
            cards.append(f'<div class=card><img src="{inline(picture)}" alt="{text}"><br>{text}</div>')
        heading = f"<h2>What {html.escape(name)} drew for captions never trained on</h2>"
        parts.append(f"{heading}<div class=grid>{''.join(cards)}</div>")
    return "".join(parts)
