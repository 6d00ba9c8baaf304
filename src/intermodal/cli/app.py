"""The command line. Torch is imported inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import chat
from .data import data
from .options import Json, Out, Urls, say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train, evaluate, run and exchange multimodal models: CLIP, SigLIP, LLaVA, Qwen-VL.",
)
app.add_typer(data, name="data")
_STOPPED = "the demo was stopped and is kept in {out}; go on with: intermodal {verb} --out {out} --resume"
for verb in (chat.chat, chat.generate, chat.inspect):
    app.command()(verb)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options of every verb; `run` reads --debug itself, before parsing."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file: a Python file with `recipe(tiny=False)`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings by dotted path, for example `data.batch=512`.")] = None,
    out: Out = Path("runs/train"),
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --out.")] = False,
    tiny: Annotated[bool, typer.Option(help="The recipe's smallest version: three steps, to see that it runs.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print every setting and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe; the result is a Hugging Face directory in `OUT/model`, and what was logged is drawn into `curves.png`.

    Examples:

    `intermodal train recipes/siglip.py --out runs/a`

    `intermodal train recipes/clip.py 'data.train=["shards/{000..009}.tar"]' data.batch=512 train.steps=2000 --out runs/b`

    `intermodal train recipes/llava.py model.vision=runs/a/model --out runs/llava`

    `torchrun --nproc-per-node 2 -m intermodal train recipes/siglip.py train.parallel=fsdp train.threads=1 --out runs/c`
    """
    from rich.console import Console

    from ..config import override, paths
    from ..evaluate.curves import draw_curves
    from ..train.recipe import StagedRecipe, VQRecipe, load_recipe

    made = override(load_recipe(recipe, tiny=tiny), overrides or [])
    if show:
        settings = paths(made)
        say(settings, as_json, "\n".join(f"{name}={json.dumps(value)}" for name, value in settings.items()))
        return
    console = Console(stderr=as_json)  # with --json a program reads the output: what a run has to tell goes beside it
    began = time.perf_counter()
    if isinstance(made, StagedRecipe):
        from ..train.stages import train_stages

        train_stages(made, out, resume=resume, console=console, quiet=as_json)
        last_folder = out / f"{len(made.stages)}-{made.stages[-1].name}"
    elif isinstance(made, VQRecipe):
        from ..train.vqvae import train_vqvae

        train_vqvae(made, out, resume=resume, console=console, quiet=as_json)
        last_folder = out
    else:
        from ..train.contrastive import train as run_training

        run_training(made, out, resume=resume, console=console, quiet=as_json)
        last_folder = out
    if int(os.environ.get("RANK", "0")) == 0:
        lines = (last_folder / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1]) if lines else {}
        took = time.perf_counter() - began
        pictures = [str(path) for path in draw_curves(out)]
        loss = f"loss {last.get('loss', float('nan')):.4f}" + (f", PSNR {last['psnr']:.1f} dB" if "psnr" in last else "")
        text = f"saved {out / 'model'} ({loss}, {took:.0f} s); curves: {', '.join(pictures)}"
        say({"model": str(out / "model"), "curves": pictures, "seconds": round(took, 1), **last}, as_json, text)


