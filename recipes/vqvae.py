"""A small VQ-VAE on composed scenes at 48 px: 6 x 6 codes of 512. The first level is folded into channels (`stem`), which is what makes it
fit two cores; the rest is VQGAN's."""

from dataclasses import replace

from intermodal.models.vqvae import VQConfig
from intermodal.train.recipe import CodebookConfig, DataConfig, OptimConfig, VQRecipe, VQTrainConfig

SCENES = "scenes:core?pair_share=0.3&most=1&colour_share=0.1&plain=true&forms=1"


def recipe(tiny: bool = False) -> VQRecipe:
    full = VQRecipe(
        "vqvae",
        model=VQConfig(
            resolution=48, width=64, multipliers=(1, 1), res_blocks=1, stem=4, latent_channels=64, code_width=32, codes=512,
            mid_attention=True, groups=16,
        ),
        codebook=CodebookConfig(ema=0.99, revive=100),
        data=DataConfig(train=("sprites:core?variations=1000", SCENES), weights=(1.0, 1.0), batch=32, workers=1),
        optim=OptimConfig(name="muon", lr=1e-3, matrix_lr_factor=2.0, betas=(0.9, 0.95), weight_decay=0.0, warmup=50),
        train=VQTrainConfig(steps=3000, threads=2, log_every=25),
    )  # fmt: skip
    if not tiny:
        return full
    small = replace(full.model, width=16, groups=4, latent_channels=8, code_width=8, codes=32, resolution=16, stem=2)
    return replace(
        full,
        model=small,
        data=replace(full.data, batch=8, workers=0),
        optim=replace(full.optim, warmup=1),
        train=replace(full.train, steps=3, log_every=1),
    )
