"""`native.py` without what keeps it stable: no norm on queries and keys, no z-loss, at a far too high rate.

`benchmarks/instability.py` runs it beside the stable one at the same rate and plots what tells them apart (Chameleon, section 2.4).
"""

from dataclasses import replace
from pathlib import Path

from intermodal.train.recipe import StagedRecipe, load_recipe


def recipe(tiny: bool = False) -> StagedRecipe:
    stable = load_recipe(Path(__file__).with_name("native.py"), tiny=tiny)
    (stage,) = stable.stages
    bare = replace(stage, z_loss=0.0, optim=replace(stage.optim, name="adamw", lr=0.03))
    decoder = replace(stable.model.decoder, qk_layernorm=False)
    return replace(stable, name="unstable", model=replace(stable.model, decoder=decoder), stages=(bare,))
