"""The native side's eyes in `intermodal compare`: `vqvae.py` on the scenes of the comparison and on signs, which it is to read."""

from dataclasses import replace
from pathlib import Path

from intermodal.train.recipe import VQRecipe, load_recipe

SCENES = 'scenes:core?pair_share=0.4&most=3&pair_most=2&colour_share=0.4&plain=true&jitter=0&styles=["noto"]'


def recipe(tiny: bool = False) -> VQRecipe:
    base = load_recipe(Path(__file__).with_name("vqvae.py"), tiny=tiny)
    train = ("sprites:core?variations=1000", SCENES, "signs?words=8&least=8&most=20")
    return replace(base, data=replace(base.data, train=train, weights=(1.0, 1.0, 1.0)))
