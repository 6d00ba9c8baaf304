"""Options that several verbs share, and how a verb says its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Urls = Annotated[bool, typer.Option("--allow-urls", help="Fetch pictures that a table names by http(s) address.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]


def say(values: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(values) if as_json else text)
