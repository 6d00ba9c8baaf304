"""SigLIP 2 NaFlex from scratch: pictures keep their shape, any grid of at most 64 patches."""

from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, tiny_version

TANH = {"activation": "gelu_pytorch_tanh", "norm_eps": 1e-6}


def recipe(tiny: bool = False) -> Recipe:
    full = Recipe(
        name="siglip2-naflex",
        model=ModelConfig(
            family="siglip2",
            vision=VisionConfig(width=192, depth=6, heads=3, mlp_width=768, image_size=64, patch_size=8, **TANH),
            text=TextConfig(width=192, depth=3, heads=3, mlp_width=768, context=24, **TANH),
            max_patches=64,
        ),
        data=DataConfig(train=("scenes:core",), batch=256, workers=1),
        optim=OptimConfig(lr=1e-3, warmup=100, weight_decay=0.05),
        train=TrainConfig(steps=2000, loss="sigmoid", save_every=500),
    )
    return tiny_version(full) if tiny else full
