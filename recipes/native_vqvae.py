"""The codes of `native.py`: `vqvae.py` on the very scenes that the model is to draw, so that none of 512 codes goes to anything else."""

from dataclasses import replace
from pathlib import Path

from intermodal.train.recipe import VQRecipe, load_recipe


def recipe(tiny: bool = False) -> VQRecipe:
    base, native = (load_recipe(Path(__file__).with_name(name), tiny=tiny) for name in ("vqvae.py", "native.py"))
    drawn = tuple(spec.removeprefix("draws:") for spec in native.stages[0].data.train if spec.startswith("draws:"))
    return replace(base, data=replace(base.data, train=drawn[:1], weights=None))
