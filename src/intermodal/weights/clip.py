"""Hugging Face `clip`, `siglip` and `siglip2` <-> ours: key tables and config."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..inputs import image as images
from ..inputs import text as texts
from ..inputs.processor import PairProcessor
from ..models.clip import CLIP, DualConfig, DualEncoder, SigLIP
from ..models.text import TextConfig
from ..models.vit import VisionConfig, resize_positions
from . import open_clip_config
from .rules import Ignore, Rename, Reshape, Rule, Split

# What transformers' config classes default to: a config.json may leave out what equals them.
_DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32,
             hidden_act="quick_gelu", layer_norm_eps=1e-5, num_channels=3),
        dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=49408,
             max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49407, pad_token_id=1,
             bos_token_id=49406),
    ),
    "siglip": (
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16,
             hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, num_channels=3),
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
             max_position_embeddings=64, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, eos_token_id=1, pad_token_id=1,
             bos_token_id=49406),
    ),
}  # fmt: skip
_DEFAULTS["siglip2"] = (
    {**_DEFAULTS["siglip"][0], "num_patches": 256},
    {**_DEFAULTS["siglip"][1]},
)

FAMILIES = tuple(_DEFAULTS)


def _tower(side: str) -> list[Rule]:
    return [
        Ignore(f"{side}_model.embeddings.position_ids"),
        Rename(f"{side}_model.embeddings.position_embedding.weight", f"{side}.position_embedding"),
        Rename(f"{side}_model.encoder.{{rest}}", f"{side}.encoder.{{rest}}"),
    ]


def rules(family: str, config: DualConfig) -> list[Rule]:
    """The key table of a family. Shapes come from the config where a checkpoint stores values in another shape."""
    patch = config.vision.patch_size
    conv = (config.vision.width, config.vision.channels, patch, patch)
    table: list[Rule] = [
        *_tower("vision"),
        *_tower("text"),
        Rename("text_model.embeddings.token_embedding.weight", "text.token_embedding.weight"),
        Rename("text_model.final_layer_norm.{rest}", "text.final_layer_norm.{rest}"),
        Rename("vision_model.post_layernorm.{rest}", "vision.post_layernorm.{rest}"),
    ]
    patch_key, our_patch = "vision_model.embeddings.patch_embedding.weight", "vision.patch_embedding.weight"
    if family == "siglip2":
        table.append(Rename(patch_key, our_patch))
    else:
        table.append(Reshape(patch_key, our_patch, their_shape=conv, our_shape=(config.vision.width, -1)))
    if family == "clip":
        return [
            *table,
            Rename("logit_scale", "logit_scale"),
            Rename("vision_model.embeddings.class_embedding", "vision.class_embedding"),
            Rename("vision_model.pre_layrnorm.{rest}", "vision.pre_layernorm.{rest}"),  # their spelling
            Rename("visual_projection.weight", "visual_projection.weight"),
            Rename("text_projection.weight", "text_projection.weight"),
        ]
    head, pool = "vision_model.head", "vision.head"
    return [
        *table,
        Reshape("logit_scale", "logit_scale", their_shape=(1,), our_shape=()),
        Reshape("logit_bias", "logit_bias", their_shape=(1,), our_shape=()),
        Rename("vision_model.embeddings.patch_embedding.bias", "vision.patch_embedding.bias"),
        Rename("text_model.head.{rest}", "text_head.{rest}"),
        Reshape(f"{head}.probe", f"{pool}.probe", their_shape=(1, 1, config.vision.width), our_shape=(1, config.vision.width)),
        Split(f"{head}.attention.in_proj_weight", *(f"{pool}.{x}_proj.weight" for x in "qkv")),
        Split(f"{head}.attention.in_proj_bias", *(f"{pool}.{x}_proj.bias" for x in "qkv")),
        Rename(f"{head}.attention.out_proj.{{rest}}", f"{pool}.out_proj.{{rest}}"),
        Rename(f"{head}.layernorm.{{rest}}", f"{pool}.layernorm.{{rest}}"),
        Rename(f"{head}.mlp.{{rest}}", f"{pool}.mlp.{{rest}}"),
    ]


def _parts(config: dict[str, Any], family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = []
    for side, defaults in zip(("vision", "text"), _DEFAULTS[family], strict=True):
        # old CLIP configs carry a second, newer dictionary that transformers lets win
        own = {**(config.get(f"{side}_config") or {}), **(config.get(f"{side}_config_dict") or {})}
        parts.append({**defaults, **{key: value for key, value in own.items() if value is not None}})
    return parts[0], parts[1]


def from_hf(config: dict[str, Any]) -> DualConfig:
    """`config.json` -> ours.

    Raises:
        CheckpointError: a setting that this library does not build.
    """
    family = config["model_type"]
    vision, text = _parts(config, family)
    if family != "clip" and not vision.get("vision_use_head", True):
        raise CheckpointError("vision_use_head is false: a SigLIP vision tower without its pooling head has no image embedding")
    shared = {
        side: dict(
            width=part["hidden_size"],
            depth=part["num_hidden_layers"],
            heads=part["num_attention_heads"],
            mlp_width=part["intermediate_size"],
            activation=part["hidden_act"],
            norm_eps=part["layer_norm_eps"],
        )
        for side, part in (("vision", vision), ("text", text))
    }
    own = {**(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    if family == "clip" and "eos_token_id" in own and own["eos_token_id"] is None:
        raise CheckpointError("text_config.eos_token_id is null: CLIP pools its texts at this token, so its number has to be there")
    patch = vision["patch_size"]
    side = round(vision["num_patches"] ** 0.5) * patch if family == "siglip2" else vision["image_size"]
    if not isinstance(side, int):
        raise CheckpointError(f"image_size {side} is not a single number: only square inputs are built")
    return DualConfig(
        vision=VisionConfig(**shared["vision"], image_size=side, patch_size=patch, channels=vision["num_channels"]),
        text=TextConfig(
            **shared["text"],
            vocab_size=text["vocab_size"],
            context=text["max_position_embeddings"],
            eos_id=text["eos_token_id"],
            pad_id=text["pad_token_id"] if text["pad_token_id"] is not None else 1,
            bos_id=text["bos_token_id"] if text["bos_token_id"] is not None else 0,
        ),
        embed_width=config.get("projection_dim", 512) if family == "clip" else vision["hidden_size"],
        naflex=family == "siglip2",
    )


def to_hf(model: DualEncoder) -> dict[str, Any]:
    """Ours -> `config.json`. What a loaded directory said and we do not model is written back as it was.

    Raises:
        CheckpointError: a CLIP with a bias.
    """
    config = model.config
    if isinstance(model, CLIP) and model.logit_bias is not None:
        raise CheckpointError(
            "transformers' CLIPModel has no logit_bias, which this CLIP learned with the sigmoid loss: save it with layout='open_clip' "
            "(`intermodal convert --layout open_clip`)"
        )
    family = family_of(model)
    original = model.source.get("config", {})
    out = copy.deepcopy(original) if original.get("model_type") == family else {}
    architecture = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}[family]
    out.update(model_type=family, architectures=[architecture], dtype=str(model.logit_scale.dtype).removeprefix("torch."))
    out.pop("torch_dtype", None)
    for side, part in (("vision", config.vision), ("text", config.text)):
        section = out.setdefault(f"{side}_config", {})
        section.update(out.pop(f"{side}_config_dict", None) or {})
        section.update(
            hidden_size=part.width,
            num_hidden_layers=part.depth,
            num_attention_heads=part.heads,
            intermediate_size=part.mlp_width,
            hidden_act=part.activation,
            layer_norm_eps=part.norm_eps,
            model_type=f"{family}_{side}_model",
        )
    vision, text = out["vision_config"], out["text_config"]
    vision.update(patch_size=config.vision.patch_size, num_channels=config.vision.channels)
    if family == "siglip2":
        vision["num_patches"] = config.vision.grid**2
        vision.pop("image_size", None)
    else:
        vision["image_size"] = config.vision.image_size
    text.update(
        vocab_size=config.text.vocab_size,
        max_position_embeddings=config.text.context,
        eos_token_id=config.text.eos_id,
        pad_token_id=config.text.pad_id,
        bos_token_id=config.text.bos_id,
    )
    if family == "clip":
        out["projection_dim"] = vision["projection_dim"] = text["projection_dim"] = config.embed_width
    else:
        text["projection_size"] = config.embed_width
    return out


def family_of(model: DualEncoder) -> str:
    if isinstance(model, CLIP):
        return "clip"
    return "siglip2" if model.config.naflex else "siglip"


def build(family: str, config: DualConfig) -> DualEncoder:
    return (CLIP if family == "clip" else SigLIP)(config)


def processor(folder: Path, family: str, config: DualConfig, raw: dict[str, Any]) -> PairProcessor:
    """The image processor and tokenizer of a dual encoder's directory."""
    settings = images.read_processor(folder)
    vision = config.vision
    if family == "siglip2":
        defaults = {**images.SIGLIP2_DEFAULTS, "patch_size": vision.patch_size}
        pictures: images.ImageProcessor | images.NaflexProcessor = images.NaflexProcessor.from_hf(settings, defaults)
    elif not settings and "model_cfg" in raw:
        pictures = open_clip_config.pictures(raw, vision.image_size)
    else:
        defaults = images.CLIP_DEFAULTS if family == "clip" else images.SIGLIP_DEFAULTS
        if not settings:  # no file: the class's recipe at the tower's own size
            side = vision.image_size
            square = {"height": side, "width": side}
            settings = {"size": {"shortest_edge": side} if family == "clip" else square, "crop_size": square}
        pictures = images.ImageProcessor.from_hf(settings, defaults)
    text = config.text
    tokenizer = texts.from_folder(folder, family, context=text.context, eos_id=text.eos_id, pad_id=text.pad_id)
    if tokenizer is not None and "model_cfg" in raw:
        tokenizer.clean = open_clip_config.text_clean_up(raw)
    return PairProcessor(pictures, tokenizer, family)


