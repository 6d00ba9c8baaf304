"""CLIP's loss against SigLIP's at several batch sizes for equal samples seen: the lecture's claim, measured.

    python benchmarks/loss_comparison.py [--samples 32768] [--batches 64 256 1024 4096] [--seeds 3] [--out docs/loss_comparison]

One SigLIP tower pair (the demo's), scenes and sprites, the same order of samples for both losses; large batches run in micro-batches.
The score is retrieval of the true caption among 400 held-out scenes in the training styles, and naming of the sixty core sprites in a
training style. Writes OUT.json after every run (a later call goes on) and OUT.png at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

from intermodal.evaluate.demo import FORMS
from intermodal.evaluate.scenes import SceneTask, sprite_names
from intermodal.train.contrastive import train
from intermodal.train.recipe import Recipe, load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "siglip.py"


def variant(recipe: Recipe, loss: str, batch: int, seed: int, samples: int) -> Recipe:
    """The demo's recipe at another batch: rate by the square root of the batch, bias at the batch's base rate."""
    base = recipe.data.batch
    steps = max(1, samples // batch)
    return replace(
        recipe,
        model=replace(recipe.model, init_bias=-math.log(batch)),
        data=replace(recipe.data, batch=batch, seed=seed),
        optim=replace(recipe.optim, lr=recipe.optim.lr * math.sqrt(min(batch, 1024) / base), warmup=max(2, steps // 10)),
        train=replace(recipe.train, loss=loss, steps=steps, seed=seed, micro_batch=min(batch, 256), log_every=max(1, steps // 5)),
    )


def score(recipe: Recipe) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model = train(recipe, folder, quiet=True)
    side = recipe.model.vision.image_size
    task = SceneTask.make(400, side, style=None, forms=FORMS)
    found = task.score(model.embed_images([scene.pixels for scene in task.scenes]), model.embed_texts)
    names = sprite_names(model.embed_images, model.embed_texts, side, style="noto")
    return {"retrieval@5": found["image_to_text_recall@5"], "names top-1": names["top-1"], "names top-5": names["top-5"]}


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key in zip(axes, ("retrieval@5", "names top-5"), strict=True):
        for loss, colour in (("sigmoid", "#2b5fb3"), ("softmax", "#c2622d")):
            mine = [row for row in rows if row["loss"] == loss]
            batches = sorted({row["batch"] for row in mine})
            groups = [[row[key] for row in mine if row["batch"] == batch] for batch in batches]
            means = [sum(group) / len(group) for group in groups]
            axis.plot(batches, means, "o-", color=colour, label="SigLIP (sigmoid)" if loss == "sigmoid" else "CLIP (softmax)")
            axis.fill_between(batches, [min(g) for g in groups], [max(g) for g in groups], color=colour, alpha=0.15)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("batch")
        axis.set_title(f"{key}, equal samples seen", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=32768)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/loss_comparison"))
    arguments = parser.parse_args()
    recipe, file = load_recipe(RECIPE), arguments.out.with_suffix(".json")
    rows = json.loads(file.read_text()) if file.exists() else []
    for seed in range(arguments.seeds):
        for batch in arguments.batches:
            for loss in ("sigmoid", "softmax"):
                what = {"loss": loss, "batch": batch, "seed": seed, "samples": arguments.samples}
                if any(what.items() <= row.items() for row in rows):
                    continue
                rows.append({**what, **score(variant(recipe, loss, batch, seed, arguments.samples))})
                file.write_text(json.dumps(rows, indent=1) + "\n")
                print(rows[-1], flush=True)
    plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
