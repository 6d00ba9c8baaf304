"""The verbs of `intermodal data`: preview, pack, stats, fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, Out, Urls, say

data = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at data, fetch it, and print its baselines.")


@data.command()
def preview(
    source: Annotated[str, typer.Argument(help="Any source that `train` takes.")] = "scenes:core",
    out: Out = Path("preview.png"),
    count: Annotated[int, typer.Option(min=1, help="How many samples.")] = 24,
    side: Annotated[int, typer.Option(min=1, help="Pixels of a picture on the sheet.")] = 128,
    allow_urls: Urls = False,
    as_json: Json = False,
) -> None:
    """Draw a contact sheet: pictures with their captions.

    Example: `intermodal data preview scenes:all --out sheet.png`
    """
    from ..data.preview import contact_sheet

    shown, rejected = contact_sheet(source, out, count, side, allow_urls)
    text = f"{out}: {shown} samples" + (f", {rejected} unusable" if rejected else "")
    say({"out": str(out), "samples": shown, "unusable": rejected}, as_json, text)


@data.command()
def pack(
    source: Annotated[str, typer.Argument(help="Any source that `train` takes.")],
    out: Out = Path("shard.tar"),
    side: Annotated[int, typer.Option(min=1, help="Longest side of a packed picture, in pixels.")] = 256,
    count: Annotated[int | None, typer.Option(min=1, help="How many samples; all where left out.")] = None,
    allow_urls: Urls = False,
    as_json: Json = False,
) -> None:
    """Write a source as one tar shard of small pictures with their captions: large files are then decoded once and not every epoch.

    Example: `intermodal data pack 'tuxpaint?languages=en,de' --side 96 --out tux.tar`
    """
    from ..data.pack import pack as write

    written, rejected = write(source, out, side, count, allow_urls=allow_urls, progress=not as_json)
    named = f", {rejected} unusable (named in {out.with_suffix('.rejects.jsonl')})" if rejected else ""
    say({"out": str(out), "samples": written, "unusable": rejected}, as_json, f"{out}: {written} samples{named}")


@data.command()
def stats(
    source: Annotated[str, typer.Argument(help="`scenes:core`, `scenes:all`, or your own data.")] = "scenes:core",
    count: Annotated[int, typer.Option(min=1, help="How many samples are looked at.")] = 500,
    side: Annotated[int, typer.Option(min=1, help="Pixels of a scene's side.")] = 48,
    allow_urls: Urls = False,
    as_json: Json = False,
) -> None:
    """Print what a source holds and, for scenes, every baseline beside which a result must be shown.

    Example: `intermodal data stats scenes:core`
    """
    from ..data.preview import describe

    found = describe(source, count, side, progress=not as_json, allow_urls=allow_urls)
    say(found, as_json, "\n".join(_lines(found)))


@data.command()
def fetch(
    name: Annotated[str, typer.Argument(help="`tuxpaint`: Debian's stamps, about 160 MB, GPL-2 and others.")], as_json: Json = False
) -> None:
    """Fetch a data set that is not ours to ship.

    Example: `intermodal data fetch tuxpaint`
    """
    from ..data.readers import SourceError
    from ..data.tuxpaint import TuxPaint
    from ..data.tuxpaint import fetch as fetch_tuxpaint

    if name != "tuxpaint":
        raise SourceError(f"nothing to fetch by the name {name!r}; there is: tuxpaint")
    folder = fetch_tuxpaint()
    stamps = len(TuxPaint(str(folder)))
    text = f"{folder}: {stamps} stamps; train on them as the source tuxpaint:{folder}"
    say({"folder": str(folder), "stamps": stamps, "source": f"tuxpaint:{folder}"}, as_json, text)


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    out = []
    for name, value in values.items():
        if isinstance(value, dict):
            out += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            out.append(f"{indent}{name!s:34} {value:.3f}" if isinstance(value, float) else f"{indent}{name!s:34} {value}")
    return out
