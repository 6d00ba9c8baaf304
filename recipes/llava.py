"""LLaVA from a SigLIP tower and a small decoder, on composed scenes and signs: first the projector learns from captions, then it and the
decoder from questions, with the tower at half the rate. Things stand upright and as large as fits, in all five styles: what is left of what
is learned in minutes, while things of any size and angle on any ground want far longer. Train a tower with `intermodal demo` or
`intermodal train recipes/siglip.py` and name it in `model.vision`.
"""

from dataclasses import replace

from intermodal.train.recipe import LoopConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig, tiny_stages

SCENES = "scenes:core?pair_share=0.5&most=3&pair_most=2&colour_share=0.3&lead=0.9&plain=true&jitter=0"
SIGNS = "signs?words=8&least=10&most=20"


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
            learn=(("*", 1.0), ("vision.*", 0.5), ("vision.post_layernorm.*", 0.0)),  # read before its last norm
            # captions again: questions hardly ever ask for a name, and what is where is told by names
            data=replace(
                data, train=(f"questions:{SCENES}", f"questions:{SIGNS}", f"captions:{SCENES}&forms=1"), weights=(3.0, 1.0, 1.0)
            ),
            optim=optim,
            train=replace(loop, steps=1600),
        ),
    )
    full = StagedRecipe("llava", StitchConfig(), stages)
    return tiny_stages(full) if tiny else full
