"""What AnyRes and native resolution are for: one small decoder reads words from a picture squeezed to a square, from AnyRes tiles and
from patches of the whole picture, after equal training from scratch; exactly right answers by the height of the letters.

    python benchmarks/reading.py --out docs/reading.png

The tower sees squares of half the picture's side. All three see the same signs in the same order; the font of the test is not trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import intermodal
from intermodal.data.questions import SIGN_QUESTION
from intermodal.data.signs import SignConfig, Signs
from intermodal.data.talks import open_talks, user
from intermodal.inputs.image import ImageProcessor
from intermodal.inputs.processor import PairProcessor
from intermodal.models.clip import DualConfig, SigLIP, initialise
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import Generative
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.recipe import LoopConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig
from intermodal.train.stages import spoken, train_stages
from intermodal.weights.stitch import fresh_decoder, stitch
from intermodal.weights.stitch_native import stitch_native

SIDE, TOWER, PATCH = 96, 48, 6
HEIGHTS = (8, 10, 12, 14, 17, 20, 24, 28)
KINDS = {"square": "one square of 48 px", "anyres": "AnyRes, 2 x 2 tiles of 48 px", "native": "native resolution, 96 px"}
TEXT = DecoderConfig(width=128, depth=3, heads=4, kv_heads=4, head_width=32, mlp_width=384, vocab_size=0, context=1024)


def build(kind: str, source: str) -> Generative:
    """A fresh model of about 1.4M parameters; the parts of all three start alike."""
    vision = VisionConfig(128, 3, 4, 512, image_size=TOWER, patch_size=PATCH, activation="gelu_pytorch_tanh", norm_eps=1e-6)
    tower = SigLIP(DualConfig(vision, TextConfig(32, 1, 2, 64, vocab_size=64, context=8, eos_id=1), 128))
    initialise(tower, 0)
    tower.processor = PairProcessor(ImageProcessor((TOWER, TOWER)), None, "siglip")
    language = fresh_decoder(replace(TEXT, qk_norm=kind == "native"), spoken([open_talks(source, side=SIDE)], 200), 64)
    if kind == "native":
        language.family = "qwen3"
        return stitch_native(tower, language)
    return stitch(tower, language, anyres=((2, 2),) if kind == "anyres" else ())


def train(kind: str, source: str, steps: int, folder: Path) -> tuple[Generative, float]:
    """(the trained model, seconds)."""
    start = intermodal.save(build(kind, source), folder / "start")
    stage = Stage(
        "read",
        learn=(("*", 1.0),),
        data=TalksConfig(train=(source,), batch=32, tokens=16_384, side=SIDE),
        optim=OptimConfig(name="muon", lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, warmup=30),
        train=LoopConfig(steps=steps, threads=2, log_every=50, precision="fp32"),
    )
    began = time.perf_counter()
    model = train_stages(StagedRecipe(kind, StitchConfig(start=str(start)), (stage,)), folder / "run")
    return model, time.perf_counter() - began


def read(model: Generative, signs: Signs, height: int, count: int) -> float:
    """The share of signs of this height that are read exactly."""
    shown = [signs.sign(index, height) for index in range(count)]
    replies = model.generate_batch([[user(sign.image, SIGN_QUESTION)] for sign in shown], slots=32, max_new_tokens=12)
    return sum(reply.text.strip() == sign.word for reply, sign in zip(replies, shown, strict=True)) / count


def draw(results: dict[str, dict[str, Any]], chance: float, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for (kind, row), colour in zip(results.items(), ("#c05a1e", "#2b5fb3", "#3a8f4d"), strict=False):
        axis.plot(HEIGHTS, [100 * row["right"][str(h)] for h in HEIGHTS], marker="o", label=KINDS[kind], color=colour)
    axis.axhline(100 * chance, color="grey", linestyle=":", label="a guess")
    axis.set_xlabel(f"size of the font in a picture of {SIDE} px")
    axis.set_ylabel("words read exactly, %")
    axis.set_ylim(0, 101)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="steps of 32 signs, for each model")
    parser.add_argument("--words", type=int, default=16, help="how many different words there are")
    parser.add_argument("--count", type=int, default=100, help="test signs of each height")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which models")
    parser.add_argument("--out", type=Path, default=Path("reading.png"))
    asked = parser.parse_args()
    torch.set_num_threads(2)
    source = f"questions:signs?least={HEIGHTS[0]}&most={HEIGHTS[-1]}&words={asked.words}"
    test = Signs(SignConfig(side=SIDE, least=HEIGHTS[0], most=HEIGHTS[-1], words=asked.words, fonts="test", seed=1))
    results: dict[str, dict[str, Any]] = {}
    for kind in asked.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            model, seconds = train(kind, source, asked.steps, Path(folder))
        tokens = len(model.processor([user(test.sign(0).image, SIGN_QUESTION)]).ids)  # pyright: ignore[reportOptionalCall]
        right = {str(height): read(model, test, height, asked.count) for height in HEIGHTS}
        results[kind] = {"seconds": round(seconds), "tokens": tokens, "right": right}
    table = Table(title=f"{asked.words} words, {asked.steps} steps of 32 signs; words read exactly, by font size")
    for column in ("", "seconds", "tokens", *map(str, HEIGHTS)):
        table.add_column(column, justify="left" if not column else "right")
    for kind, row in results.items():
        table.add_row(KINDS[kind], f"{row['seconds']}", f"{row['tokens']}", *(f"{row['right'][str(h)]:.0%}" for h in HEIGHTS))
    Console(width=120).print(table)
    asked.out.with_suffix(".json").write_text(json.dumps({**vars(asked), "out": None, "results": results}, indent=2) + "\n")
    draw(results, 1 / asked.words, asked.out)
    print(f"drew {asked.out}")


if __name__ == "__main__":
    main()
