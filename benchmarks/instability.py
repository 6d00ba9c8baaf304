"""The lecture's instability, on purpose: early fusion without norms on queries and keys, z-loss and clipping, at a far too high rate
(`recipes/unstable.py`), beside the stable recipe at its own rate and at the same high one; the same data, the same start, the same steps.

    python benchmarks/instability.py --vq runs/demo-native/vqvae/model --out docs/instability.png
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from intermodal.config import override
from intermodal.train.loop import NotFinite
from intermodal.train.recipe import StagedRecipe, load_recipe
from intermodal.train.stages import train_stages

RECIPES = Path(__file__).parents[1] / "recipes"
CURVES = {
    "loss": "loss a token",
    "score_norm": "norm of a token's scores",
    "log_z": "log Z",
    "gradient_norm": "norm of the gradient",
}


def run(recipe: StagedRecipe, vq: str, steps: int, folder: Path) -> list[dict[str, float]]:
    """The logged lines of a run, to its end or to the step where its loss is no number any more."""
    recipe = override(replace(recipe, model=replace(recipe.model, vq=vq)), [f"stages.fuse.train.steps={steps}"])
    recipe = override(recipe, ["stages.fuse.train.log_every=2"])
    try:
        train_stages(recipe, folder, quiet=True)
    except NotFinite as error:
        print(f"{recipe.name}: {str(error).split(';')[0]}")
    return [json.loads(line) for line in (folder / "1-fuse" / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vq", required=True, help="a trained VQ-VAE (intermodal train recipes/vqvae.py)")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--out", type=Path, default=Path("instability.png"))
    asked = parser.parse_args()
    stable, bare = (
        override(load_recipe(RECIPES / "native.py"), ["stages.fuse.optim.name=adamw"]),
        load_recipe(RECIPES / "unstable.py"),
    )
    rate = bare.stages[0].optim.lr
    high = replace(override(stable, [f"stages.fuse.optim.lr={rate}"]), name=f"stable at {rate:g}")
    stable, bare = (replace(r, name=f"{r.name} at {r.stages[0].optim.lr:g}") for r in (replace(stable, name="stable"), bare))
    runs = {}
    for recipe in (stable, high, bare):
        with tempfile.TemporaryDirectory() as folder:
            runs[recipe.name] = run(recipe, asked.vq, asked.steps, Path(folder) / "run")
        last, lowest = runs[recipe.name][-1], min(row["loss"] for row in runs[recipe.name])
        highest = max(row["score_norm"] for row in runs[recipe.name])
        print(
            f"{recipe.name}: step {last['step']}, loss {last['loss']:.2f} (lowest {lowest:.2f}), highest norm of scores {highest:.0f}"
        )

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(13, 2.9), layout="constrained")
    for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
        for (name, rows), colour in zip(runs.items(), ("#2b5fb3", "#3a8f4d", "#c05a1e"), strict=True):
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], label=name, color=colour)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.set_yscale("log" if key != "loss" else "linear")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.savefig(asked.out, dpi=110)
    print(f"drew {asked.out}")


if __name__ == "__main__":
    main()
