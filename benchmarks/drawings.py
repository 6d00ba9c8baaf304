"""Judge a native model that was trained on, as `make demo-native` judges its own: the page, the numbers, a sheet of drawings.

python benchmarks/drawings.py runs/longer --siglip runs/demo-native/siglip/model --out runs/longer-judged
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import intermodal
from intermodal.evaluate.curves import logged
from intermodal.evaluate.demo_native import RECIPES, report
from intermodal.models.chameleon import Chameleon
from intermodal.models.clip import SigLIP
from intermodal.train.fit import with_stage_steps
from intermodal.train.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of recipes/native.py")
    parser.add_argument("--siglip", required=True, help="a SigLIP trained on what is drawn (the demo leaves one)")
    parser.add_argument("--out", type=Path, default=Path("drawings"))
    asked = parser.parse_args()
    model, siglip = intermodal.load(asked.run / "model"), intermodal.load(asked.siglip)
    assert isinstance(model, Chameleon)
    assert isinstance(siglip, SigLIP)
    recipe = load_recipe(RECIPES / "native.py")
    (stage,) = recipe.stages
    rows = logged(asked.run / f"1-{stage.name}")
    recipe = with_stage_steps(recipe, [rows[-1]["step"]])
    seconds = sum((b["step"] - a["step"]) * stage.data.batch / b["samples_per_second"] for a, b in pairwise(rows))
    print(f"report: {report(model, recipe, asked.run, asked.out, {'seconds': seconds}, siglip)}")


if __name__ == "__main__":
    main()
