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

Rows = dict[str, list[dict[str, Any]]]
COLOURS = ("#2b5fb3", "#c05a1e")
SHOWN = 12
LIMITS = (
    "What this does not show. The models are a thousand times smaller than released ones, learn from scratch for minutes and see only "
    "emoji on white: which family is ahead here says nothing about which is ahead at scale. Equal compute means equal seconds on the same "
    "cores, data workers included, not equal numbers of floating-point operations; the native side spends a good part of it on drawing, "
    "which the other side cannot do at all. The tower was taught by captions and the codebook by pixels, so the eyes differ in what they "
    "were taught as well as in what they can hold. The linear read-out asks what a single token says of its own patch; what several tokens "
    "say together may be more."
)


def write(out: Path, results: Rows, settings: Any, overrides: Sequence[Sequence[str]] = ((), ())) -> Path:
    """Write `report.json`, `report.md` and `report.html`; returns the page.

    Args:
        overrides: settings of each side that differ from its recipe.
    """
    lines = table(results)
    said = findings(results)
    (out / "report.json").write_text(json.dumps({"table": lines, "findings": said, "runs": results}, indent=1) + "\n")
    plots = {name: _figure(results, draw) for name, draw in PLOTS.items()}
    for name, data in plots.items():
        (out / f"{name}.png").write_bytes(data)
    names = list(results)
    head = f"Means over {len(results[names[0]])} seeds (lowest to highest); {settings.seconds:.0f} s of training a run."
    head += "".join(f" {name} with {', '.join(changed)}." for name, changed in zip(names, overrides, strict=True) if changed)
    rows = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    rows += [f"| {label} | {' | '.join(values)} |" for label, values in lines]
    pictures = "\n\n".join(f"![{name.replace('_', ' ')}]({name}.png)" for name in plots)
    parts = [f"# {title(results)}", head, "\n".join(rows), "\n".join(f"- {line}" for line in said), LIMITS, pictures]
    (out / "report.md").write_text("\n\n".join(parts) + "\n")
    cells = "".join(
        f"<tr><td>{html.escape(label)}</td>{''.join(f'<td>{html.escape(value)}</td>' for value in values)}</tr>"
        for label, values in lines
    )
    figures = "".join(f'<p><img src="{inline(data)}" alt="{name}"></p>' for name, data in plots.items())
    page = (
        f"<!doctype html><meta charset='utf-8'><title>intermodal compare</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title(results))}</h1>"
        f"<p>{html.escape(head)}</p><table><tr><th></th>{''.join(f'<th>{html.escape(n)}</th>' for n in names)}</tr>{cells}</table>"
        f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in said)}</ul><p>{html.escape(LIMITS)}</p>{figures}"
        f"{_drawings(out, results)}\n"
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def spread(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    """ "43 % (40 to 47)", or "none" where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    mean, low, high = form(statistics.mean(known)), form(min(known)), form(max(known))
    return mean if low == high else f"{mean} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def title(results: Rows) -> str:
    return " against ".join(results).capitalize()


def kinds(results: Rows, everywhere: bool = False) -> list[str]:
    """Kinds of questions that any side was asked, or that every side was."""
    asked = [set(row["questions"]) for rows in results.values() for row in rows]
    found = dict.fromkeys(kind for rows in results.values() for row in rows for kind in row["questions"])
    return [kind for kind in found if not everywhere or all(kind in one for one in asked)]


def _majority(results: Rows, kind: str) -> float | None:
    shares = (row["questions_majority"].get(kind) for rows in results.values() for row in rows)
    return next((share for share in shares if share is not None), None)


def _highest_norm(row: dict[str, Any]) -> float | None:
    return max((point["score_norm"] for point in row["curve"] if point.get("score_norm") is not None), default=None)


def table(results: Rows) -> list[tuple[str, list[str]]]:
    """(label, a value for each side) of every measure, with its spread over seeds."""
    first = next(iter(results.values()))[0]
    out: list[tuple[str, list[str]]] = []

    def add(label: str, read: Callable[[dict[str, Any]], float | None], form: Callable[[float], str]) -> None:
        out.append((label, [spread([read(row) for row in rows], form) for rows in results.values()]))

    def drawn(row: dict[str, Any], column: str, key: str) -> float | None:
        return row["drawn"][column][key] if row.get("drawn") else None

    for kind in kinds(results):
        most = _majority(results, kind)
        beside = f" (most common answer {percent(most)})" if most is not None else ""
        add(f"questions, {kind}{beside}", lambda row, kind=kind: row["questions"].get(kind), percent)
    add("captions, exactly right", lambda row: row["captions"]["exact"], percent)
    add("captions, named things that are named", lambda row: row["captions"]["things"], percent)
    guess = percent(first["signs_guess"])
    for height in first["signs"]:
        add(f"signs of {height} px read exactly (a guess {guess})", lambda row, height=height: row["signs"].get(height), percent)
    add("kept by the eyes: linear read-out, dB", lambda row: row["kept"]["linear"], lambda value: f"{value:.1f}")
    add("kept by the eyes: own decoder, dB", lambda row: row["kept"]["decoder"], lambda value: f"{value:.1f}")
    add("tokens an image", lambda row: row["tokens_per_image"], lambda value: f"{value:.0f}")
    add("parameters, millions (decoder)", lambda row: row["decoder_parameters"] / 1e6, lambda value: f"{value:.2f}")
    add("training seconds, eyes and decoder", lambda row: row["seconds"], lambda value: f"{value:.0f}")
    add("seconds with measuring", lambda row: row["seconds_with_measuring"], lambda value: f"{value:.0f}")
    add("decoder steps", lambda row: row["steps"], lambda value: f"{value:.0f}")
    add("training tokens/s (decoder)", lambda row: row["tokens_per_second"], lambda value: f"{value:,.0f}")
    add("peak memory, MB", lambda row: row["peak_megabytes"], lambda value: f"{value:.0f}")
    add("loss spikes", lambda row: row["loss_spikes"], lambda value: f"{value:.1f}")
    add("highest score (logit)", lambda row: row["highest_score"], lambda value: f"{value:.1f}")
    add("highest norm of a token's scores", _highest_norm, lambda value: f"{value:.0f}")
    for column, label in (
        ("drawn", "drawn for its caption"),
        ("drawn for another caption", "for another caption"),
        ("noise", "random codes"),
    ):
        add(f"named things found, {label}", lambda row, column=column: drawn(row, column, "things"), percent)
    add("named things found, real scenes", lambda row: drawn(row, "real", "things"), percent)
    add("pairs found and placed right, drawn", lambda row: drawn(row, "drawn", "place"), percent)
    add("pairs found and placed right, real scenes", lambda row: drawn(row, "real", "place"), percent)
    add("own caption among SigLIP's first five, drawn", lambda row: drawn(row, "drawn", "siglip"), percent)
    add("own caption among SigLIP's first five, real scenes", lambda row: drawn(row, "real", "siglip"), percent)
    return out


def findings(results: Rows) -> list[str]:
    """Where one side is ahead with every seed, where they overlap, and what only one can do."""
    (first, ours), (second, theirs) = results.items()
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        **{f"questions, {kind}": (lambda row, kind=kind: row["questions"][kind]) for kind in kinds(results, everywhere=True)},
        "captions, exactly right": lambda row: row["captions"]["exact"],
        "signs of all heights": lambda row: statistics.mean(row["signs"].values()),
        "linear read-out of pixels": lambda row: row["kept"]["linear"],
        "training tokens/s": lambda row: row["tokens_per_second"],
    }
    ahead: dict[str, list[str]] = {first: [], second: [], "neither": []}
    for label, read in measures.items():
        a, b = [read(row) for row in ours], [read(row) for row in theirs]
        ahead[first if min(a) > max(b) else second if min(b) > max(a) else "neither"].append(label)
    out = [
        f"{name} is ahead with every seed: {'; '.join(labels)}." for name, labels in ahead.items() if labels and name != "neither"
    ]
    out += [f"The spreads of the seeds overlap: {'; '.join(ahead['neither'])}."] if ahead["neither"] else []
    for name, rows in results.items():
        drew = [row for row in rows if row.get("drawn")]
        if drew:
            own, other = (
                statistics.mean(row["drawn"][key]["things"] for row in drew) for key in ("drawn", "drawn for another caption")
            )
            out.append(
                f"{name} draws: the judge finds {percent(own)} of the named things, and {percent(other)} when the drawing was made for "
                f"another caption; in real scenes {percent(statistics.mean(row['drawn']['real']['things'] for row in drew))}."
            )
        else:
            out.append(f"{name} cannot draw.")
    return out


def _answers(axis: Any, results: Rows) -> None:
    asked = kinds(results, everywhere=True)
    for number, (name, rows) in enumerate(results.items()):
        means = [statistics.mean(row["questions"][kind] for row in rows) for kind in asked]
        low = [mean - min(row["questions"][kind] for row in rows) for mean, kind in zip(means, asked, strict=True)]
        high = [max(row["questions"][kind] for row in rows) - mean for mean, kind in zip(means, asked, strict=True)]
        places = [at + 0.38 * number for at in range(len(asked))]
        axis.bar(places, means, 0.36, yerr=[low, high], color=COLOURS[number % 2], label=name, capsize=3)
    for at, kind in enumerate(asked):
        most = _majority(results, kind)
        if most is not None:
            axis.plot([at - 0.2, at + 0.58], [most] * 2, color="#555", linestyle=":")
    axis.set_xticks([at + 0.19 for at in range(len(asked))], asked)
    axis.set_title("questions, exactly right (dotted: most common answer)", fontsize=10)


def _signs(axis: Any, results: Rows) -> None:
    for number, (name, rows) in enumerate(results.items()):
        heights = list(rows[0]["signs"])
        values = [[row["signs"][height] for row in rows] for height in heights]
        places = [int(height) for height in heights]
        axis.plot(places, [statistics.mean(found) for found in values], color=COLOURS[number % 2], marker="o", label=name)
        axis.fill_between(places, [min(f) for f in values], [max(f) for f in values], color=COLOURS[number % 2], alpha=0.15)
    axis.set_xlabel("size of the font, pixels", fontsize=9)
    axis.set_title("signs read exactly", fontsize=10)


def _curve(key: str, title: str) -> Callable[[Any, Rows], None]:
    def draw(axis: Any, results: Rows) -> None:
        for number, (name, rows) in enumerate(results.items()):
            for at, row in enumerate(rows):
                points = [(point["step"], point[key]) for point in row["curve"] if point.get(key) is not None]
                axis.plot(
                    *zip(*points, strict=True), color=COLOURS[number % 2], alpha=0.7, label=name if not at else None, linewidth=1
                )
        axis.set_xlabel("step", fontsize=9)
        axis.set_title(title, fontsize=10)

    return draw


PLOTS: dict[str, Callable[[Any, Rows], None]] = {
    "answers": _answers,
    "signs": _signs,
    "losses": _curve("loss", "loss a supervised token"),
    "score_norms": _curve("score_norm", "norm of a token's scores"),
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
    cards = []
    for name, rows in results.items():
        folder = out / f"{name}-seed{rows[0]['seed']}" / "drawn"
        if not (folder / "said.json").exists():
            continue
        said = json.loads((folder / "said.json").read_text())
        sheet, side = Image.open(folder / "drawn.png"), said["side"]
        for index, caption in list(enumerate(said["captions"]))[:SHOWN]:
            picture = sheet.crop((index * side, 0, (index + 1) * side, side))
            cards.append(f'<div class=card><img src="{inline(picture)}"><br>{html.escape(caption)}</div>')
    return f"<h2>Drawn for captions never trained on</h2><div class=grid>{''.join(cards)}</div>" if cards else ""
