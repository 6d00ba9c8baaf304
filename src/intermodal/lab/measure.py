"""What a model of conversations can be measured by: answers, captions, signs, what its eyes keep of a picture, what it draws."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..batch import Visual
from ..config import from_dict, to_dict
from ..data.questions import SIGN_QUESTION
from ..data.scenes import SceneConfig, Scenes
from ..data.signs import SignConfig, Signs
from ..data.talks import user
from ..evaluate.demo_native import DRAW_SEED, JUDGE_SEED, asked_kinds, decoded, reconstructed
from ..evaluate.judge import Judge, pixels_of, ranked, shares, train_judge, verdicts
from ..evaluate.vqa import Asked, accuracy, ask, captions, held_out_questions, majority, source_of
from ..files import read_json, write_whole
from ..models.chameleon import Chameleon
from ..models.clip import DualEncoder
from ..models.generative import Generative
from ..models.llava import Llava
from ..models.vit import SiglipVisionTower
from ..train.recipe import StagedRecipe
from ..train.vqvae import psnr
from ..weights.load import load
from .sides import Settings

RIDGE = 1e-3
FRESH_JUDGE = 3
"""Times the steps, for a judge that begins with random weights."""
FEWEST = 4
"""Signs of a height are shown where at least so many of the words fit, or all where a recipe has fewer."""


@dataclass(frozen=True)
class Exam:
    """What a model is asked about: pictures as its own recipe draws them."""

    scenes: SceneConfig
    """Those that questions are about."""
    captioned: SceneConfig
    drawn: SceneConfig
    """Of the side that the model draws."""
    signs: Signs
    heights: dict[int, int]
    """How many words fit in letters of each height that signs are shown in."""
    questions: list[Asked]


def asked_about(recipe: StagedRecipe, settings: Settings, side: int) -> Exam:
    """The scenes, signs and questions for a model of a recipe: of the size that its last stage learned from.

    Args:
        side: pixels of a side of the model's pictures, which are those learned from where the stage does not say another.

    Raises:
        IntermodalError: the recipe's scenes hardly ever answer a kind of question that it asks.
    """
    shown = recipe.stages[-1].data.side or side
    scenes = scene_config(recipe, shown)
    signs = Signs(replace(sign_config(recipe, shown), seed=DRAW_SEED, least=min(settings.heights)))
    fitting = {height: len(signs.fitting(height)) for height in settings.heights}
    heights = {height: words for height, words in fitting.items() if words >= min(FEWEST, signs.config.words)}
    return Exam(
        scenes,
        scene_config(recipe, shown, "captions"),
        replace(scene_config(recipe, shown, "draws"), side=side),
        signs,
        heights,
        held_out_questions(scenes, each=settings.questions, kinds=asked_kinds(recipe)),
    )


def reading(model: Generative, recipe: StagedRecipe, settings: Settings, folder: Path) -> dict[str, Any]:
    """Every measure of one model; pictures that it draws are left in `folder`/drawn, to be judged with those of other runs."""
    exam = asked_about(recipe, settings, model.picture_side)
    drawn = folder / "drawn"
    out = {
        "native": isinstance(model, Chameleon),
        "learns_to_draw": any(spec.startswith(("draws:", "steps:")) for stage in recipe.stages for spec in stage.data.train),
        "asked_about": {"scenes": to_dict(exam.scenes), "captions": to_dict(exam.captioned), "signs": to_dict(exam.signs.config)},
        "questions": accuracy(exam.questions, ask(model, exam.questions)),
        "questions_majority": accuracy(exam.questions, majority(exam.scenes, exam.questions)),
        "captions": captions(model, exam.captioned, settings.questions, seed=DRAW_SEED),
        "signs": signs_read(model, exam.signs, exam.heights, settings.signs),
        "signs_guess": {str(height): 1 / words for height, words in exam.heights.items()},
        "signs_left_out": [height for height in settings.heights if height not in exam.heights],
        "tokens_per_image": tokens_per_image(model, exam.scenes.side),
        "kept": kept(model, looked_at(model, exam), settings.read_out),
        "vocabulary": model.config_text.vocab_size,
    }
    if isinstance(model, Chameleon) and _decodes(model) and not _is_drawn(drawn, exam.drawn, settings.drawn):
        draw(model, exam.drawn, settings.drawn, drawn)
    return out


def tried(model: Generative, recipe: StagedRecipe, settings: Settings) -> None:
    """Ask a model that has learned nothing yet for what can fail with some kinds of models: better now than after it is trained.

    Raises:
        IntermodalError: as `asked_about`.
    """
    exam = asked_about(recipe, settings, model.picture_side)
    tokens_per_image(model, exam.scenes.side)
    kept(model, looked_at(model, exam), (1, 1))


def _decodes(model: Chameleon) -> bool:
    """Whether its codes can be made into pictures: a VQ-VAE may have come without a decoder."""
    return model.vqmodel.decoder is not None


def looked_at(model: Generative, exam: Exam) -> SceneConfig:
    """The scenes that `kept` shows: a VQ-VAE takes pictures of its own size only."""
    return replace(exam.scenes, side=model.picture_side) if isinstance(model, Chameleon) else exam.scenes


def scene_config(recipe: StagedRecipe, side: int, first: str = "questions") -> SceneConfig:
    """The scenes of the recipe's conversations of a kind, else of any, else the usual ones."""
    scenes = source_of(recipe, Scenes, side, first)
    return scenes.config if scenes else SceneConfig(side=side)


