"""CLIP from scratch: a small ViT and the softmax loss, for scenes or your own shards."""

from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, tiny_version


def recipe(tiny: bool = False) -> Recipe:
    full = Recipe(
        name="clip",
        model=ModelConfig(
            family="clip",
            vision=VisionConfig(width=256, depth=6, heads=4, mlp_width=1024, activation="quick_gelu", image_size=96, patch_size=16),
            text=TextConfig(width=256, depth=4, heads=4, mlp_width=1024, activation="quick_gelu", context=77),
            embed_width=256,
            vocabulary=8192,
        ),
        data=DataConfig(train=("scenes:core",), batch=256, workers=1, crop_scale=(0.9, 1.0)),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, warmup=100),
        train=TrainConfig(steps=2000, loss="softmax", save_every=500),
    )
    return tiny_version(full) if tiny else full
