"""The verbs that train: `train`, `demo`, `demo-native`, `compare`."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, Out, say

_STOPPED = "the demo was stopped and is kept in {out}; go on with: intermodal {verb} --out {out} --resume"
_COMPARE_STOPPED = (
    "the comparison was stopped; the runs that are done are kept in {out}, and the same command goes on with those that are missing "
    "(the run that was stopped begins anew)"
)


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

    A CLIP with the sigmoid loss, which transformers does not have, becomes a directory of open_clip's.

    Examples:

    `intermodal train recipes/siglip.py --out runs/a`

    `intermodal train recipes/clip.py 'data.train=["shards/{000..009}.tar"]' data.batch=512 train.steps=2000 --out runs/b`

    `intermodal train recipes/llava.py model.vision=runs/a/model --out runs/llava`

    `torchrun --nproc-per-node 2 -m intermodal train recipes/siglip.py train.parallel=fsdp train.threads=1 --out runs/c`
    """
    from rich.console import Console

    from ..config import override, paths
    from ..evaluate.curves import draw_curves
    from ..train.recipe import load_recipe

    made = override(load_recipe(recipe, tiny=tiny), overrides or [])
    if show:
        settings = paths(made)
        say(settings, as_json, "\n".join(f"{name}={json.dumps(value)}" for name, value in settings.items()))
        return
    console = Console(stderr=as_json)  # with --json a program reads the output: what a run has to tell goes beside it
    began = time.perf_counter()
    last_folder = _run(made, out, resume=resume, console=console, quiet=as_json)
    if int(os.environ.get("RANK", "0")) == 0:
        lines = (last_folder / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1]) if lines else {}
        took = time.perf_counter() - began
        pictures = [str(path) for path in draw_curves(out)]
        loss = f"loss {last.get('loss', float('nan')):.4f}" + (f", PSNR {last['psnr']:.1f} dB" if "psnr" in last else "")
        layout = " in open_clip's layout" if (out / "model" / "open_clip_config.json").exists() else ""
        text = f"saved {out / 'model'}{layout} ({loss}, {took:.0f} s); curves: {', '.join(pictures)}"
        say({"model": str(out / "model"), "curves": pictures, "seconds": round(took, 1), **last}, as_json, text)


def _run(recipe: Any, out: Path, **settings: Any) -> Path:
    """Train a recipe of any kind; returns the folder of its last stage, where the metrics are."""
    from ..train.recipe import StagedRecipe, VQRecipe

    if isinstance(recipe, StagedRecipe):
        from ..train.stages import train_stages

        train_stages(recipe, out, **settings)
        return out / f"{len(recipe.stages)}-{recipe.stages[-1].name}"
    if isinstance(recipe, VQRecipe):
        from ..train.vqvae import train_vqvae

        train_vqvae(recipe, out, **settings)
        return out
    from ..train.contrastive import train as train_pairs

    train_pairs(recipe, out, **settings)
    return out


def _refuse_file(out: Path) -> None:
    """Raises IntermodalError: what is to be a folder is a file."""
    if out.exists() and not out.is_dir():
        from ..errors import IntermodalError

        raise IntermodalError(f"--out {out} is a file, and a folder is wanted: give another --out")


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

    _refuse_file(out)
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


def demo_native(
    out: Out = Path("runs/demo-native"),
    seconds: Annotated[float, typer.Option(help="How long the VQ-VAE and the model train; the steps are set to fit.")] = 720.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Train both exactly this many steps instead.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many held-out captions it draws.")] = 120,
    guidance: Annotated[float, typer.Option(min=0, help="Of the pictures; 1 is off.")] = 1.5,
    resume: Annotated[bool, typer.Option(help="Go on where a demo in --out was stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Train a VQ-VAE and a small Chameleon on scenes, let it draw captions it has never seen, and draw `report.html`.

    Example: `intermodal demo-native --out runs/demo-native`
    """
    from rich.console import Console

    from ..evaluate.demo_native import run_native_demo
    from ..train.loop import Stopped

    _refuse_file(out)
    console = Console(stderr=as_json)
    try:
        page = run_native_demo(out, seconds, steps, count=count, guidance=guidance, console=console, resume=resume)
    except Stopped:
        raise Stopped(_STOPPED.format(verb="demo-native", out=out)) from None
    say({"report": str(page), **json.loads((out / "report.json").read_text())}, as_json, f"report: {page}")


def compare(
    first: Annotated[Path | None, typer.Argument(help="A recipe with stages; by default recipes/compare_stitched.py.")] = None,
    second: Annotated[Path | None, typer.Argument(help="Another; by default recipes/compare_native.py.")] = None,
    out: Out = Path("runs/compare"),
    seconds: Annotated[
        float, typer.Option(min=1, help="Training of one run, eyes and decoder; there are two runs a seed.")
    ] = 300.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Train eyes and every stage exactly this many steps instead.")] = None,
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

    Writes a page, a Markdown table and JSON. A comparison that was stopped goes on with the runs that are missing, and so does one that is
    asked for more seeds; other settings or edited recipes want another --out.

    Examples:

    `intermodal compare --seconds 300 --out runs/compare`

    `intermodal compare recipes/native.py recipes/native.py --set-second model.decoder.depth=8 --native-eyes recipes/native_vqvae.py
    --set-first model.vq=eyes --set-second model.vq=eyes`
    """
    from rich.console import Console

    from ..errors import IntermodalError
    from ..lab.compare import compare as measure
    from ..lab.sides import RECIPES, Settings, Side
    from ..train.loop import Stopped

    _refuse_file(out)
    if (first is None) != (second is None):
        raise IntermodalError("give two recipes, or none for the project's own")
    pair = (
        Side(first or RECIPES / "compare_stitched.py", tuple(set_first or ())),
        Side(second or RECIPES / "compare_native.py", tuple(set_second or ())),
    )
    small = Settings(questions=4, signs=2, read_out=(60, 20), drawn=4, judge_steps=4)
    settings = dataclasses.replace(small if tiny else Settings(), seconds=seconds, seeds=seeds, steps=steps)
    console = Console(stderr=as_json)
    try:
        page = measure(*pair, out, settings, stitched_eyes=stitched_eyes, native_eyes=native_eyes, tiny=tiny, console=console)
    except (Stopped, KeyboardInterrupt):  # a run's own advice, --resume, is not for a comparison
        raise Stopped(_COMPARE_STOPPED.format(out=out)) from None
    say({"report": str(page), **json.loads((out / "report.json").read_text())}, as_json, (out / "report.md").read_text())
    if not as_json:
        typer.echo(f"report: {page}")
