"""Teach a Chameleon that reads pictures to draw them (Anole, arXiv 2407.06135): only the rows of picture codes, and of a picture's begin
and end, learn, in the embedding and output tables, so what it says to words does not move. Name the model in `model.start` and captioned
pictures in the data; a released model needs its VQ decoder beside it (docs/native.md).
"""

from intermodal.train.recipe import LoopConfig, NativeConfig, OptimConfig, Stage, StagedRecipe, TalksConfig, tiny_stages


def recipe(tiny: bool = False) -> StagedRecipe:
    stage = Stage(
        "unlock",
        # embed_tokens and lm_head: one pattern for both, because a model with tied embeddings has the first alone
        learn=(("*_[ht]*.weight", 1.0),),
        image_rows_only=True,
        data=TalksConfig(train=("draws:scenes:core?forms=1",), batch=32, tokens=8192),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, warmup=20),
        train=LoopConfig(steps=500, log_every=10),
    )
    full = StagedRecipe("unlock_images", NativeConfig(start="chameleon"), (stage,))
    return tiny_stages(full) if tiny else full
