"""The stitched side of `intermodal compare`: a tower, a projector and a decoder, all learning, on what `compare_native.py` learns to read.

`model.vision="eyes"` is trained first by the comparison, from `recipes/compare_siglip.py`, within the same budget.
"""

from intermodal.models.decoder import DecoderConfig
from intermodal.train.recipe import LoopConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig, tiny_stages

SCENES = 'scenes:core?pair_share=0.4&most=3&pair_most=2&colour_share=0.4&plain=true&jitter=0&styles=["noto"]&lead=0.9'
SPRITES = "sprites:core?article=true&variations=1000"
READ = (f"captions:{SPRITES}", f"captions:{SCENES}&forms=1", f"questions:{SCENES}", "questions:signs?words=8&least=8&most=20")
DECODER = DecoderConfig(width=160, depth=4, heads=5, kv_heads=5, head_width=32, mlp_width=448, vocab_size=0, context=512)


def recipe(tiny: bool = False) -> StagedRecipe:
    stage = Stage(
        "learn",
        learn=(("*", 1.0), ("vision.*", 0.5), ("vision.post_layernorm.*", 0.0)),  # read before its last norm
        data=TalksConfig(train=READ, weights=(0.5, 1.0, 1.0, 1.0), batch=32, tokens=4096),
        optim=OptimConfig(name="muon", lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, warmup=20),
        train=LoopConfig(steps=4000, threads=2, log_every=10),
    )
    full = StagedRecipe("stitched", StitchConfig(vision="eyes", decoder=DECODER), (stage,))
    return tiny_stages(full) if tiny else full
