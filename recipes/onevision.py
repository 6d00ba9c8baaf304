"""Stages as LLaVA-OneVision trains them (arXiv 2408.03326, table 1): the projector alone on captions, then everything with the tower
at a fifth of the rate, on single pictures and last on any mix, clips among it. Start from a OneVision directory, and name data:

    intermodal train recipes/onevision.py model.start=llava-hf/llava-onevision-qwen2-0.5b-si-hf \\
        'stages.align.data.train=["captions:photos/"]' 'stages.single.data.train=["single.jsonl"]' \\
        'stages.onevision.data.train=["single.jsonl","several.jsonl","clips.jsonl"]' --out runs/onevision

With `model.vision` and `model.language` instead one is made of them (a fresh small decoder where the second is left out). Without data of
one's own it reads composed scenes, which shows that it runs.
"""

from dataclasses import replace

from intermodal.train.recipe import LoopConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig, tiny_stages

SCENES = "scenes:core?pair_share=0.4&colour_share=0.4"
GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))


def recipe(tiny: bool = False) -> StagedRecipe:
    everything = (("*", 1.0), ("vision.*", 0.2), ("vision.post_layernorm.*", 0.0))  # read before its last norm
    optim = OptimConfig(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup=100)
    loop = LoopConfig(steps=1000, log_every=10, save_every=500)
    data = TalksConfig(batch=64, tokens=8192, workers=2)
    stages = (
        Stage(
            "align",
            learn=(("projector.*", 1.0),),
            data=replace(data, train=(f"captions:{SCENES}&forms=1",)),
            optim=replace(optim, lr=1e-3),
            train=loop,
        ),
        *(
            Stage(name, learn=everything, data=replace(data, train=(f"questions:{SCENES}",)), optim=optim, train=loop)
            for name in ("single", "onevision")
        ),
    )
    full = StagedRecipe("onevision", StitchConfig(anyres=GRIDS, onevision=True), stages)
    return tiny_stages(full) if tiny else full
