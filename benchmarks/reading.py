"""What AnyRes and native resolution are for: a tower that can read at its own size meets pictures of twice its side, squeezed to a square,
cut into AnyRes tiles, or as patches of the whole picture; exactly right answers by the height of the letters.

    python benchmarks/reading.py --out reading.png

What stands in OUT's .json with the same settings is not run again: a call that was stopped goes on with the models that are missing.

The tower learns from captions (SigLIP) on signs of 48 px. Each of the three then gets it as eyes, a fresh decoder of one size, and the same
conversations about signs of 96 px in the same order; everything learns. Asked are fresh signs in the fonts of the training, and in one
that is in no training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

import intermodal
from intermodal.data.questions import SIGN_QUESTION
from intermodal.data.signs import SignConfig, Signs
from intermodal.data.talks import open_talks, user
from intermodal.models.clip import DualEncoder
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import Generative
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.contrastive import train as train_pairs
from intermodal.train.recipe import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    Stage,
    StagedRecipe,
    StitchConfig,
    TalksConfig,
    TrainConfig,
)
from intermodal.train.stages import spoken, train_stages
from intermodal.weights.stitch import fresh_decoder, stitch
from intermodal.weights.stitch_native import stitch_native

SIDE, TOWER, PATCH = 96, 48, 6
HEIGHTS = (6, 8, 10, 12, 14, 17, 20, 24)
SEEN, UNSEEN = "fonts of the training", "a font never seen"
FONTS: dict[str, Literal["train", "test"]] = {SEEN: "train", UNSEEN: "test"}
KINDS = {"square": "one square of 48 px", "anyres": "AnyRes, 2 x 2 tiles of it", "native": "native resolution"}
DECODER = DecoderConfig(width=128, depth=3, heads=4, kv_heads=4, head_width=32, mlp_width=384, vocab_size=0, context=1024)
TANH = {"activation": "gelu_pytorch_tanh", "norm_eps": 1e-6}


def signs_of(words: int, least: int, most: int) -> str:
    return f"signs?words={words}&least={least}&most={most}"


def train_eyes(words: int, steps: int, folder: Path) -> DualEncoder:
    """A SigLIP that tells signs of its own size apart by their word, in every height that a squeezed or a whole picture will have."""
    recipe = Recipe(
        "eyes",
        model=ModelConfig(
            family="siglip",
            vision=VisionConfig(128, 3, 4, 512, image_size=TOWER, patch_size=PATCH, **TANH),
            text=TextConfig(64, 1, 2, 256, context=6, **TANH),
            init_bias=-4.0,
        ),
        data=DataConfig(train=(signs_of(words, 5, HEIGHTS[-1]),), batch=64),
        optim=OptimConfig(name="muon", lr=1e-3, matrix_lr_factor=3.0, warmup=40, weight_decay=0.05, scalar_lr_factor=10.0),
        train=TrainConfig(steps=steps, loss="sigmoid", duplicates="ignore", threads=2, log_every=25),
    )
    return train_pairs(recipe, folder)


def build(kind: str, eyes: DualEncoder, source: str) -> Generative:
    """A model of about 1.4M parameters; the parts of all three start alike."""
    language = fresh_decoder(replace(DECODER, qk_norm=kind == "native"), spoken([open_talks(source, side=SIDE)], 200), 64)
    if kind == "native":
        language.family = "qwen3"
        return stitch_native(eyes, language)
    return stitch(eyes, language, anyres=((2, 2),) if kind == "anyres" else ())


def train(kind: str, eyes: DualEncoder, source: str, steps: int, folder: Path) -> tuple[Generative, float]:
    """(the trained model, seconds)."""
    start = intermodal.save(build(kind, eyes, source), folder / "start")
    stage = Stage(
        "read",
        # the tower at half the rate: what it knows of letters is wanted, and in the native model its positions are new to it
        learn=(("*", 1.0), ("visual.*" if kind == "native" else "vision.*", 0.5)),
        data=TalksConfig(train=(source,), batch=32, tokens=16_384, side=SIDE),
        optim=OptimConfig(name="muon", lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, warmup=20),
        train=LoopConfig(steps=steps, threads=2, log_every=10),
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
        for name, line in ((SEEN, "-"), (UNSEEN, "--")):
            label = KINDS[kind] if name == SEEN else None
            axis.plot(HEIGHTS, [100 * row["right"][name][str(h)] for h in HEIGHTS], line, marker="o", label=label, color=colour)
    axis.axhline(100 * chance, color="grey", linestyle=":", label="a guess")
    axis.set_xlabel(f"size of the font in a picture of {SIDE} px (dashed: a font never seen)")
    axis.set_ylabel("words read exactly, %")
    axis.set_xticks(HEIGHTS)
    axis.set_ylim(0, 101)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of 32 signs, for each model")
    parser.add_argument("--eyes-steps", type=int, default=1000, help="steps of 64 signs, for the tower")
    parser.add_argument("--eyes", type=Path, help="folder for the tower: trained into it, or found there")
    parser.add_argument("--words", type=int, default=8, help="how many different words there are")
    parser.add_argument("--count", type=int, default=100, help="test signs of each height")
    parser.add_argument("--out", type=Path, default=Path("reading.png"))
    asked = parser.parse_args()
    torch.set_num_threads(2)
    source = f"questions:{signs_of(asked.words, HEIGHTS[0], HEIGHTS[-1])}"
    config = SignConfig(side=SIDE, least=HEIGHTS[0], most=HEIGHTS[-1], words=asked.words, seed=1)
    tests = {name: Signs(replace(config, fonts=side)) for name, side in FONTS.items()}
    settings = {"words": asked.words, "steps": asked.steps, "eyes_steps": asked.eyes_steps, "count": asked.count}
    file = asked.out.with_suffix(".json")
    found = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, dict[str, Any]] = found["results"] if found.get("settings") == settings else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.eyes or Path(scratch) / "eyes"
        for kind in [kind for kind in KINDS if kind not in results]:
            if not (folder / "model").exists():
                train_eyes(asked.words, asked.eyes_steps, folder)
            eyes = intermodal.load(folder / "model")
            model, seconds = train(kind, eyes, source, asked.steps, Path(scratch) / kind)
            tokens = len(model.processor([user(tests[SEEN].sign(0).image, SIGN_QUESTION)]).ids)  # pyright: ignore[reportOptionalCall]
            right = {name: {str(h): read(model, signs, h, asked.count) for h in HEIGHTS} for name, signs in tests.items()}
            results[kind] = {"seconds": round(seconds), "tokens": tokens, "right": right}
            file.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    results = {kind: results[kind] for kind in KINDS}
    table = Table(title=f"{asked.words} words, {asked.steps} steps of 32 signs; words read exactly, by font size")
    for column in ("", "seconds", "tokens", "font", *map(str, HEIGHTS)):
        table.add_column(column, justify="right" if column[:1] not in ("", "f") else "left")
    for kind, row in results.items():
        for name, right in row["right"].items():
            table.add_row(KINDS[kind], f"{row['seconds']}", f"{row['tokens']}", name, *(f"{right[str(h)]:.0%}" for h in HEIGHTS))
    Console(width=124).print(table)
    draw(results, 1 / asked.words, asked.out)
    print(f"drew {asked.out}")


if __name__ == "__main__":
    main()
