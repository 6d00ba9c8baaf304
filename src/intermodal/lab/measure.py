"""What a model of conversations can be measured by: answers, captions, signs, what its eyes keep of a picture, what it draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import from_dict, to_dict
from ..data.questions import SIGN_QUESTION
from ..data.scenes import SceneConfig, Scenes
from ..data.signs import SignConfig, Signs
from ..data.talks import SceneTalks, SignTalks, user
from ..evaluate.demo_native import DRAW_SEED, JUDGE_SEED, asked_kinds, decoded, reconstructed
from ..evaluate.judge import Judge, fresh_tower, pixels_of, ranked, shares, train_judge, verdicts
from ..evaluate.vqa import accuracy, ask, asked_of, captions, held_out_questions, majority
from ..models.chameleon import Chameleon
from ..models.clip import SigLIP
from ..models.generative import Generative
from ..models.vit import SiglipVisionTower
from ..train.recipe import StagedRecipe
from ..train.vqvae import psnr
from ..weights.load import load

RIDGE = 1e-3
READ_OUT = (800, 200)
"""Pictures that the linear read-out is fitted on, and tested on."""


def reading(model: Generative, recipe: StagedRecipe, settings: Any, folder: Path) -> dict[str, Any]:
    """Every measure of one model; pictures that it draws are left in `folder`/drawn, to be judged with those of other runs."""
    config = scene_config(recipe, model.picture_side)
    kinds = asked_kinds(recipe)
    asked = held_out_questions(config, each=settings.questions, kinds=kinds)
    signs = Signs(replace(sign_config(recipe, model.picture_side), seed=DRAW_SEED, least=min(settings.heights)))
    answers = accuracy(asked, ask(model, asked))
    out = {
        "questions": answers,
        "questions_majority": accuracy(asked, majority(config, asked)),
        "captions": captions(model, config, settings.questions, seed=DRAW_SEED),
        "signs": signs_read(model, signs, settings.heights, settings.signs),
        "signs_guess": 1 / signs.config.words,
        "tokens_per_image": tokens_per_image(model),
        "kept": kept(model, config),
    }
    if isinstance(model, Chameleon):
        draw(model, config, settings.drawn, folder / "drawn")
    return out


def scene_config(recipe: StagedRecipe, side: int) -> SceneConfig:
    """The scenes that the recipe asks about, else the usual ones."""
    talks = asked_of(recipe, SceneTalks, side)
    return talks.scenes.config if talks else SceneConfig(side=side)


def sign_config(recipe: StagedRecipe, side: int) -> SignConfig:
    """The signs that the recipe asks about, else the usual ones."""
    talks = asked_of(recipe, SignTalks, side)
    return talks.signs.config if talks else SignConfig(side=side)


def signs_read(model: Generative, signs: Signs, heights: Sequence[int], each: int) -> dict[str, float]:
    """Words of fresh signs in the fonts of the training, read exactly right, by the font's size in pixels."""
    shown = [(height, signs.sign(index, height)) for height in heights for index in range(each)]
    said = model.generate_batch([[user(sign.image, SIGN_QUESTION)] for _, sign in shown], slots=64, max_new_tokens=12)
    right: dict[str, list[bool]] = {}
    for (height, sign), reply in zip(shown, said, strict=True):
        right.setdefault(str(height), []).append(reply.text.strip() == sign.word)
    return {height: float(np.mean(found)) for height, found in right.items()}


def tokens_per_image(model: Generative) -> int:
    assert model.processor is not None
    side = model.picture_side
    conversation = model.processor.conversation([user(Image.new("RGB", (side, side)), "x")], reply=True)
    return sum(len(plan) for plan in conversation.plans)


@torch.no_grad()
def kept(model: Generative, config: SceneConfig) -> dict[str, float | None]:
    """What is left of a picture behind the eyes, as PSNR in dB: of the best linear map from a token's features to its patch of pixels, and
    of the model's own decoder where it has one."""
    source = Scenes(replace(config, seed=DRAW_SEED))
    pictures = [source.scene(index).image for index in range(sum(READ_OUT))]
    features_NTD = torch.cat([features(model, pictures[at : at + 100]) for at in range(0, len(pictures), 100)])
    pixels = pixels_of(pictures)
    grid = round(features_NTD.shape[1] ** 0.5)
    size = pixels.shape[-1] // grid
    patches_NTK = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    ones = features_NTD.new_ones(*features_NTD.shape[:2], 1)
    x = torch.cat([features_NTD, ones], -1)
    known, unknown = x[: READ_OUT[0]].flatten(0, 1), x[READ_OUT[0] :].flatten(0, 1)
    gram = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1])
    weights = torch.linalg.solve(gram, known.T @ patches_NTK[: READ_OUT[0]].flatten(0, 1))
    error = ((unknown @ weights).clamp(-1, 1) - patches_NTK[READ_OUT[0] :].flatten(0, 1)).square().mean()
    out: dict[str, float | None] = {"linear": psnr(error.item()), "decoder": None}
    if isinstance(model, Chameleon):
        again = reconstructed(model.vqmodel, pictures[READ_OUT[0] :])
        out["decoder"] = psnr((pixels_of(again) - pixels[READ_OUT[0] :]).square().mean().item())
    return out


