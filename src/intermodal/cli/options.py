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


def say(values: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(values) if as_json else text)
