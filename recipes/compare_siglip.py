"""The stitched side's eyes in `intermodal compare`: `siglip.py` on the scenes of the comparison and on signs, which it is to read."""

from dataclasses import replace
from pathlib import Path

from intermodal.train.recipe import Recipe, load_recipe

SCENES = 'scenes:core?pair_share=0.4&most=3&pair_most=2&colour_share=0.4&plain=true&jitter=0&styles=["noto"]&forms=1&lead=0.9'
SIGNS = "signs?words=8&least=8&most=20"


def recipe(tiny: bool = False) -> Recipe:
    base = load_recipe(Path(__file__).with_name("siglip.py"), tiny=tiny)
    sprites = base.data.train[0]
    return replace(base, data=replace(base.data, train=(sprites, SCENES, SIGNS), weights=(1.0, 1.0, 1.0)))