@app.command("eval")
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
            help="Zero-shot: a file with a class name a line, or folder<TAB>name to say what a folder's class is called.",
        ),
    ] = None,
    template: Annotated[list[str] | None, typer.Option(help="Zero-shot prompt with {}; give several for an ensemble.")] = None,
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

    `intermodal eval openai/clip-vit-base-patch32 imagenet/val --task zeroshot --classes names.tsv --template 'a photo of a {}.'`
    """
    from ..evaluate.run import evaluate_source

    scores = evaluate_source(
        model,
        source,
        task,
        classes=classes,
        templates=template,
        count=count,
        by_class=by_class,
        allow_urls=allow_urls,
        device=device,
        progress=not as_json,
    )
    whole = "a source without an end" if scores["of"] is None else scores["of"]
    shown = {**scores, "samples": f"{scores['samples']} of {whole}"}
    shown.pop("of")
    rows = [f"{name:28s} {_number(value)}" for name, value in shown.items() if not isinstance(value, dict | list)]
    rows += [f"  rejected {reject['key']}: {reject['reason']}" for reject in scores.get("rejects", [])]
    for name, row in scores.get("per class", {}).items():
        mistake = f"  taken for {row['taken for']}" if row["taken for"] else ""
        rows.append(f"  {name:40s} {row['top-1']:.3f} of {row['samples']}{mistake}")
    say(scores, as_json, "\n".join(rows))


@app.command()
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


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A model directory or hub id.")],
    folder: Annotated[str, typer.Argument(help="Pictures to rank: a folder, or parquet or .npy written by `embed`.")],
    sentence: Annotated[str, typer.Argument(help="What to look for.")],
    top: Annotated[int, typer.Option(help="How many to show.")] = 10,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default cuda where there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Rank pictures for a sentence.

    Example: `intermodal search runs/demo/model photos/ "two dogs above a car"`
    """
    from ..evaluate.embed import search as rank

    hits, rejects = rank(model, folder, sentence, top, device=device)
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


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A directory or hub id in any readable layout.")],
    target: Annotated[Path, typer.Argument(help="The directory to write.")],
    layout: Annotated[str, typer.Option(help="`hf` (transformers) or `open_clip`.")] = "hf",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    image_size: Annotated[int | None, typer.Option(help="Resample the positions for pictures of this side.")] = None,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint in another layout, type or image size.

    Example: `intermodal convert open_clip_dir hf_dir --layout hf`
    """
    from ..weights.load import load, save

    model = load(source, dtype=dtype, image_size=image_size)
    save(model, target, layout=layout)
    count = sum(p.numel() for p in model.parameters())
    say(
        {"out": str(target), "model": type(model).__name__, "parameters": count, "layout": layout},
        as_json,
        f"{target}: {type(model).__name__}, {count:,} parameters, layout {layout}",
    )


@app.command()
def stitch(
    vision: Annotated[str, typer.Option(help="A CLIP, SigLIP or Qwen-VL model: its tower and image processor are taken.")],
    language: Annotated[str, typer.Option(help="A decoder's directory, hub id or GGUF file, with a chat template.")],
    out: Out = Path("stitched"),
    connector: Annotated[
        str,
        typer.Option(
            help="mlp: LLaVA's, fixed-size towers; resampler: Idefics2's, fixed-size SigLIP; merger: Qwen-VL's, native resolution."
        ),
    ] = "mlp",
    layer: Annotated[
        int | None, typer.Option(help="mlp: hidden state of the tower that is read; by default LLaVA's choice.")
    ] = None,
    anyres: Annotated[
        str | None, typer.Option(help="mlp: grids of tiles that pictures may be cut into, down x across: 1x2,2x1,2x2 (LLaVA-NeXT).")
    ] = None,
    onevision: Annotated[
        bool,
        typer.Option(
            "--onevision", help="mlp: LLaVA-OneVision, which reads clips too; with its own grids where --anyres has none."
        ),
    ] = False,
    latents: Annotated[int | None, typer.Option(min=1, help="resampler: tokens of a picture, 64 by default.")] = None,
    deepstack: Annotated[str | None, typer.Option(help="merger: blocks that also reach the decoder's first layers, 2,5,8.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the projector's weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a stitched model from a tower and a decoder, with a fresh connector between them, to be trained in stages.

    Examples:

    `intermodal stitch --vision openai/clip-vit-large-patch14-336 --language lmsys/vicuna-7b-v1.5 --out fresh-llava`

    `intermodal stitch --vision google/siglip2-base-patch16-384 --language Qwen/Qwen3-0.6B --anyres 1x2,2x1,2x2,1x3,3x1`

    `intermodal stitch --vision google/siglip-so400m-patch14-384 --language Qwen/Qwen2-0.5B-Instruct --onevision`

    `intermodal stitch --vision google/siglip-so400m-patch14-384 --language Qwen/Qwen3-0.6B --connector resampler --latents 64`

    `intermodal stitch --vision google/siglip2-base-patch16-naflex --language Qwen/Qwen3-0.6B --connector merger --deepstack 2,5,8`
    """
    from ..errors import IntermodalError, nearest
    from ..models.clip import DualEncoder
    from ..models.generative import LanguageModel
    from ..models.qwen2_vl import QwenVL
    from ..weights.load import load, load_encoder, save
    from ..weights.stitch import stitch as join
    from ..weights.stitch_native import stitch_native
    from ..weights.stitch_resampler import stitch_resampler

    connectors = ("mlp", "resampler", "merger")
    if connector not in connectors:
        raise IntermodalError(f"unknown connector {connector!r}: {', '.join(connectors)}{nearest(connector, connectors)}")
    options = {
        "layer": (layer, "mlp"),
        "anyres": (anyres, "mlp"),
        "onevision": (onevision or None, "mlp"),
        "latents": (latents, "resampler"),
        "deepstack": (deepstack, "merger"),
    }
    for option, (value, wanted) in options.items():
        if value is not None and connector != wanted:
            raise IntermodalError(f"--{option} goes with --connector {wanted}")
    try:
        blocks = tuple(int(block) for block in deepstack.split(",") if block) if deepstack is not None else None
    except ValueError:
        raise IntermodalError(f"--deepstack takes numbers of blocks with commas between, got {deepstack!r}") from None
    if anyres is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", anyres):
        raise IntermodalError(f"--anyres takes grids of tiles like 1x2,2x1,2x2, got {anyres!r}")
    tiles = [tuple(int(side) for side in grid.split("x")) for grid in anyres.split(",")] if anyres else []
    decoder = load(language, dtype=dtype)
    if not isinstance(decoder, LanguageModel):
        raise IntermodalError(f"{language} is a {type(decoder).__name__}; --language wants a text-only decoder")
    if connector == "mlp":
        encoder = load_encoder(vision, dtype=dtype)
        model = join(encoder, decoder, layer=layer, anyres=tiles, onevision=onevision, seed=seed)  # pyright: ignore[reportArgumentType]
    elif connector == "resampler":
        model = stitch_resampler(load_encoder(vision, dtype=dtype), decoder, latents=latents or 64, seed=seed)
    else:
        eyes = load(vision, dtype=dtype)
        if not isinstance(eyes, DualEncoder | QwenVL):
            raise IntermodalError(
                f"{vision} is a {type(eyes).__name__}: --connector merger takes the tower of a SigLIP or Qwen-VL model"
            )
        model = stitch_native(eyes, decoder, deepstack=blocks, seed=seed)
    save(model, out)
    count = sum(p.numel() for p in model.parameters())
    say(
        {"out": str(out), "family": model.family, "parameters": count},
        as_json,
        f"{out}: {model.family} of {count:,} parameters; its connector knows nothing yet: train it with model.start={out}",
    )


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seconds: Annotated[float, typer.Option(help="How long SigLIP trains; the steps are set to fit.")] = 175.0,
    llava_seconds: Annotated[float, typer.Option(help="How long LLaVA and its blind twin train; 0 leaves them out.")] = 220.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Train SigLIP, and LLaVA, exactly this many steps instead.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on where a demo in --out was stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Train SigLIP on composed scenes for three minutes, then a LLaVA and its blind twin on its tower for four, and draw `report.html`.

    The page shows what each learned, beside what needs no learning.

    Example: `intermodal demo --out runs/demo`
    """
    from rich.console import Console

    from ..evaluate.demo import run_demo
    from ..train.loop import Stopped

    console = Console(stderr=as_json)
    try:
        report = run_demo(out, seconds, steps, console, resume=resume)
        results = json.loads((out / "report.json").read_text())
        if llava_seconds > 0:
            from ..evaluate.demo_llava import run_llava_demo

            results["llava"] = run_llava_demo(out, out / "model", llava_seconds, steps, console, resume=resume)
    except Stopped:
        raise Stopped(_STOPPED.format(verb="demo", out=out)) from None
    say({"report": str(report), **results}, as_json, f"report: {report}")


@app.command("demo-native")
def demo_native(
    out: Out = Path("runs/demo-native"),
    seconds: Annotated[float, typer.Option(help="How long the VQ-VAE and the model train; the steps are set to fit.")] = 720.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Train both exactly this many steps instead.")] = None,
    count: Annotated[int, typer.Option(help="How many held-out captions it draws.")] = 120,
    guidance: Annotated[float, typer.Option(help="Of the pictures; 1 is off.")] = 1.5,
    resume: Annotated[bool, typer.Option(help="Go on where a demo in --out was stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Train a VQ-VAE and a small Chameleon on scenes, let it draw captions it has never seen, and draw `report.html`.

    Example: `intermodal demo-native --out runs/demo-native`
    """
    from rich.console import Console

    from ..evaluate.demo_native import run_native_demo
    from ..train.loop import Stopped

    console = Console(stderr=as_json)
    try:
        page = run_native_demo(out, seconds, steps, count=count, guidance=guidance, console=console, resume=resume)
    except Stopped:
        raise Stopped(_STOPPED.format(verb="demo-native", out=out)) from None
    say({"report": str(page), **json.loads((out / "report.json").read_text())}, as_json, f"report: {page}")


