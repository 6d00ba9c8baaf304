"""`intermodal data preview` and `stats`: look before you train."""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.progress import track

from .compose import font_files
from .drawn import SpriteSource
from .readers import open_source
from .scenes import Scenes
from .signs import Signs
from .source import TOLD, Reject, SourceError
from .stream import StreamSource, first_samples


def contact_sheet(spec: str, out: Path, count: int, side: int, allow_urls: bool = False) -> tuple[int, int]:
    """Draw the first `count` usable samples with their captions, of `side` pixels each.

    Returns:
        How many are shown, and how many samples or shards could not be used; on stderr the first shards that are cut short, or records
        of metadata without a picture, are named.

    Raises:
        SourceError: the source does not open, nothing in it could be used, or `out` ends like no picture.
    """
    known = Image.registered_extensions()  # reading it loads Pillow's formats, which `SAVE` is then of
    if known.get(out.suffix.lower()) not in Image.SAVE:
        raise SourceError(
            f"{out}: a sheet cannot be written as {out.suffix or 'a file without an ending'!r}; take .png, .jpg or .webp"
        )
    source = open_source(spec, side=side, allow_urls=allow_urls)
    problems = getattr(source, "problems", [])
    for name, reason in problems[:TOLD]:
        print(f"{name}: {reason}", file=sys.stderr)  # stdout may be JSON
    if len(problems) > TOLD:
        print(f"... and {len(problems) - TOLD} more of {source.name}", file=sys.stderr)
    cells: list[tuple[Image.Image, str]] = []
    rejected, last = len(problems), problems[-1][1] if problems else "it is empty"
    for index, sample in enumerate(first_samples(source, None)):
        if isinstance(sample, Reject):
            rejected, last = rejected + 1, sample.reason
        else:
            cells.append((sample.image, sample.texts[index % len(sample.texts)]))
        if len(cells) >= count:
            break
    if not cells:
        raise SourceError(f"nothing in {spec} could be used; the last reason: {last}")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(cells, side).save(out)
    return len(cells), rejected


def sheet(cells: list[tuple[Image.Image, str]], side: int, columns: int = 6) -> Image.Image:
    """A grid of pictures with text below each."""
    from PIL import ImageFont

    size = max(10, side // 11)
    font = ImageFont.truetype(str(next(f for f in font_files() if f.name == "DejaVuSans.ttf")), size)
    columns = min(columns, max(1, len(cells)))
    per_line = max(8, int(side / (size * 0.55)))
    lines = [textwrap.wrap(text, per_line)[:4] for _, text in cells]
    below = (max((len(wrapped) for wrapped in lines), default=1) + 1) * (size + 2)
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (columns * (side + 8), max(1, rows) * (side + below)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, ((picture, _), wrapped) in enumerate(zip(cells, lines, strict=True)):
        x, y = i % columns * (side + 8) + 4, i // columns * (side + below) + 2
        picture = picture.copy()
        picture.thumbnail((side, side))
        canvas.paste(picture, (x + (side - picture.width) // 2, y))
        for n, line in enumerate(wrapped):
            pen.text((x, y + side + 2 + n * (size + 2)), line, font=font, fill=(20, 20, 20))
    return canvas


def describe(spec: str, count: int, side: int, progress: bool = False, allow_urls: bool = False) -> dict[str, Any]:
    """Counts and caption lengths of any source, and every baseline beside which a result on it must be shown; for scenes the share of
    every fact too."""
    source = open_source(spec, side=side, allow_urls=allow_urls)
    samples, rejects = [], []
    for one in track(first_samples(source, count), "looking", count, transient=True, disable=not progress):
        (rejects if isinstance(one, Reject) else samples).append(one)
    words = [len(text.split()) for sample in samples for text in sample.texts]
    texts = Counter(sample.texts[0] for sample in samples)
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for reject in rejects:  # reasons that differ in nothing but the names of files and records are one, told by its first
        kind = re.sub(r"\S*[/\d]\S*", "", reject.reason)
        reasons[first.setdefault(kind, reject.reason)] += 1
    out: dict[str, Any] = {
        "source": source.name,
        "samples": "endless" if isinstance(source, Scenes | Signs | StreamSource) else len(source),
        "looked at": len(samples) + len(rejects),
        "unusable": len(rejects),
        "words in a caption, mean": sum(words) / max(1, len(words)),
        "words in a caption, most": max(words, default=0),
        "captions on several pictures": sum(1 for n in texts.values() if n > 1),
    }
    if not isinstance(source, Scenes):
        from ..evaluate.baselines import caption_baselines

        out["baselines: the caption out of all different ones, from half of them"] = caption_baselines(samples)
    if reasons:
        out["reasons"] = dict(reasons.most_common(10))
    problems = getattr(source, "problems", [])
    if problems:
        out["problems"] = dict(problems[:TOLD])
    if isinstance(source, Scenes):
        out |= _scene_stats(samples, source, count, side, progress)
    if isinstance(source, Scenes | SpriteSource):
        from ..evaluate.scenes import sprite_pixels

        out["baselines on single sprites of the held-out style"] = {
            "chance": 1 / len(source.pool),
            "nearest raw pixels, top-1": sprite_pixels(side, source.config.concepts)["top-1"],
        }
    return out


def _scene_stats(samples, source: Scenes, count: int, side: int, progress: bool) -> dict[str, Any]:
    from ..evaluate.scenes import SceneTask, scene_baselines

    truths = [sample.meta for sample in samples]
    relations = Counter(t["relation"] or "single group" for t in truths)
    counts = Counter(g["count"] for t in truths for g in t["groups"])
    which = source.config.concepts
    baselines = scene_baselines(SceneTask.make(count, side, which=which, style=None), training=source.config, progress=progress)
    majority = counts.most_common(1)[0]
    return {
        "facts": {
            "concepts": len(source.pool),
            "relations": dict(relations),
            "objects in a group": dict(sorted(counts.items())),
            "majority count": f"{majority[0]} ({majority[1] / sum(counts.values()):.0%} of groups)",
        },
        "baselines on held-out combinations": asdict(baselines),
    }
