"""A LLaVA of a few thousand weights, pictures to talk of, and one stage that trains on them in a second."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import intermodal
from intermodal.models.clip import initialise
from intermodal.models.decoder import DecoderConfig
from intermodal.train.contrastive import build_model
from intermodal.train.recipe import LoopConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig, load_recipe
from intermodal.train.stages import train_stages
from intermodal.weights.stitch import fresh_decoder, stitch

RECIPES = Path(__file__).parents[2] / "recipes"
ASKED = "what is it ?"
QUESTION = [
    {
        "role": "user",
        "content": [{"type": "image", "image": Image.new("RGB", (32, 32), (200, 40, 90))}, {"type": "text", "text": ASKED}],
    }
]


def made(folder):
    """The model's directory, and its conversations' file."""
    words = [ASKED, *(f"it is a dog {number}" for number in range(8))]
    shape = replace(load_recipe(RECIPES / "siglip.py", tiny=True).model, family="clip")  # whose class token LLaVA leaves out
    vision = initialise(build_model(shape, lambda: words))
    decoder = fresh_decoder(DecoderConfig(48, 2, 3, 3, 16, 64, 0, context=512), words, 300)
    intermodal.save(stitch(vision, decoder), folder / "start")
    rng, rows = np.random.default_rng(0), []
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        talk = [{"from": "human", "value": f"<image>{ASKED}"}, {"from": "gpt", "value": words[1 + number]}]
        rows.append(json.dumps({"image": f"{number}.png", "conversations": talk}))
    (folder / "talks.jsonl").write_text("\n".join(rows))
    return folder


def stage(folder, name="a", learn=(("projector.*", 1.0),), steps=3, precision="fp32", **settings):
    return Stage(
        name,
        learn=learn,
        data=TalksConfig(train=(str(folder / "talks.jsonl"),), batch=2, tokens=512, workers=0),
        optim=OptimConfig(lr=1e-2, warmup=1),
        train=LoopConfig(steps=steps, precision=precision, threads=1, log_every=1, save_every=1, keep=9),
        **settings,
    )


def recipe(folder, *stages):
    return StagedRecipe("small", StitchConfig(start=str(folder / "start")), stages)


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def captioned_tar(folder, name, captions):
    """A shard in which every picture has its caption."""
    picture = (folder / "0.png").read_bytes()
    with tarfile.open(folder / name, "w") as shard:
        for number, caption in enumerate(captions):
            for ending, data in (("png", picture), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:04d}.{ending}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return folder / name


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`made` once a file of tests."""
    return made(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def two_stages(small, tmp_path_factory):
    """A run of two stages, and its recipe."""
    out = tmp_path_factory.mktemp("two")
    whole = recipe(small, stage(small), stage(small, "b", (("*", 1.0),)))
    train_stages(whole, out, quiet=True)
    return out, whole
