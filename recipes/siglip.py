"""SigLIP from scratch on composed scenes: the demo's recipe."""

from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, tiny_version


def recipe(tiny: bool = False) -> Recipe:
    full = Recipe(
        name="siglip",
        model=ModelConfig(
            family="siglip",
            vision=VisionConfig(
                width=192,
                depth=4,
                heads=3,
                mlp_width=768,
                activation="gelu_pytorch_tanh",
                norm_eps=1e-6,
                image_size=48,
                patch_size=8,
            ),
            text=TextConfig(
                width=128, depth=2, heads=2, mlp_width=512, activation="gelu_pytorch_tanh", norm_eps=1e-6, vocab_size=1, context=24
            ),
        ),
        data=DataConfig(train=("scenes:core",), batch=256, workers=1),
        optim=OptimConfig(lr=1.5e-3, warmup=40, weight_decay=0.05),
        train=TrainConfig(steps=300, loss="sigmoid", threads=2),
    )
    return tiny_version(full) if tiny else full
