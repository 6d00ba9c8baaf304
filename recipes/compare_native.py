"""The native side of `intermodal compare`: one decoder of the same size over words and picture codes. It reads what
`compare_stitched.py` reads, and a third of its conversations ask it to draw, which the other side cannot.

`model.vq="eyes"` is trained first by the comparison, from `recipes/compare_vqvae.py`, within the same budget.
"""

from dataclasses import replace

from intermodal.models.decoder import DecoderConfig
from intermodal.train.recipe import LoopConfig, NativeConfig, OptimConfig, Stage, StagedRecipe, TalksConfig, tiny_stages

SCENES = "scenes:core?pair_share=0.4&most=3&colour_share=0.4&plain=true"
READ = (f"captions:{SCENES}&forms=1", f"questions:{SCENES}", "questions:signs?words=24&least=6")
DECODER = DecoderConfig(width=160, depth=4, heads=5, kv_heads=5, head_width=32, mlp_width=448, vocab_size=0, context=512)


def recipe(tiny: bool = False) -> StagedRecipe:
    stage = Stage(
        "learn",
        learn=(("model.*", 1.0), ("lm_head.*", 1.0)),
        data=TalksConfig(
            train=(*READ, f"draws:{SCENES}&forms=1", "draws:sprites:core?article=true&variations=1000"),
            weights=(1.0, 1.0, 1.0, 0.75, 0.75),
            batch=32,
            tokens=4096,
        ),
        optim=OptimConfig(name="muon", lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, warmup=20),
        train=LoopConfig(steps=4000, threads=2, log_every=10),
        z_loss=1e-5,
    )
    full = StagedRecipe("native", NativeConfig(vq="eyes", decoder=replace(DECODER, qk_layernorm=True)), (stage,))
    return tiny_stages(full) if tiny else full