def sign_config(recipe: StagedRecipe, side: int) -> SignConfig:
    """The signs that the recipe asks about, else the usual ones."""
    signs = source_of(recipe, Signs, side)
    return signs.config if signs else SignConfig(side=side)


def signs_read(model: Generative, signs: Signs, heights: Iterable[int], each: int) -> dict[str, float]:
    """Words of fresh signs in the fonts of the training, read exactly right, by the font's size in pixels; every sign has that size.

    The words that fit take turns, each in a font in which it fits: the larger the letters, the narrower the fonts.
    """
    shown = [(height, signs.sign(index, height)) for height in heights for index in range(each)]
    said = model.generate_batch([[user(sign.image, SIGN_QUESTION)] for _, sign in shown], slots=64, max_new_tokens=12)
    right: dict[str, list[bool]] = {}
    for (height, sign), reply in zip(shown, said, strict=True):
        right.setdefault(str(height), []).append(reply.text.strip() == sign.word)
    return {height: float(np.mean(found)) for height, found in right.items()}


def tokens_per_image(model: Generative, side: int) -> int:
    """How many tokens a picture of `side` pixels a side takes."""
    assert model.processor is not None
    conversation = model.processor.conversation([user(Image.new("RGB", (side, side)), "x")], reply=True)
    return sum(len(plan) for plan in conversation.plans)


@torch.no_grad()
def kept(model: Generative, config: SceneConfig, read_out: tuple[int, int]) -> dict[str, float | None]:
    """What is left of a picture behind the eyes, as PSNR in dB: of the best linear map from a patch's features to its pixels, where what
    the eyes say belongs to patches, and of the model's own decoder, where it has one.

    Args:
        read_out: how many pictures the map is fitted on, and how many others it is tested on.
    """
    fitted = read_out[0]
    source = Scenes(replace(config, seed=DRAW_SEED))
    pictures = [source.scene(index).image for index in range(sum(read_out))]
    pixels = pixels_of(pictures)
    out: dict[str, float | None] = {"linear": _read_out(model, pictures, pixels, fitted), "decoder": None}
    if isinstance(model, Chameleon) and _decodes(model):
        again = reconstructed(model.vqmodel, pictures[fitted:])
        out["decoder"] = psnr((pixels_of(again) - pixels[fitted:]).square().mean().item())
    return out


