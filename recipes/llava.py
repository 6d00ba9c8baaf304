"""LLaVA from a SigLIP tower and a small decoder, on composed scenes: first the projector learns from captions, then it and the decoder
from questions, with the tower at half the rate. Train a tower with `intermodal demo` or `intermodal train recipes/siglip.py` and name it in
`model.vision`.
"""

from dataclasses import replace

from intermodal.train.recipe import LoopConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig, tiny_stages

SCENES = "scenes:core?pair_share=0.4&colour_share=0.4&word_share=0.2"


def recipe(tiny: bool = False) -> StagedRecipe:
    optim = OptimConfig(name="muon", lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, warmup=20)
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
    return tiny_stages(full) if tiny else full
