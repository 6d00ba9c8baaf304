"""LLaVA from a SigLIP tower and a small decoder, on composed scenes: first the projector learns from captions, then it and the decoder
from questions, with the tower at half the rate. Train a tower with `intermodal demo` or `intermodal train recipes/siglip.py` and name it in
`model.vision`.
"""

from dataclasses import replace

from intermodal.train.recipe import LoopConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig

SCENES = "scenes:core?pair_share=0.4&colour_share=0.4&word_share=0.2"


def recipe(tiny: bool = False) -> StagedRecipe:
    optim = OptimConfig(lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, warmup=20)
    loop = LoopConfig(steps=400, threads=2, log_every=20)
    data = TalksConfig(batch=32)
    stages = (
        Stage(
            "align",
            # a decoder from scratch knows no words yet: it learns them here, together with the projector
            learn=(("*", 1.0), ("vision.*", 0.0)),
            data=replace(data, train=(f"captions:{SCENES}&forms=1",)),
            optim=optim,
            train=loop,
        ),
        Stage(
            "instruct",
            # the tower learns too: it was trained to match captions, which seldom need the places and letters that questions ask for
            learn=(("*", 1.0), ("vision.*", 0.5)),
            data=replace(data, train=(f"questions:{SCENES}",)),
            optim=optim,
            train=replace(loop, steps=1600),
        ),
    )
    full = StagedRecipe("llava", StitchConfig(), stages)
    return tiny_version(full) if tiny else full


def tiny_version(full: StagedRecipe) -> StagedRecipe:
    model = replace(
        full.model, decoder=replace(full.model.decoder, width=32, depth=2, heads=2, kv_heads=2, head_width=16, mlp_width=48)
    )
    stages = tuple(
        replace(
            stage,
            data=replace(stage.data, batch=8, workers=0, tokens=256),
            optim=replace(stage.optim, warmup=1),
            train=replace(stage.train, steps=3, log_every=1),
        )
        for stage in full.stages
    )
    return replace(full, model=replace(model, tokenizer_samples=64), stages=stages)