def tell_of_size(model: DualEncoder, where: Path) -> None:
    """Warn when the image processor makes pictures of another size than the tower takes. It is no error: texts can be embedded, and the
    processor changed; pictures are refused by the tower."""
    pictures, side = model.processor.images if model.processor else None, model.config.vision.image_size
    if not isinstance(pictures, images.ImageProcessor):
        return
    try:
        height, width = pictures.output_size
    except CheckpointError as error:
        warnings.warn(f"{where}: {error}", stacklevel=3)
        return
    if (height, width) != (side, side):
        warnings.warn(
            f"{where}: the image processor's settings make pictures of {height} x {width} pixels, and the vision tower takes "
            f"{side} x {side}: no picture can be embedded (load it with image_size=... to resample its positions)",
            stacklevel=3,
        )


def resized(model: Any, state, processor: PairProcessor, family: str, side: int):
    """A loaded model for square pictures of another side: `(model, state, processor)` with resampled positions.

    Raises:
        CheckpointError: a model or a side for which there is no such thing.
    """
    if not isinstance(model, DualEncoder):
        raise CheckpointError(
            f"image_size is for CLIP and SigLIP; a {type(model).__name__} reads pictures of the sizes it was made for"
        )
    if side < model.config.vision.patch_size:
        raise CheckpointError(f"image_size {side} is smaller than a patch of {model.config.vision.patch_size}")
    if side == model.config.vision.image_size:
        return model, state, processor
    if family == "siglip2" or not isinstance(processor.images, images.ImageProcessor):
        raise CheckpointError(
            "a NaFlex tower takes any size as it is: set `model.processor.images.max_patches` instead of image_size"
        )
    config = replace(model.config, vision=replace(model.config.vision, image_size=side))
    grid = (config.vision.grid, config.vision.grid)
    key = "vision.position_embedding"
    state = {**state, key: resize_positions(state[key], grid, prefix=1 if family == "clip" else 0)}
    with torch.device("meta"):
        other = build(family, config)
    other.source = model.source
    return other, state, replace(processor, images=processor.images.for_size(side))
