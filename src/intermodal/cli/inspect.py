"""The verb `inspect`: conversations as a model would be trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .chat import Model, load_talker
from .options import Variables, variables_of


def inspect(
    model: Model,
    sample: Annotated[
        str, typer.Argument(help="What a recipe's stage could train on: a .jsonl or .json file, `captions:photos/`, ...")
    ],
    count: Annotated[int, typer.Option(min=1, help="How many conversations to show.")] = 3,
    html: Annotated[
        Path | None, typer.Option(help="Draw a page, too: every token with its place, label and box on the picture.")
    ] = None,
    variable: Variables = None,
) -> None:
    """Print what a model would be trained on: green is learned, grey is read, media are shown by their number in the messages (as `item` of
    a box part counts, from 0) and their size in tokens.

    Examples:

    `intermodal inspect Qwen2-VL-2B-Instruct train.jsonl --html look.html`

    `intermodal inspect runs/llava/model "questions:scenes:core?pair_share=0.5"`
    """
    from rich.console import Console
    from rich.text import Text

    from ..data.stream import StreamSource
    from ..data.talks import open_talks

    console = Console()
    loaded = load_talker(model, "float32", variables=variables_of(variable))
    processor = loaded.processor
    assert processor is not None  # load_talker has checked it
    source = open_talks(sample, side=loaded.picture_side)
    looked: list[tuple[str, Any, str, bool]] = []
    for number in range(count if isinstance(source, StreamSource) else min(count, len(source))):
        conversation, verdict, fine = _read(processor, source, number)
        looked.append((f"{Path(sample).name if Path(sample).is_file() else sample}, {number + 1}", conversation, verdict, fine))
        line = Text(f"{number + 1}: ", style="bold")
        if conversation is None:
            console.print(line.append(verdict, style="red"))
            continue
        learned, visual = sum(conversation.supervised), sum(conversation.expanded.visual)
        line.append(f"{len(conversation.ids)} tokens, {learned} learned, {visual} visual; ", style="default")
        console.print(line.append(verdict, style="green" if fine else "red"))
        console.print(_coloured(processor, conversation))
    if html is not None:
        from ..evaluate.inspect import page

        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(processor, looked))
        console.print(f"drew {html}")


def _read(processor: Any, source: Any, number: int) -> tuple[Any, str, bool]:
    """(a source's conversation, None where it could not be read; what is to be said of it; whether it can be trained on)."""
    from ..data.stream import StreamSource
    from ..errors import IntermodalError

    conversation = None
    try:
        conversation = processor.conversation((source.next() if isinstance(source, StreamSource) else source[number]).messages)
        processor.audit(conversation)
    except IntermodalError as error:
        return conversation, str(error), False
    return conversation, "the mask is exactly the assistant's words and end-of-turn", True


def _coloured(processor, conversation):
    """A conversation's tokens: green is learned, grey is read, media by their number in the messages and their size."""
    from rich.text import Text

    ids, media, out, index = conversation.ids, dict(conversation.expanded.runs), Text(), 0
    numbers = dict(
        zip(media, (n for n, plan in zip(conversation.numbers, conversation.plans, strict=True) for _ in plan.runs), strict=True)
    )
    first, before = 0, ""
    while index < len(ids):
        if index in media:
            grids = [piece.grid for piece in media[index] if piece.grid]
            sizes = " + ".join("x".join(map(str, grid)) for grid in grids)
            out.append(f"[item {numbers[index]}: {sizes}]", style="bold magenta")
            index += sum(len(piece) for piece in media[index])
            first, before = index, ""
            continue
        style = "green" if conversation.supervised[index] else "bright_black"
        # a token alone may have lost the space before it
        after = processor.decode(ids[first : index + 1], special=True)
        if after.endswith("\ufffd") and index + 1 < len(ids) and index + 1 not in media:
            index += 1  # the rest of this character is in the tokens that follow
            continue
        out.append(after[len(before) :] if after.startswith(before) else processor.decode([ids[index]], special=True), style=style)
        before = after
        index += 1
    return out
