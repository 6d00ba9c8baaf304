"""What a comparison's report says in sentences: how long was trained, who is ahead in what, and what the numbers do not show."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .sides import Settings

Rows = dict[str, list[dict[str, Any]]]
"""Results of every seed by the side's name: the first side, then the second."""
ALL = "all"
"""Among the kinds of questions: all that a side was asked, whatever their kinds."""


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def counted(number: int, noun: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def kinds(results: Rows, everywhere: bool = False) -> list[str]:
    """Kinds of questions that any side was asked, or that every side was: then without "all" where it is not the same all."""
    asked = [set(row["questions"]) for rows in results.values() for row in rows]
    found = dict.fromkeys(kind for rows in results.values() for row in rows for kind in row["questions"])
    if not everywhere:
        return list(found)
    return [kind for kind in found if all(kind in one for one in asked) and (kind != ALL or same_kinds(results))]


def same_kinds(results: Rows) -> bool:
    asked = [set(row["questions"]) for rows in results.values() for row in rows]
    return all(one == asked[0] for one in asked)


def title(results: Rows) -> str:
    text = " against ".join(results)
    return text[:1].upper() + text[1:]


def head(results: Rows, settings: Settings, overrides: Sequence[Sequence[str]]) -> str:
    """How many seeds, how long was trained, and the settings of each side that are not its recipe's."""
    seeds = len(next(iter(results.values())))
    told = f"Means over {counted(seeds, 'seed')} (lowest to highest)" if seeds > 1 else "One seed"
    if settings.steps is None:
        length = f"{settings.seconds:.0f} s of training a run"
    else:
        eyes = " and of eyes that are trained first" if any(row["eyes_steps"] for rows in results.values() for row in rows) else ""
        length = f"{counted(settings.steps, 'training step')} of every stage{eyes}"
    changed = "".join(f" {name} with {', '.join(ones)}." for name, ones in zip(results, overrides, strict=True) if ones)
    return f"{told}; {length}.{changed}"


def beside(what: str, results: Rows, read: Callable[[dict[str, Any]], float | None]) -> str:
    """ " (a guess 12 %)" behind a row's label, by side where the sides differ; nothing where no side has it."""
    found = {name: next((value for row in rows if (value := read(row)) is not None), None) for name, rows in results.items()}
    known = {name: percent(value) for name, value in found.items() if value is not None}
    if not known:
        return ""
    if len(set(known.values())) == 1:
        return f" ({what} {next(iter(known.values()))})"
    return f" ({what}: {', '.join(f'{name} {value}' for name, value in known.items())})"


def findings(results: Rows) -> list[str]:
    """What the sides were not asked alike, where one is ahead with every seed, where they overlap, and what only one can do."""
    return [*_asked_otherwise(results), *_who_is_ahead(results), *_out_of_steps(results), *_who_draws(results)]


def _asked_otherwise(results: Rows) -> list[str]:
    (first, ours), (second, theirs) = ((name, rows[0]) for name, rows in results.items())
    out = []
    a, b = ours["asked_about"], theirs["asked_about"]
    differs = [
        f"{what}.{key} {json.dumps(value)} and {json.dumps(b[what][key])}"
        for what, values in a.items()
        for key, value in values.items()
        if value != b[what][key]
    ]
    if differs:
        out.append(
            f"Each side is asked about scenes and signs as its own recipe draws them, and those of {first} and {second} differ: "
            f"{'; '.join(differs)}."
        )
    if not same_kinds(results):
        own = (
            f"{name} {', '.join(kind for kind in row['questions'] if kind != ALL)}"
            for name, row in ((first, ours), (second, theirs))
        )
        out.append(f"The sides are asked questions of different kinds, so all of them together are not compared: {'; '.join(own)}.")
    return out


def _who_is_ahead(results: Rows) -> list[str]:
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
    with_seeds = "with every seed" if len(ours) > 1 else "with the one seed there is, which may be chance"
    together = "The spreads of the seeds overlap" if len(ours) > 1 else "Neither is ahead"
    out = [f"{name} is ahead {with_seeds}: {'; '.join(ahead[name])}." for name in (first, second) if ahead[name]]
    return out + ([f"{together}: {'; '.join(ahead['neither'])}."] if ahead["neither"] else [])


def _out_of_steps(results: Rows) -> list[str]:
    """A side whose recipe has fewer steps than the time would have let it take has trained for less than the other."""
    ended = {name: [row["seconds"] for row in rows if row["out_of_steps"]] for name, rows in results.items()}
    return [
        f"{name} came to the end of its recipe's steps, after {statistics.mean(seconds):.0f} s of training, and stopped there; a higher "
        f"train.steps of its stages lets it go on."
        for name, seconds in ended.items()
        if seconds
    ]


def _who_draws(results: Rows) -> list[str]:
    out = []
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


def limits(results: Rows, settings: Settings) -> str:
    """What the numbers do not show, of the two models that were compared."""
    first, second = (rows[0] for rows in results.values())
    millions = [row["decoder_parameters"] / 1e6 for row in (first, second)]
    sizes = dict.fromkeys(f"{size:.2g}" if size < 100 else f"{size:,.0f}" for size in millions)
    small = ", where released models have thousands of millions," if max(millions) < 500 else ""
    out = [
        f"What this does not show. The decoders have {' and '.join(sizes)} million parameters{small} and are asked only about drawn scenes "
        "of emoji and about signs of one word: which side is ahead here says nothing about which is ahead at scale."
    ]
    if settings.steps is None:
        out.append(
            "Equal compute means equal seconds on the same cores, data workers included, not equal numbers of floating-point operations."
        )
    else:
        out.append(
            "Both sides took the same number of steps, not the same time: a step of one may cost more than one of the other."
        )
    for name, row, other, its in zip(results, (first, second), reversed(results), (second, first), strict=True):
        if row["learns_to_draw"] and not its["learns_to_draw"]:
            cannot = "is not taught" if its["native"] else "cannot do at all"
            out.append(f"A part of what {name} spends goes into drawing, which {other} {cannot}.")
        if row["began_with"]:
            out.append(
                f"{name} begins with weights that were trained before, which its time leaves out: {', '.join(row['began_with'])}."
            )
    if first["native"] != second["native"]:
        out.append(
            "The tower was taught by captions and the codebook by pixels, so the eyes differ in what they were taught as well as in what "
            "they can hold."
        )
    out.append("The linear read-out asks what a single token says of its own patch; what several tokens say together may be more.")
    return " ".join(out)
