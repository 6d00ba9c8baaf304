"""Chameleon from scratch on composed scenes: one next-token model that captions, answers and draws. Train its VQ-VAE first
(`intermodal train recipes/native_vqvae.py --out runs/vqvae`) and name it in `model.vq`.

Things are of one drawing style, upright and as large as fits: what minutes on two cores can learn to draw so that a person names it.
`jitter=1` and without `styles` they stand and look as in the other recipes, and a model wants far longer.
"""

from intermodal.train.recipe import LoopConfig, NativeConfig, OptimConfig, Stage, StagedRecipe, TalksConfig, tiny_stages

LOOK = 'most=1&colour_share=0.1&plain=true&forms=1&jitter=0&styles=["noto"]'
SCENES, ALONE = (f"scenes:core?pair_share={share}&{LOOK}" for share in (0.6, 0.0))


def recipe(tiny: bool = False) -> StagedRecipe:
    stage = Stage(
        "fuse",
        learn=(("model.*", 1.0), ("lm_head.*", 1.0)),
        data=TalksConfig(
            train=(f"draws:{SCENES}", f"draws:{ALONE}", f"captions:{SCENES}", f"questions:{SCENES}", f"steps:{SCENES}"),
            weights=(2.0, 2.0, 1.0, 0.5, 0.25),
            batch=32,
            tokens=4096,
        ),
        optim=OptimConfig(name="muon", lr=1.5e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, warmup=50),
        train=LoopConfig(steps=4000, threads=2, log_every=20, save_every=1000, rollback=3.0),
        z_loss=1e-5,
    )
    full = StagedRecipe("native", NativeConfig(), (stage,))
    return tiny_stages(full) if tiny else full
