"""Copy this file. Every field has a default; what stands here is what people change first."""

from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, tiny_version

TANH = {"activation": "gelu_pytorch_tanh", "norm_eps": 1e-6}
"""What SigLIP was trained with; a CLIP has the defaults."""


def recipe(tiny: bool = False) -> Recipe:
    full = Recipe(
        name="forkme",
        # Which model. From a checkpoint instead: ModelConfig(start="a directory or hub id"), the towers are then read from it.
        model=ModelConfig(
            family="siglip",  # clip, siglip, siglip2 (NaFlex)
            vision=VisionConfig(width=192, depth=6, heads=3, mlp_width=768, image_size=64, patch_size=8, **TANH),
            text=TextConfig(width=192, depth=3, heads=3, mlp_width=768, context=24, **TANH),
            init_bias=-5.5,  # about -log(batch): how seldom a pair is right; the paper's -10 is for batches of thousands
            # tokenizer="a directory with tokenizer.json",   # None counts a small one from the captions
        ),
        # Which data. Anything `intermodal data stats` can read; several sources need weights when one of them is endless.
        data=DataConfig(train=("scenes:core", "sprites:all"), weights=(3.0, 1.0), batch=256, workers=1),
        # How fast. Linear warm-up, then a cosine to zero.
        optim=OptimConfig(lr=1e-3, warmup=50, weight_decay=0.1),
        # Which objective, how long, how much at once: micro_batch runs the encoders in parts, with equal gradients.
        train=TrainConfig(steps=500, loss="sigmoid", micro_batch=None, save_every=250),
    )
    return tiny_version(full) if tiny else full
