"""open_clip's ViT-B-32 from scratch, on shards of your own: name them in `data.train`, and a directory with CLIP's tokenizer files in
`model.tokenizer`.

    intermodal train recipes/clip_vit_b32.py 'data.train=["shards/{000..099}.tar"]' model.tokenizer=clip-vit-base-patch32/ --out runs/b32

Each of a rank's eight workers holds its whole share of a batch, 0.15 MB a picture: on one rank 0.6 GB a worker, on eight ranks an eighth
of that.
Not run to the end here: it wants GPUs. The `tiny` version is tested.
"""

from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, tiny_version


def recipe(tiny: bool = False) -> Recipe:
    full = Recipe(
        name="clip_vit_b32",
        model=ModelConfig(
            family="clip",
            vision=VisionConfig(width=768, depth=12, heads=12, mlp_width=3072, image_size=224, patch_size=32),
            text=TextConfig(width=512, depth=12, heads=8, mlp_width=2048, context=77),
            embed_width=512,
            vocabulary=49408,
        ),
        data=DataConfig(train=("scenes:all",), batch=4096, workers=8, prefetch=1, crop_scale=(0.9, 1.0)),
        optim=OptimConfig(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, warmup=2000),
        train=TrainConfig(steps=100_000, loss="softmax", micro_batch=512, save_every=2000),
    )
    return tiny_version(full) if tiny else full
