"""`make demo`: train SigLIP on scenes in three minutes, score it beside the baselines, draw a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..data import sprites
from ..data.readers import open_source
from ..data.scenes import Scenes
from ..errors import IntermodalError
from ..models.clip import DualEncoder
from ..parallel import checkpoint
from ..train.contrastive import train
from ..train.fit import fit, with_steps
from ..train.recipe import Recipe, load_recipe
from . import report
from .plan import Plan, told_of_bf16
from .scenes import BASELINES, SceneTask, scene_baselines, sprite_classes, sprite_names, sprite_pixels
from .zeroshot import confusions

RECIPE = Path(__file__).parents[3] / "recipes" / "siglip.py"
FORMS = 1
"""The recipe trains on the first phrasing only."""


def run_demo(out: Path, seconds: float, steps: int | None, console: Console | None = None, *, resume: bool = False) -> Path:
    """Train, score and draw; returns the report's path.

    Args:
        seconds: time for training; the steps are set to fit by a short trial.
        steps: so many, instead.
        resume: go on where an earlier demo in `out` was stopped; else that is replaced.

    Raises:
        IntermodalError: the recipe is not there (the package was installed without its source tree), `out` holds other things than a
            demo, or the run was interrupted (after saving).
    """
    console = console or Console()
    if not RECIPE.exists():
        raise IntermodalError("the demo's recipe is in the source tree: clone the project and run `make demo` there")
    plan = Plan.begin(out, resume)
    bf16 = told_of_bf16(console, "docs/demo.md", "--seconds 770 --llava-seconds 820")
    recipe = plan.settled(
        "siglip", load_recipe(RECIPE), lambda made: with_steps(made, steps) if steps else fit(made, out / "trial", seconds)
    )
    console.print(f"{recipe.train.steps} steps of {recipe.data.batch} pictures")
    with plan.clock("siglip"):
        model = train(recipe, out, resume=checkpoint.latest(out) is not None, console=console)
    console.print("scoring: held-out combinations, the unseen style, baselines ...")
    results = score(model, recipe)
    results["training"] = {
        "seconds": round(plan.seconds["siglip"], 1),
        "steps": recipe.train.steps,
        "images seen": recipe.train.steps * recipe.data.batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cores": torch.get_num_threads(),
        "products": "bf16" if bf16 else "fp32",
    }
    (out / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    page = report.write(out, model, recipe, results)
    console.print(summary(results))
    return page


def score(model: DualEncoder, recipe: Recipe, count: int = 2000, among: int = 500) -> dict[str, Any]:
    """Every number of the report, each beside its baselines.

    Args:
        count: held-out scenes of each style.
        among: how many of them compete in retrieval.
    """
    side = recipe.model.vision.image_size
    out: dict[str, Any] = {"scenes": {}, "sprites": {}}
    trained_on = next(source.config for spec in recipe.data.train if isinstance(source := open_source(spec), Scenes))
    for name, style in (("training styles", None), (f"unseen style ({sprites.HELD_OUT_STYLE})", sprites.HELD_OUT_STYLE)):
        task = SceneTask.make(count, side, style=style, forms=FORMS, among=min(count, among))
        image = model.embed_images([scene.pixels for scene in task.scenes])
        baselines = scene_baselines(task, training=trained_on)
        rows = {key: {"model": value} for key, value in task.score(image, model.embed_texts).items() if "text_to_image" not in key}
        for key, row in rows.items():
            row |= {baseline: getattr(baselines, baseline)[key] for baseline in BASELINES}
        out["scenes"][name] = rows
    for which in ("core", "all"):
        pool = sprites.core() if which == "core" else sprites.concepts()
        unseen = sprite_names(model.embed_images, model.embed_texts, side, which)
        seen = sprite_names(model.embed_images, model.embed_texts, side, which, style="noto")
        out["sprites"][which] = {
            "concepts": len(pool),
            "unseen style top-1": unseen["top-1"],
            "unseen style top-5": unseen["top-5"],
            "training style (noto) top-1": seen["top-1"],
            "chance": 1 / len(pool),
            "nearest raw pixels top-1": sprite_pixels(side, which)["top-1"],
        }
    pool = sprites.core()
    pictures = [sprites.on_background(c.index, sprites.HELD_OUT_STYLE, side) for c in pool]
    wrong = confusions(model.embed_images(pictures), sprite_classes(model.embed_texts), range(len(pool)))
    out["confusions"] = [[pool[true].noun, pool[guess].noun] for true, guess in wrong]
    return out


def summary(results: dict[str, Any]) -> Table:
    """The report's numbers for the terminal."""
    table = Table(title="what the model does, beside what needs no learning", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for column in ("", "model", *(name.replace("_", " ") for name in BASELINES)):
        table.add_column(column, justify="left" if not column else "right", no_wrap=not column)
    for name, rows in results["scenes"].items():
        table.add_row(f"[bold]scenes, {name}[/bold]")
        for key, row in rows.items():
            table.add_row(
                f" {key.replace('image_to_text_recall', 'recall')}",
                *(f"{row[c]:.1%}" for c in ("model", *BASELINES)),
            )
    table.add_row("[bold]single sprites, unseen style[/bold]")
    for which, row in results["sprites"].items():
        known = {"model": "unseen style top-1", "chance": "chance", "raw_pixels": "nearest raw pixels top-1"}
        cells = (f"{row[known[column]]:.1%}" if column in known else "" for column in ("model", *BASELINES))
        table.add_row(f" {which} {row['concepts']}, top-1", *cells)
    return table
