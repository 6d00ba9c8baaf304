"""What codes keep of a picture: originals beside reconstructions, for several codebook sizes and grids, each trained equally long.

python benchmarks/vq_sheet.py --steps 400 --out docs/vq_sheet.png
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from intermodal.config import override
from intermodal.data import sprites
from intermodal.data.compose import font, fonts_of
from intermodal.data.scenes import SceneConfig, Scenes
from intermodal.evaluate.demo_native import reconstructed
from intermodal.evaluate.judge import pixels_of
from intermodal.train.recipe import load_recipe
from intermodal.train.vqvae import psnr, train_vqvae

RECIPE = Path(__file__).parents[1] / "recipes" / "vqvae.py"
SIDE, EDGE, LABEL = 64, 3, 190
KINDS = [(64, (1, 1)), (512, (1, 1)), (2048, (1, 1)), (512, (1,)), (512, (1, 1, 1))]
"""(codes, channel multipliers): one level more halves the grid."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("vq_sheet.png"))
    asked = parser.parse_args()
    base = override(load_recipe(RECIPE), [f"train.steps={asked.steps}", f"model.resolution={SIDE}"])
    scenes = Scenes(SceneConfig(side=SIDE, plain=True, split="test", seed=3, most=2))
    pictures = [scenes.scene(index).image for index in range(6)]
    pictures += [sprites.on_background(concept.index, sprites.HELD_OUT_STYLE, SIDE) for concept in sprites.core()[:6]]
    rows = [("originals (the last six in a style never seen)", pictures)]
    for codes, multipliers in KINDS:
        recipe = replace(base, model=replace(base.model, codes=codes, multipliers=multipliers))
        with tempfile.TemporaryDirectory() as folder:
            model = train_vqvae(recipe, Path(folder) / "run", quiet=True)
            last = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        again = reconstructed(model, pictures)
        decibels = psnr((pixels_of(again) - pixels_of(pictures)).square().mean().item())
        grid = SIDE // recipe.model.shrink
        bits = grid * grid * (codes - 1).bit_length()
        label = f"{codes} codes, {grid} x {grid}, {bits} bits: {decibels:.1f} dB, {last['codebook_use']:.0%} of codes used"
        print(label)
        rows.append((label, again))
    sheet = Image.new("RGB", (LABEL + len(pictures) * (SIDE + EDGE), len(rows) * (SIDE + EDGE)), "white")
    pen, face = ImageDraw.Draw(sheet), font(next(name for name in fonts_of("train") if name == "DejaVuSans.ttf"), 11)
    for y, (label, drawn) in enumerate(rows):
        words = label.replace(" bits: ", " bits\n").replace(" dB, ", " dB\n").replace("codes, ", "codes\n").replace(" (", "\n(")
        pen.multiline_text((4, y * (SIDE + EDGE) + 4), words, font=face, fill="black")
        for x, picture in enumerate(drawn):
            sheet.paste(picture, (LABEL + x * (SIDE + EDGE), y * (SIDE + EDGE)))
    sheet.save(asked.out)
    print(f"drew {asked.out}")


if __name__ == "__main__":
    main()
