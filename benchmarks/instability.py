"""The lecture's instability, on purpose: early fusion without norms on queries and keys and without z-loss, at a far too high rate
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
from intermodal.evaluate.curves import curves
from intermodal.train.loop import NotFinite
from intermodal.train.recipe import StagedRecipe, load_recipe
from intermodal.train.stages import train_stages

RECIPES = Path(__file__).parents[1] / "recipes"


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
        norms, attention = (max(row[key] for row in runs[recipe.name]) for key in ("score_norm", "attention_score"))
        print(
            f"{recipe.name}: step {last['step']}, loss {last['loss']:.2f} (lowest {lowest:.2f}), highest norm of scores {norms:.0f}, "
            f"largest score in attention {attention:.0f}"
        )

    asked.out.write_bytes(curves(runs))
    print(f"drew {asked.out}")


if __name__ == "__main__":
    main()
