"""What a comparison's report says in sentences: how long was trained, who is ahead in what, and what the numbers do not show."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .logs import SPIKES_ARE
from .sides import Settings

Rows = dict[str, list[dict[str, Any]]]
"""Results of every seed by the side's name: the first side, then the second."""
ALL = "all"
"""Among the kinds of questions: all that a side was asked, whatever their kinds."""
KNOWS = 0.9
"""A judge that finds a smaller share of the named things in real scenes does not know them."""


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
    return [
        *_asked_otherwise(results),
        *_left_out(results),
        *_who_is_ahead(results),
        *_faster(results),
        *_out_of_steps(results),
        *_who_draws(results),
    ]


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


def _left_out(results: Rows) -> list[str]:
    """Heights of letters that no sign of a side was shown in."""
    without: dict[tuple[str, int], list[str]] = {}
    for name, rows in results.items():
        heights, side = rows[0]["signs_left_out"], rows[0]["asked_about"]["signs"]["side"]
        if heights:
            without.setdefault((" and ".join(str(height) for height in heights), side), []).append(name)
    return [
        f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} shown no signs of {px} px: too few of the recipe's words fit into "
        f"{side} pixels in letters of that size."
        for (px, side), names in without.items()
    ]


def _who_is_ahead(results: Rows) -> list[str]:
    (first, ours), (second, theirs) = results.items()
    heights = [height for height in ours[0]["signs"] if all(height in row["signs"] for row in (*ours, *theirs))]
    measures: dict[str, Callable[[dict[str, Any]], float | None]] = {
        **{f"questions, {kind}": (lambda row, kind=kind: row["questions"][kind]) for kind in kinds(results, everywhere=True)},
        "captions, exactly right": lambda row: row["captions"]["exact"],
        "signs of all heights": lambda row: statistics.mean(row["signs"][height] for height in heights) if heights else None,
        "linear read-out of pixels": lambda row: row["kept"]["linear"],
    }
    ahead: dict[str, list[str]] = {first: [], second: [], "neither": []}
    for label, read in measures.items():
        a, b = ([value for row in rows if (value := read(row)) is not None] for rows in (ours, theirs))
        if len(a) < len(ours) or len(b) < len(theirs):
            continue  # a side has no such measure
        ahead[first if min(a) > max(b) else second if min(b) > max(a) else "neither"].append(label)
    with_seeds = "with every seed" if len(ours) > 1 else "with the one seed there is, which may be chance"
    together = "The spreads of the seeds overlap" if len(ours) > 1 else "Neither is ahead"
    out = [f"{name} is ahead {with_seeds}: {'; '.join(ahead[name])}." for name in (first, second) if ahead[name]]
    return out + ([f"{together}: {'; '.join(ahead['neither'])}."] if ahead["neither"] else [])


def _faster(results: Rows) -> list[str]:
    """Tokens a second say how fast the decoder learns, and nothing of which side takes in more: a picture is more tokens on one side."""
    (first, ours), (second, theirs) = results.items()
    a, b = ([row["tokens_per_second"] for row in rows] for rows in (ours, theirs))
    if min(a) <= max(b) and min(b) <= max(a):
        return []
    more = first if min(a) > max(b) else second
    sizes = " and ".join(str(round(rows[0]["tokens_per_image"])) for rows in results.values())
    return [
        f"{more} trains on more tokens a second, which is no lead: a picture takes {sizes} tokens of {first} and {second}."
        if ours[0]["tokens_per_image"] != theirs[0]["tokens_per_image"]
        else f"{more} trains on more tokens a second."
    ]


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
            knows = min(row["drawn"]["real"]["things"] for row in drew)
            if knows < KNOWS:
                out.append(
                    f"The judge of {name} does not know real scenes well enough (it finds {percent(knows)} of their things): what it does "
                    "not find in drawings may be there."
                )
        else:
            out.append(f"{name} cannot draw.")  # a tower has no way back to pixels; a VQ-VAE may come without its decoder
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
    threads = [row["threads"] for row in (first, second)]
    if settings.steps is None:
        cores = "on the same cores" if threads[0] == threads[1] else "of the clock"
        out.append(
            f"Equal compute means equal seconds {cores}, data workers included, not equal numbers of floating-point operations."
        )
        if threads[0] != threads[1]:
            told = " and ".join(f"{name} with {counted(count, 'thread')}" for name, count in zip(results, threads, strict=True))
            out.append(f"The sides had different shares of the machine: {told} (train.threads).")
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
    out.append(f"{SPIKES_ARE}.")
    return " ".join(out)
