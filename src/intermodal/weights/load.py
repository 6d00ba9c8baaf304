"""`load` and `save`: a directory of the field's own files in, the same out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, IntermodalError, nearest
from ..files import read_json
from ..inputs import image as images
from ..inputs import text as texts
from ..inputs.processor import PairProcessor
from ..models.clip import DualConfig, DualEncoder
from ..models.vit import resize_positions
from . import clip, open_clip
from .files import read_weights, write_weights
from .rules import check_against, convert


def load(
    source: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu", image_size: int | None = None
) -> DualEncoder:
    """A model with its processor from a directory or a Hugging Face hub id.

    Args:
        source: a directory in Hugging Face's layout (`clip`, `siglip`, `siglip2`) or open_clip's, or a hub id to download.
        dtype: of the weights, by name or as a torch dtype.
        image_size: resample the vision tower's positions for square pictures of this side (bicubic; not for NaFlex).

    Raises:
        CheckpointError: says which file or key is wrong.
    """
    folder = _folder(source)
    if (folder / "open_clip_config.json").exists() and not (folder / "config.json").exists():
        family, config, rules, state, raw = open_clip.read(folder)
    else:
        raw = read_json(folder / "config.json")
        family = raw.get("model_type")
        if family not in clip.FAMILIES:
            known = ", ".join(clip.FAMILIES)
            raise CheckpointError(
                f"{folder / 'config.json'}: model_type {family!r} is not one of {known}{nearest(str(family), clip.FAMILIES)}"
            )
        config = clip.from_hf(raw)
        rules, state = clip.rules(family, config), read_weights(folder)
    try:
        native = convert(state, rules)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    try:
        with torch.device("meta"):
            model = clip.build(family, config)
    except IntermodalError as error:
        raise CheckpointError(f"{folder}: its config cannot be built: {error}") from error
    check_against(native, model, str(folder))
    model.source = {"config": raw, "folder": str(folder)}
    processor = _processor(folder, family, config, raw)
    if image_size is not None and image_size != config.vision.image_size:
        model, native, processor = _resized(model, native, processor, family, image_size)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model.load_state_dict({key: value.to(device=device, dtype=kind, copy=True) for key, value in native.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.processor = processor
    return model.eval()


def save(model: DualEncoder, folder: str | Path, *, layout: str = "hf", shard_bytes: int = 5_000_000_000) -> Path:
    """Write a directory that transformers (or open_clip, with `layout="open_clip"`) loads with equal logits.

    Raises:
        CheckpointError: the layout cannot hold this model.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if layout == "open_clip":
        open_clip.write(model, target)
    elif layout == "hf":
        family = clip.family_of(model)
        state = convert(model.state_dict(), clip.rules(family, model.config), saving=True)
        write_weights(state, target, shard_bytes=shard_bytes)
        (target / "config.json").write_text(json.dumps(clip.to_hf(model), indent=2) + "\n")
    else:
        raise CheckpointError(f"unknown layout {layout!r}: hf or open_clip{nearest(layout, ('hf', 'open_clip'))}")
    if model.processor is not None:
        model.processor.save(target)
    return target


def _folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the directory that holds config.json")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text} is neither a directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*pytorch_model*.bin"]
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise CheckpointError(f"cannot download {text} from the hub, and no such directory exists: {error}") from error


def _processor(folder: Path, family: str, config: DualConfig, raw: dict[str, Any]) -> PairProcessor:
    settings = images.read_processor(folder)
    vision = config.vision
    if family == "siglip2":
        defaults = {**images.SIGLIP2_DEFAULTS, "patch_size": vision.patch_size}
        pictures: images.ImageProcessor | images.NaflexProcessor = images.NaflexProcessor.from_hf(settings, defaults)
    else:
        defaults = images.CLIP_DEFAULTS if family == "clip" else images.SIGLIP_DEFAULTS
        if not settings:  # no file: the class's recipe at the tower's own size
            settings = open_clip.image_settings(raw, vision.image_size) if "model_cfg" in raw else {}
            side = vision.image_size
            square = {"height": side, "width": side}
            settings = settings or {"size": {"shortest_edge": side} if family == "clip" else square, "crop_size": square}
        pictures = images.ImageProcessor.from_hf(settings, defaults)
    text = config.text
    tokenizer = texts.from_folder(folder, family, context=text.context, eos_id=text.eos_id, pad_id=text.pad_id)
    return PairProcessor(pictures, tokenizer, family)


def _resized(model: DualEncoder, state, processor: PairProcessor, family: str, side: int):
    if family == "siglip2" or not isinstance(processor.images, images.ImageProcessor):
        raise CheckpointError(
            "a NaFlex tower takes any size as it is: set `model.processor.images.max_patches` instead of image_size"
        )
    config = replace(model.config, vision=replace(model.config.vision, image_size=side))
    grid = (config.vision.grid, config.vision.grid)
    key = "vision.position_embedding"
    state = {**state, key: resize_positions(state[key], grid, prefix=1 if family == "clip" else 0)}
    with torch.device("meta"):
        resized = clip.build(family, config)
    resized.source = model.source
    return resized, state, replace(processor, images=processor.images.for_size(side))
