"""Hugging Face `llava`, `llava_next`, `llava_onevision` <-> ours: config and key table."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..inputs import image as images
from ..inputs.chat import CHAT_FILES, ChatProcessor
from ..inputs.tiles import LlavaPlanner, as_sizes
from ..models.llava import Llava, LlavaConfig
from ..models.vit import VisionConfig
from . import decoder
from .qwen2_vl import OURS, rules_said
from .rules import Alias, Ignore, Rename, Reshape, Rule

_ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
FAMILIES = tuple(_ARCHITECTURES)
# What transformers' config classes default to where a config.json leaves a field out. The composite classes have their own towers.
_CLIP_L: dict[str, Any] = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                               num_attention_heads=16, image_size=336, patch_size=14)  # fmt: skip
_VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
                              patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5, num_channels=3),
    "siglip_vision_model": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
                                patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, num_channels=3),
}  # fmt: skip
_PINPOINTS = {
    "llava": (),
    "llava_next": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    "llava_onevision": tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)),
}


def from_hf(config: dict[str, Any]) -> LlavaConfig:
    """config.json -> ours.

    Raises:
        CheckpointError: a setting that this library does not build, or that transformers has no features for.
    """
    family = config["model_type"]
    given = config.get("vision_config") or _CLIP_L
    kind = given.get("model_type", "clip_vision_model")
    if kind not in _VISION:
        raise CheckpointError(f"the vision tower is {kind!r}; built are {', '.join(_VISION)}")
    vision = {**_VISION[kind], **{key: value for key, value in given.items() if value is not None}}
    onevision = family == "llava_onevision"
    text = config.get("text_config") or {"model_type": "qwen2" if onevision else "llama"}
    tower: Any = "clip" if kind == "clip_vision_model" else "siglip"
    drop_first = _drops_first(config.get("vision_feature_select_strategy", "full" if onevision else "default"), family, tower)
    aspect = config.get("vision_aspect_ratio", "anyres_max_9") if onevision else None
    found = re.fullmatch(r"anyres_max_(\d+)", aspect) if aspect else None
    if aspect and not found:
        raise CheckpointError(f"vision_aspect_ratio {aspect!r} is not built; anyres_max_N is")
    return LlavaConfig(
        family=family,
        vision=tower_from_hf(vision),
        text=decoder.from_hf(
            {**text, "tie_word_embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))}
        ),
        tower=tower,
        layer=_layer(config.get("vision_feature_layer", -1 if onevision else -2), vision["num_hidden_layers"]),
        drop_first=drop_first,
        projector_activation=config.get("projector_hidden_act", "gelu"),
        projector_bias=config.get("multimodal_projector_bias", True),
        image_id=config.get("image_token_index", config.get("image_token_id", 151646 if onevision else 32000)),
        video_id=config.get("video_token_index", config.get("video_token_id", 151647)) if onevision else None,
        pinpoints=as_sizes(config.get("image_grid_pinpoints") or _PINPOINTS[family]) if family != "llava" else (),
        max_tiles=int(found[1]) if found else None,
        rules=rules_said(config),
    )


def _layer(said: Any, depth: int) -> int:
    """Which hidden state of a tower of so many blocks is read; a list of one number is that number.

    Raises:
        CheckpointError: the tower has no such state, or several are asked for.
    """
    layer = said[0] if isinstance(said, list | tuple) and len(said) == 1 else said
    if isinstance(layer, list | tuple):
        raise CheckpointError(f"vision_feature_layer {layer}: joining several layers of the tower is not built")
    if isinstance(layer, bool) or not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise CheckpointError(
            f"vision_feature_layer is {layer!r}; a tower of {depth} blocks (vision_config.num_hidden_layers) has {-depth - 1} to {depth}"
        )
    return layer


def _drops_first(strategy: Any, family: str, tower: str) -> bool:
    """Whether the tower's first feature is left out.

    Raises:
        CheckpointError: an unknown strategy, or one that leaves AnyRes no square of features: transformers fails at the first picture.
    """
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"vision_feature_select_strategy is {strategy!r}; default (without the class token) and full are known"
        )
    if family != "llava" and (strategy == "default") != (tower == "clip"):
        needs = "default" if tower == "clip" else "full"
        raise CheckpointError(
            f"vision_feature_select_strategy {strategy!r} does not fit a {tower} vision tower in {family}: its features would be no "
            f"square to tile with; write {needs!r} in config.json if the weights were trained so"
        )
    return strategy == "default"


_TOWER_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "channels",
}


def tower_from_hf(get: dict[str, Any]) -> VisionConfig:
    """A `vision_config` of CLIP's or SigLIP's kind, its defaults filled in -> ours."""
    return VisionConfig(**{ours: get[theirs] for theirs, ours in _TOWER_FIELDS.items()})


def tower_to_hf(config: VisionConfig) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _TOWER_FIELDS.items()}


def rules(family: str, config: LlavaConfig) -> list[Rule]:
    """The hub's layout is written; transformers 5's (no `vision_model.`) and its in-memory names (`model.`) are read too."""
    patch = config.vision.patch_size
    kernel: dict[str, Any] = dict(
        their_shape=(config.vision.width, config.vision.channels, patch, patch), our_shape=(config.vision.width, -1)
    )
    table: list[Rule] = []
    towers = ("vision_tower.vision_model", "vision_tower", "model.vision_tower.vision_model", "model.vision_tower")
    for number, prefix in enumerate(towers):
        kind = Alias if number else Rename
        table.append(Ignore(f"{prefix}.embeddings.position_ids"))
        table.append(Reshape(f"{prefix}.embeddings.patch_embedding.weight", "vision.patch_embedding.weight", **kernel))
        for theirs, ours in (
            ("embeddings.patch_embedding.bias", "patch_embedding.bias"),
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.position_embedding.weight", "position_embedding"),
            ("pre_layrnorm.{rest}", "pre_layernorm.{rest}"),
            ("post_layernorm.{rest}", "post_layernorm.{rest}"),
            ("encoder.{rest}", "encoder.{rest}"),
        ):
            table.append(kind(f"{prefix}.{theirs}", f"vision.{ours}"))
        table.append(Ignore(f"{prefix}.head.{{rest}}"))  # SigLIP's pooling, where a file carries it
    for prefix, kind in (("", Rename), ("model.", Alias)):
        table.append(kind(f"{prefix}multi_modal_projector.{{rest}}", "projector.{rest}"))
        table.append(kind(f"{prefix}image_newline", "image_newline"))
    tied = config.text.tied
    heads = ("language_model.lm_head.weight", "lm_head.weight")
    table += [Ignore(head) for head in heads] if tied else [Rename(heads[0], "lm_head.weight"), Alias(heads[1], "lm_head.weight")]
    # rotary tables, computed today, which releases up to transformers 4.31 saved
    decoders = ("language_model.model", "model.language_model")
    table += [Ignore(f"{decoder}.{where}rotary_emb.inv_freq") for decoder in decoders for where in ("", "layers.{n}.self_attn.")]
    return [
        *table,
        Rename("language_model.model.{rest}", "model.{rest}"),
        Alias("model.language_model.{rest}", "model.{rest}"),
    ]


def build(family: str, config: LlavaConfig) -> Llava:
    return Llava(config)


def processor(folder: Path, family: str, config: LlavaConfig, raw: dict[str, Any]) -> ChatProcessor | None:
    if not any((folder / name).exists() for name in CHAT_FILES if name != "generation_config.json"):
        return None
    settings = images.read_processor(folder)
    clip = config.tower == "clip"
    side = config.vision.image_size
    square = {"height": side, "width": side}
    defaults = {**(images.CLIP_DEFAULTS if clip else images.SIGLIP_DEFAULTS)}
    if not settings:
        settings = {"size": {"shortest_edge": side} if clip else square, "crop_size": square}
    if family == "llava_onevision":
        defaults["do_center_crop"] = False
        defaults["image_mean"], defaults["image_std"] = images.CLIP_MEAN, images.CLIP_STD
    pictures = images.ImageProcessor.from_hf(settings, defaults)
    placeholders = {"image": config.image_id, **({"video": config.video_id} if config.video_id is not None else {})}
    planner = LlavaPlanner(
        family,
        placeholders,
        side=side,
        grid=config.vision.grid,
        processor=pictures,
        pinpoints=as_sizes(settings["image_grid_pinpoints"]) if settings.get("image_grid_pinpoints") else config.pinpoints,
        max_tiles=config.max_tiles,
        authors=config.rules == "authors",
        pad=bool(settings.get("do_pad")),
        extra=int(clip) - int(config.drop_first),
    )
    return ChatProcessor.from_folder(folder, raw, lambda tokenizer: planner)


def family_of(model: Llava) -> str:
    return model.family


def to_hf(model: Llava) -> dict[str, Any]:
    config = model.config
    original = model.source.get("config", {})
    out = copy.deepcopy(original) if original.get("model_type") == model.family else {}
    text = out.get("text_config") or {"model_type": "qwen2" if model.family == "llava_onevision" else "llama"}
    vision = out.get("vision_config") or {}
    vision.update(
        model_type="clip_vision_model" if config.tower == "clip" else "siglip_vision_model",
        **tower_to_hf(config.vision),
    )
    if config.tower == "siglip":
        vision["vision_use_head"] = False
    out.update(
        model_type=model.family,
        architectures=[_ARCHITECTURES[model.family]],
        dtype=str(model.head_weight.dtype).removeprefix("torch."),
        tie_word_embeddings=config.text.tied,
        image_token_index=config.image_id,
        text_config=decoder.text_to_hf(config.text, decoder.family_of_text(text), text),
        vision_config=vision,
        vision_feature_layer=config.layer,
        vision_feature_select_strategy="default" if config.drop_first else "full",
        projector_hidden_act=config.projector_activation,
        multimodal_projector_bias=config.projector_bias,
    )
    out.pop("torch_dtype", None)
    if config.family != "llava":
        out["image_grid_pinpoints"] = [list(size) for size in config.pinpoints]
    if config.family == "llava_onevision":
        out.update(video_token_index=config.video_id, vision_aspect_ratio=f"anyres_max_{config.max_tiles}")
    if config.rules != "authors":
        out[OURS] = {**out.get(OURS, {}), "rules": config.rules}
    return out