@app.command()
def compare(
    first: Annotated[Path | None, typer.Argument(help="A recipe with stages; by default recipes/compare_stitched.py.")] = None,
    second: Annotated[Path | None, typer.Argument(help="Another; by default recipes/compare_native.py.")] = None,
    out: Out = Path("runs/compare"),
    seconds: Annotated[float, typer.Option(help="Training of one run, eyes and decoder; there are two runs a seed.")] = 300.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Train everything exactly this many steps instead.")] = None,
    set_first: Annotated[
        list[str] | None,
        typer.Option(help="A setting of the first recipe, `stages.fuse.optim.lr=1e-3`; may be given several times."),
    ] = None,
    set_second: Annotated[list[str] | None, typer.Option(help="The same of the second.")] = None,
    stitched_eyes: Annotated[
        Path | None, typer.Option(help="Recipe of the tower where model.vision=eyes; by default recipes/compare_siglip.py.")
    ] = None,
    native_eyes: Annotated[
        Path | None, typer.Option(help="Recipe of the VQ-VAE where model.vq=eyes; by default recipes/compare_vqvae.py.")
    ] = None,
    tiny: Annotated[bool, typer.Option(help="The recipes' smallest versions, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two recipes by measurement: equal data, equal training time, several seeds; by default a stitched and a native model.

    Writes a page, a Markdown table and JSON. A comparison that was stopped goes on with the runs that are missing.

    Examples:

    `intermodal compare --seconds 300 --out runs/compare`

    `intermodal compare recipes/native.py recipes/native.py --set-second model.decoder.depth=8 --native-eyes recipes/native_vqvae.py
    --set-first model.vq=eyes --set-second model.vq=eyes`
    """
    from ..errors import IntermodalError
    from ..lab.compare import RECIPES, Settings, Side
    from ..lab.compare import compare as measure

    if (first is None) != (second is None):
        raise IntermodalError("give two recipes, or none for the project's own")
    pair = (
        Side(first or RECIPES / "compare_stitched.py", tuple(set_first or ())),
        Side(second or RECIPES / "compare_native.py", tuple(set_second or ())),
    )
    stitched_eyes, native_eyes = stitched_eyes or RECIPES / "compare_siglip.py", native_eyes or RECIPES / "compare_vqvae.py"
    small = Settings(questions=4, signs=2, drawn=4, judge_steps=4)
    settings = dataclasses.replace(small if tiny else Settings(), seconds=seconds, seeds=seeds, steps=steps)
    page = measure(*pair, out, settings, stitched_eyes=stitched_eyes, native_eyes=native_eyes, tiny=tiny)
    say({"report": str(page), **json.loads((out / "report.json").read_text())}, as_json, (out / "report.md").read_text())
    if not as_json:
        typer.echo(f"report: {page}")


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def run(arguments: list[str]) -> NoReturn:
    """Run a verb; an error of the user's making is one line on stderr and exit code 1 (2 for a wrong command), with --debug a traceback."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments or ["--help"], standalone_mode=False, prog_name="intermodal")
    except Exception as error:
        from ..errors import IntermodalError

        if debug:
            raise
        code = 1
        if hasattr(error, "format_message"):  # typer's own: an option or verb that does not exist, a value that does not fit
            code = error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
            line = _usage(error)
        elif isinstance(error, IntermodalError | ValueError | OSError):
            line = f"error: {error}"
        else:
            line = f"internal error: {type(error).__name__}: {error} (--debug shows where)"
        if line:
            typer.echo(" ".join(line.split("\n")), err=True)
        sys.exit(130 if type(error).__name__ == "Stopped" else code)
    if code == 130:  # so typer answers a Ctrl-C that no verb has
        typer.echo("interrupted", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> str:
    """A wrong command line, and which help to read; nothing where the help has been shown instead (`intermodal data`)."""
    if not error.format_message():
        return ""
    where = f" ({error.ctx.command_path} --help shows what it takes)" if getattr(error, "ctx", None) else ""
    return f"error: {error.format_message().rstrip('.')}{where}"