def features(model: Generative, pictures: Sequence[Image.Image]) -> Tensor:
    """(N, T, D) what the eyes say of pictures of one size, before anything of the decoder's, each feature of about unit size."""
    if isinstance(model, Chameleon):
        vq = model.vqmodel
        codes = vq.encode(pixels_of(pictures))
        found = vq.quantize.table()[codes].flatten(1, 2)
    else:
        assert model.processor is not None
        rows = []
        for picture in pictures:
            batch = model.processor([user(picture, "x")], reply=True)
            assert batch.visual is not None
            rows.append(model.states(batch.visual)[0].flatten(0, -2))
        found = torch.stack(rows)
    return found / found.pow(2).mean().sqrt()


def draw(model: Chameleon, config: SceneConfig, count: int, folder: Path) -> None:
    """Draw held-out captions into `folder`, with what the judges compare them with: the real scenes, those through the codes, noise."""
    source = Scenes(replace(config, split="test", seed=DRAW_SEED))
    facts = [source.facts(index) for index in range(count)]
    told = [[user(None, f"draw {fact.caption()}")] for fact in facts]
    replies = model.generate_batch(
        told, slots=32, max_new_tokens=4, max_images=1, image_temperature=0.5, image_top_p=0.95, guidance=1.5
    )
    folder.mkdir(parents=True, exist_ok=True)
    grey = Image.new("RGB", (config.side, config.side), (128, 128, 128))
    real = [source.scene(index).image for index in range(count)]
    torch.manual_seed(0)
    noise = decoded(model.vqmodel, torch.randint(model.config.vq.codes, (count, model.config.grid, model.config.grid)))
    columns = {
        "drawn": [reply.images[0] if reply.images else grey for reply in replies],
        "real": real,
        "codes": reconstructed(model.vqmodel, real),
        "noise": noise,
    }
    for name, pictures in columns.items():
        sheet = Image.new("RGB", (config.side * count, config.side))
        for index, picture in enumerate(pictures):
            sheet.paste(picture, (index * config.side, 0))
        sheet.save(folder / f"{name}.png")
    said = {"side": config.side, "began": sum(bool(reply.images) for reply in replies), "captions": [f.caption() for f in facts]}
    (folder / "said.json").write_text(json.dumps({**said, "scenes": to_dict(config)}, indent=1) + "\n")


def judge_drawings(folders: Sequence[Path], models: Sequence[str], steps: int) -> None:
    """Write `scores.json` into folders of `draw`: a classifier of real scenes names what it sees, and a SigLIP ranks the captions.

    Args:
        models: SigLIP models of the comparison; the first gives the second judge, and its tower to the first.
    """
    siglips = [found for path in models if isinstance(found := load(path), SigLIP)]
    judges: dict[SceneConfig, tuple[Judge, SigLIP | None]] = {}
    for folder in folders:
        said = json.loads((folder / "said.json").read_text())
        config = from_dict(SceneConfig, said["scenes"])
        if config not in judges:
            judges[config] = _judges(config, siglips, steps)
        judge, siglip = judges[config]
        source = Scenes(replace(config, split="test", seed=DRAW_SEED))
        facts = [source.facts(index) for index in range(len(said["captions"]))]
        sheets = {name: _cut(folder / f"{name}.png", config.side) for name in ("drawn", "real", "codes", "noise")}
        sheets["drawn for another caption"] = sheets["drawn"][1:] + sheets["drawn"][:1]
        scores: dict[str, Any] = {"began": said["began"], "count": len(facts)}
        for name, pictures in sheets.items():
            rank = float(np.mean(ranked(siglip, pictures, facts))) if siglip is not None else None
            scores[name] = {**shares(verdicts(judge, pictures, facts)), "siglip": rank}
        (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


def _judges(config: SceneConfig, siglips: Sequence[SigLIP], steps: int) -> tuple[Judge, SigLIP | None]:
    """The classifier for scenes of a kind, from the first SigLIP of their size where there is one; and that SigLIP."""
    siglip = next((model for model in siglips if model.config.vision.image_size == config.side), None)
    tower = fresh_tower(config.side) if siglip is None else siglip.vision
    assert isinstance(tower, SiglipVisionTower)
    return train_judge(replace(config, seed=JUDGE_SEED), tower=tower, steps=steps, progress=False), siglip


def _cut(sheet: Path, side: int) -> list[Image.Image]:
    picture = Image.open(sheet).convert("RGB")
    return [picture.crop((left, 0, left + side, side)) for left in range(0, picture.width, side)]
