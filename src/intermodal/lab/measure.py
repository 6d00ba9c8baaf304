"""What a model of conversations can be measured by: answers, captions, signs, what its eyes keep of a picture, what it draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from ..evaluate.vqa import Asked, accuracy, ask, asked_of, captions, held_out_questions, majority
from ..models.chameleon import Chameleon
from ..models.clip import DualEncoder
from ..models.generative import Generative
from ..models.vit import SiglipVisionTower
from ..train.recipe import StagedRecipe
from ..train.vqvae import psnr
from ..weights.load import load
from .sides import Settings

RIDGE = 1e-3


@dataclass(frozen=True)
class Exam:
    """What a model is asked about: pictures as its own recipe draws them."""

    scenes: SceneConfig
    signs: Signs
    questions: list[Asked]


def asked_about(recipe: StagedRecipe, settings: Settings, side: int) -> Exam:
    """The scenes, signs and questions for a model of a recipe whose pictures have `side` pixels a side.

    Raises:
        IntermodalError: the recipe's scenes hardly ever answer a kind of question that it asks.
    """
    scenes = scene_config(recipe, side)
    signs = Signs(replace(sign_config(recipe, side), seed=DRAW_SEED, least=min(settings.heights)))
    return Exam(scenes, signs, held_out_questions(scenes, each=settings.questions, kinds=asked_kinds(recipe)))


def reading(model: Generative, recipe: StagedRecipe, settings: Settings, folder: Path) -> dict[str, Any]:
    """Every measure of one model; pictures that it draws are left in `folder`/drawn, to be judged with those of other runs."""
    exam = asked_about(recipe, settings, model.picture_side)
    out = {
        "native": isinstance(model, Chameleon),
        "learns_to_draw": any(spec.startswith(("draws:", "steps:")) for stage in recipe.stages for spec in stage.data.train),
        "asked_about": {"scenes": to_dict(exam.scenes), "signs": to_dict(exam.signs.config)},
        "questions": accuracy(exam.questions, ask(model, exam.questions)),
        "questions_majority": accuracy(exam.questions, majority(exam.scenes, exam.questions)),
        "captions": captions(model, exam.scenes, settings.questions, seed=DRAW_SEED),
        "signs": signs_read(model, exam.signs, settings.heights, settings.signs),
        "signs_guess": 1 / exam.signs.config.words,
        "tokens_per_image": tokens_per_image(model),
        "kept": kept(model, exam.scenes, settings.read_out),
    }
    if isinstance(model, Chameleon):
        draw(model, exam.scenes, settings.drawn, folder / "drawn")
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
def kept(model: Generative, config: SceneConfig, read_out: tuple[int, int]) -> dict[str, float | None]:
    """What is left of a picture behind the eyes, as PSNR in dB: of the best linear map from a token's features to its patch of pixels, and
    of the model's own decoder where it has one.

    Args:
        read_out: how many pictures the map is fitted on, and how many others it is tested on.
    """
    fitted = read_out[0]
    source = Scenes(replace(config, seed=DRAW_SEED))
    pictures = [source.scene(index).image for index in range(sum(read_out))]
    features_NTD = torch.cat([features(model, pictures[at : at + 100]) for at in range(0, len(pictures), 100)])
    pixels = pixels_of(pictures)
    grid = round(features_NTD.shape[1] ** 0.5)
    size = pixels.shape[-1] // grid
    patches_NTK = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    ones = features_NTD.new_ones(*features_NTD.shape[:2], 1)
    x = torch.cat([features_NTD, ones], -1)
    known, unknown = x[:fitted].flatten(0, 1), x[fitted:].flatten(0, 1)
    gram = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1])
    weights = torch.linalg.solve(gram, known.T @ patches_NTK[:fitted].flatten(0, 1))
    error = ((unknown @ weights).clamp(-1, 1) - patches_NTK[fitted:].flatten(0, 1)).square().mean()
    out: dict[str, float | None] = {"linear": psnr(error.item()), "decoder": None}
    if isinstance(model, Chameleon):
        again = reconstructed(model.vqmodel, pictures[fitted:])
        out["decoder"] = psnr((pixels_of(again) - pixels[fitted:]).square().mean().item())
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
    said = {"side": config.side, "drew": [bool(reply.images) for reply in replies], "captions": [f.caption() for f in facts]}
    (folder / "said.json").write_text(json.dumps({**said, "scenes": to_dict(config)}, indent=1) + "\n")


def judge_drawings(folders: Sequence[Path], models: Sequence[str], steps: int) -> None:
    """Write `scores.json` into folders of `draw`: a classifier of real scenes names what it sees, and a CLIP or SigLIP ranks
    the captions.

    Args:
        models: trained eyes of the comparison; the first CLIP or SigLIP of the pictures' size is the second judge, and gives its tower to
            the first where that can take it.
    """
    encoders = [found for path in models if isinstance(found := load(path), DualEncoder)]
    judges: dict[SceneConfig, tuple[Judge, DualEncoder | None]] = {}
    for folder in folders:
        said = json.loads((folder / "said.json").read_text())
        config = from_dict(SceneConfig, said["scenes"])
        if config not in judges:
            judges[config] = _judges(config, encoders, steps)
        judge, encoder = judges[config]
        source = Scenes(replace(config, split="test", seed=DRAW_SEED))
        facts = [source.facts(index) for index in range(len(said["captions"]))]
        sheets = {name: _cut(folder / f"{name}.png", config.side) for name in ("drawn", "real", "codes", "noise")}
        sheets["drawn for another caption"] = sheets["drawn"][1:] + sheets["drawn"][:1]
        scores: dict[str, Any] = {
            "began": sum(said["drew"]),
            "count": len(facts),
            "ranked_by": type(encoder).__name__ if encoder else None,
        }
        for name, pictures in sheets.items():
            own = ranked(encoder, pictures, facts) if encoder is not None else None
            scores[name] = {**shares(verdicts(judge, pictures, facts)), "ranked": float(np.mean(own)) if own is not None else None}
        (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


def _judges(config: SceneConfig, encoders: Sequence[DualEncoder], steps: int) -> tuple[Judge, DualEncoder | None]:
    """The classifier for scenes of a kind, from the tower of the first encoder of their size where that is a plain SigLIP's; and that
    encoder."""
    encoder = next((model for model in encoders if model.config.vision.image_size == config.side), None)
    # a CLIP's tower has a class token before its patches, and a NaFlex one wants packed patches: the classifier takes neither
    tower = encoder.vision if encoder is not None and type(encoder.vision) is SiglipVisionTower else fresh_tower(config.side)
    return train_judge(replace(config, seed=JUDGE_SEED), tower=tower, steps=steps, progress=False), encoder


def _cut(sheet: Path, side: int) -> list[Image.Image]:
    picture = Image.open(sheet).convert("RGB")
    return [picture.crop((left, 0, left + side, side)) for left in range(0, picture.width, side)]
