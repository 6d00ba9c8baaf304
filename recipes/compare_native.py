"""The native side of `intermodal compare`: one decoder of the same size over words and picture codes. It reads what
`compare_stitched.py` reads, and a third of its conversations ask it to draw, which the other side cannot.

`model.vq="eyes"` is trained first by the comparison, from `recipes/compare_vqvae.py`, within the same budget.
"""

from dataclasses import replace
from pathlib import Path

from intermodal.train.recipe import NativeConfig, StagedRecipe, load_recipe

SCENES = 'scenes:core?pair_share=0.4&most=3&pair_most=2&colour_share=0.4&plain=true&jitter=0&styles=["noto"]&forms=1&lead=0.9'


def recipe(tiny: bool = False) -> StagedRecipe:
    stitched = load_recipe(Path(__file__).with_name("compare_stitched.py"), tiny=tiny)
    (stage,) = stitched.stages
    train = (*stage.data.train, f"draws:{SCENES}", "draws:sprites:core?article=true&variations=1000")
    stage = replace(
        stage,
        learn=(("model.*", 1.0), ("lm_head.*", 1.0)),
        data=replace(stage.data, train=train, weights=(*stage.data.weights, 0.75, 0.75)),
        z_loss=1e-5,
    )
    decoder = replace(stitched.model.decoder, qk_layernorm=True)
    model = NativeConfig(vq="eyes", decoder=decoder, tokenizer_samples=stitched.model.tokenizer_samples)
    return StagedRecipe("native", model, (stage,))