def _read_out(model: Generative, pictures: Sequence[Image.Image], pixels: Tensor, fitted: int) -> float | None:
    """PSNR of the linear map, fitted on the first `fitted` pictures, in the others; None where there are no features of patches."""
    found = [features(model, pictures[at : at + 100]) for at in range(0, len(pictures), 100)]
    known_ones = [part for part in found if part is not None]
    if len(known_ones) < len(found):
        return None
    features_NTD = torch.cat(known_ones)
    grid = round(features_NTD.shape[1] ** 0.5)
    if pixels.shape[-1] % grid:
        return None  # the tower sees the picture at another size, in patches of no whole number of its pixels
    size = pixels.shape[-1] // grid
    patches_NTK = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    ones = features_NTD.new_ones(*features_NTD.shape[:2], 1)
    x = torch.cat([features_NTD, ones], -1)
    known, unknown = x[:fitted].flatten(0, 1), x[fitted:].flatten(0, 1)
    gram = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1])
    weights = torch.linalg.solve(gram, known.T @ patches_NTK[:fitted].flatten(0, 1))
    error = ((unknown @ weights).clamp(-1, 1) - patches_NTK[fitted:].flatten(0, 1)).square().mean()
    return psnr(error.item())


def features(model: Generative, pictures: Sequence[Image.Image]) -> Tensor | None:
    """(N, T, D) what the eyes say of the T patches, row by row, of pictures of one size, before anything of the decoder's, each feature of
    about unit size; None where what they say is of no square of patches."""
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
            row = _patch_states(model, batch.visual)
            if row is None:
                return None
            rows.append(row)
        found = torch.stack(rows)
    return found / found.pow(2).mean().sqrt()


def _patch_states(model: Generative, visual: Visual) -> Tensor | None:
    """(T, D) the tower's states of one picture, row by row of its patches; None where they are of no square of patches."""
    states = model.states(visual)[0]
    if visual.grids is not None:
        tower: Any = model.visual  # every family with grids calls it so
        (frames, rows, columns), merge = visual.grids[0], tower.config.merge
        if frames != 1 or rows != columns:
            return None
        # the m x m patches that are merged into one token stand together
        return states.unflatten(0, (rows // merge, columns // merge, merge, merge)).transpose(1, 2).flatten(0, 3)
    if len(states) > 1 and not isinstance(model, Llava):
        return None  # several views, and no knowing which is the whole picture
    whole = states[0]  # a LLaVA's first view, before the tiles of AnyRes
    return whole if round(len(whole) ** 0.5) ** 2 == len(whole) else None


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
    (folder / "scores.json").unlink(missing_ok=True)  # of other drawings
    write_whole(folder / "said.json", json.dumps({**said, "scenes": to_dict(config)}, indent=1) + "\n")


def _is_drawn(folder: Path, config: SceneConfig, count: int) -> bool:
    """Whether a folder holds what `draw` would leave there: of a run that is measured again."""
    if not (folder / "said.json").exists():
        return False
    said = read_json(folder / "said.json")
    before = from_dict(SceneConfig, said["scenes"])
    return len(said["captions"]) == count and replace(before, forms=config.forms) == config  # phrasings are nothing of a picture's


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
        write_whole(folder / "scores.json", json.dumps(scores, indent=1) + "\n")


def _judges(config: SceneConfig, encoders: Sequence[DualEncoder], steps: int) -> tuple[Judge, DualEncoder | None]:
    """The classifier for scenes of a kind, from the tower of the first encoder of their size where that is a plain SigLIP's; and that
    encoder."""
    encoder = next((model for model in encoders if model.config.vision.image_size == config.side), None)
    # a CLIP's tower has a class token before its patches, and a NaFlex one wants packed patches: the classifier takes neither
    tower = encoder.vision if encoder is not None and type(encoder.vision) is SiglipVisionTower else None
    steps = steps if tower is not None else FRESH_JUDGE * steps
    return train_judge(replace(config, seed=JUDGE_SEED), tower=tower, steps=steps, progress=False), encoder


def _cut(sheet: Path, side: int) -> list[Image.Image]:
    picture = Image.open(sheet).convert("RGB")
    return [picture.crop((left, 0, left + side, side)) for left in range(0, picture.width, side)]
