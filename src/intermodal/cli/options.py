"""Options that several verbs share, and how a verb says its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Urls = Annotated[bool, typer.Option("--allow-urls", help="Fetch pictures that a table names by http(s) address.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends a reply; may be given several times.")]
MaxImages = Annotated[int, typer.Option(help="Most pictures in a reply, where the model draws.")]
ImageTemperature = Annotated[float, typer.Option(help="Of picture codes; 0 is greedy.")]
ImageTopP = Annotated[float, typer.Option(help="Of picture codes, keep the smallest set with this probability.")]
Guidance = Annotated[float, typer.Option(help="Pulls pictures towards the prompt; 1 is off, 3 the authors' choice.")]
ImageGuidance = Annotated[
    float | None, typer.Option(help="A third stream that sees the shown pictures and no words pulls too; the authors use 1.2.")
]

Variables = Annotated[
    list[str] | None,
    typer.Option("--variable", help="NAME=VALUE for the chat template, enable_thinking=false; may be given several times."),
]


def variables_of(given: list[str] | None) -> dict[str, Any]:
    """What the chat template is told: values as JSON has them, else as text. Raises IntermodalError: one without a name or a value."""
    from ..config import PYTHONS
    from ..errors import IntermodalError
    from ..inputs.template import RESERVED

    out: dict[str, Any] = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not name.isidentifier() or not equals:
            raise IntermodalError(f"--variable {one}: give NAME=VALUE, enable_thinking=false")
        if name in RESERVED:
            raise IntermodalError(
                f"--variable {one}: {name} is what intermodal itself tells the template; tools are given by --tools"
            )
        try:
            out[name] = json.loads(PYTHONS.get(value, value))
        except ValueError:
            out[name] = value
    return out


def say(values: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(values) if as_json else text)
