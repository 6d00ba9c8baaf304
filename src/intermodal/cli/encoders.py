"""The verbs of contrastive encoders: `eval`, `embed`, `search`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, Out, Urls, say


def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory or hub id.")],
    source: Annotated[
        str, typer.Argument(help="`scenes:core`, `sprites:core`, `tuxpaint`, or your own data with captions.")
    ] = "scenes:core",
    task: Annotated[str, typer.Option(help="`retrieval` or `zeroshot` (every distinct caption is a class).")] = "retrieval",
    classes: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Zero-shot: a file with a class name a line, or folder<TAB>name to say what a folder's class is called; "
            "a tar's .cls is the number of a line, the first being 0.",
        ),
    ] = None,
    template: Annotated[list[str] | None, typer.Option(help="Zero-shot prompt with {}; give several for an ensemble.")] = None,
    templates: Annotated[
        str | None, typer.Option(help="Zero-shot: a file with such a prompt a line, or `openai`: CLIP's eighty for ImageNet.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="So many samples, drawn at random; by default all, or 1000 of a source without an end."),
    ] = None,
    by_class: Annotated[bool, typer.Option("--by-class", help="Zero-shot: accuracy and commonest mistake of each class.")] = False,
    allow_urls: Urls = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default cuda where there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Score a model: retrieval recall@1/5/10 both ways, or zero-shot top-1 and top-5.

    Examples:

    `intermodal eval runs/demo/model scenes:core`

    `intermodal eval openai/clip-vit-base-patch32 my_folder --task zeroshot --template 'a photo of a {}.'`

    `intermodal eval openai/clip-vit-base-patch32 imagenet/val --task zeroshot --classes names.tsv --templates openai`

    `intermodal eval openai/clip-vit-base-patch32 'wds/test/{0..9}.tar' --task zeroshot --classes wds/classnames.txt --templates openai`
    """
    from ..errors import IntermodalError
    from ..evaluate.run import evaluate_source
    from ..evaluate.templates import read_templates

    if template and templates:
        raise IntermodalError("--template and --templates: give one of them; a file of --templates takes any number of lines")
    scores = evaluate_source(
        model,
        source,
        task,
        classes=classes,
        templates=read_templates(templates) if templates else template,
        count=count,
        by_class=by_class,
        allow_urls=allow_urls,
        device=device,
        progress=not as_json,
    )
    say(scores, as_json, "\n".join(_rows(scores)))


def _rows(scores: dict[str, Any]) -> list[str]:
    """What `eval` found, in lines for people."""
    whole = "a source without an end" if scores["of"] is None else scores["of"]
    shown = {**scores, "samples": f"{scores['samples']} of {whole}"}
    shown.pop("of")
    rows = [f"{name:28s} {_number(value)}" for name, value in shown.items() if not isinstance(value, dict | list)]
    rows += [f"  rejected {reject['key']}: {reject['reason']}" for reject in scores.get("rejects", [])]
    for name, row in scores.get("per class", {}).items():
        mistake = f"  taken for {row['taken for']}" if row["taken for"] else ""
        rows.append(f"  {name:40s} {row['top-1']:.3f} of {row['samples']}{mistake}")
    return rows


def embed(
    model: Annotated[str, typer.Argument(help="A model directory or hub id.")],
    source: Annotated[str, typer.Argument(help="A folder of pictures, a table, shards, or a .txt file with a text a line.")],
    out: Out = Path("embeddings.parquet"),
    batch: Annotated[int, typer.Option(min=1, help="Items of one forward.")] = 64,
    allow_urls: Urls = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default cuda where there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Write unit-length embeddings to parquet (key, vector) or .npy; a run that was stopped goes on where it was.

    Example: `intermodal embed runs/demo/model photos/ --out photos.parquet`
    """
    from ..evaluate.embed import embed_source

    written, reused, rejected = embed_source(model, source, out, batch, allow_urls=allow_urls, device=device, progress=not as_json)
    listing = out.with_name(out.name + ".rejects.jsonl")
    rejects = [json.loads(line) for line in listing.read_text().splitlines()[:5]] if rejected else []
    text = f"{out}: {written + reused} embeddings ({reused} from an earlier run), {rejected} rejected"
    text += f", named in {listing}; the first:" if rejects else ""
    say(
        {
            "out": str(out),
            "embeddings": written + reused,
            "from an earlier run": reused,
            "rejected": rejected,
            "rejects": rejects,
        },
        as_json,
        "\n".join([text, *(f"  {reject['key']}: {reject['reason']}" for reject in rejects)]),
    )


def search(
    model: Annotated[str, typer.Argument(help="A model directory or hub id.")],
    folder: Annotated[str, typer.Argument(help="Pictures to rank: a folder, or parquet or .npy written by `embed`.")],
    sentence: Annotated[str, typer.Argument(help="What to look for.")],
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default cuda where there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Rank pictures for a sentence.

    Example: `intermodal search runs/demo/model photos/ "two dogs above a car"`
    """
    from ..evaluate.embed import search as rank

    hits, rejects = rank(model, folder, sentence, top, device=device, tell=lambda line: typer.echo(line, err=True))
    for reject in rejects[:5]:
        typer.echo(f"skipped {reject.key}: {reject.reason}", err=True)
    if len(rejects) > 5:
        typer.echo(f"skipped {len(rejects) - 5} more", err=True)
    named = [dataclasses.asdict(reject) for reject in rejects[:5]]
    say(
        {"hits": [{"key": key, "score": score} for key, score in hits], "rejected": len(rejects), "rejects": named},
        as_json,
        "\n".join(f"{score:.4f}  {key}" for key, score in hits),
    )


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
