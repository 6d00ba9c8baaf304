"""Hugging Face `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl` <-> ours: config and key table."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, nearest
from ..inputs.chat import CHAT_FILES, ChatProcessor
from ..inputs.image import read_processor
from ..inputs.patches import QwenPlanner
from ..models.qwen2_vl import QwenVL, QwenVLConfig
from ..models.vit_native import NativeVisionConfig
from . import decoder
from .rules import Alias, Ignore, Rename, Reshape, Rule

# What transformers' config classes default to where a config.json leaves a field out.
_TEXT: dict[str, dict[str, Any]] = {
    "qwen2_vl": dict(vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
                     num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=32768),
    "qwen3_vl": dict(hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=32, head_dim=128, max_position_embeddings=128000, rope_theta=500_000.0),
}  # fmt: skip
_TEXT["qwen2_5_vl"] = _TEXT["qwen2_vl"]
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": dict(depth=32, embed_dim=1280, hidden_size=3584, hidden_act="quick_gelu", mlp_ratio=4, num_heads=16, in_channels=3,
                     patch_size=14, spatial_merge_size=2, temporal_patch_size=2),
    "qwen2_5_vl": dict(depth=32, hidden_size=3584, hidden_act="silu", intermediate_size=3420, num_heads=16, in_channels=3,
                       patch_size=14, spatial_merge_size=2, temporal_patch_size=2, tokens_per_second=4, window_size=112,
                       out_hidden_size=3584, fullatt_block_indexes=(7, 15, 23, 31)),
    "qwen3_vl": dict(depth=27, hidden_size=1152, hidden_act="gelu_pytorch_tanh", intermediate_size=4304, num_heads=16,
                     in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=3584,
                     num_position_embeddings=2304, deepstack_visual_indexes=(8, 16, 24)),
}  # fmt: skip
_SECTIONS = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}
_ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
FAMILIES = tuple(_ARCHITECTURES)
OURS = "intermodal"
"""The section of config.json that holds our named settings; other libraries ignore it."""
RULES = ("authors", "transformers")


def rules_said(config: dict[str, Any]) -> Any:
    """Whose rules config.json asks for where the authors and transformers disagree; the authors' where it says nothing.

    Raises:
        CheckpointError: another name than the two.
    """
    said = config.get(OURS) or {}
    rules = said.get("rules", "authors") if isinstance(said, dict) else said
    if rules not in RULES:
        raise CheckpointError(
            f'config.json: {OURS}.rules is {rules!r}; write "{OURS}": {{"rules": "authors"}} or "transformers"{nearest(str(rules), RULES)}'
        )
    return rules


def from_hf(config: dict[str, Any]) -> QwenVLConfig:
    """config.json -> ours. The hub's first Qwen2-VL files keep the text fields at the top; later ones in `text_config`.

    Raises:
        CheckpointError: a setting that this library does not build.
    """
    family = config["model_type"]
    text = config.get("text_config") or {key: value for key, value in config.items() if key != "vision_config"}
    text = {**text, "model_type": f"{family}_text"}
    # of the two places that say whether the output layer is tied, the top one counts
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    decoder_config = decoder.from_hf(text, _TEXT[family])
    rope = decoder_config.rope
    decoder_config = replace(
        decoder_config,
        rope=replace(rope, sections=rope.sections or _SECTIONS[family], interleaved=family == "qwen3_vl"),
    )
    given = {key: value for key, value in (config.get("vision_config") or {}).items() if value is not None}
    if "in_chans" in given:  # the hub's spelling
        given["in_channels"] = given["in_chans"]
    vision = {**_VISION[family], **given}
    return QwenVLConfig(
        family=family,
        vision=_vision(family, vision),
        text=decoder_config,
        image_id=config.get("image_token_id", 151655),
        video_id=config.get("video_token_id", 151656),
        vision_start_id=config.get("vision_start_token_id", 151652),
        vision_end_id=config.get("vision_end_token_id", 151653),
        tokens_per_second=float(vision.get("tokens_per_second", 1.0)) if family == "qwen2_5_vl" else 1.0,
        rules=rules_said(config),
    )


def _vision(family: str, get: dict[str, Any]) -> NativeVisionConfig:
    shared: dict[str, Any] = dict(
        depth=get["depth"],
        heads=get["num_heads"],
        patch_size=get["patch_size"],
        temporal_patch=get["temporal_patch_size"],
        merge=get["spatial_merge_size"],
        channels=get["in_channels"],
        activation=get["hidden_act"],
        theta=float((get.get("rope_parameters") or {}).get("rope_theta", 10_000.0)),
    )
    if family == "qwen2_vl":
        width = get["embed_dim"]
        return NativeVisionConfig(width=width, mlp_width=int(width * get["mlp_ratio"]), out_width=get["hidden_size"], **shared)
    shared.update(width=get["hidden_size"], mlp_width=get["intermediate_size"], out_width=get["out_hidden_size"])
    if family == "qwen2_5_vl":
        blocks = tuple(block for block in get["fullatt_block_indexes"] if block < get["depth"])
        return NativeVisionConfig(rms_norm=True, gated_mlp=True, window=get["window_size"], full_blocks=blocks, **shared)
    side = int(get["num_position_embeddings"] ** 0.5)
    return NativeVisionConfig(patch_bias=True, table_side=side, deepstack=tuple(get["deepstack_visual_indexes"]), **shared)


def rules(family: str, config: QwenVLConfig) -> list[Rule]:
    vision = config.vision
    kernel = (vision.width, vision.channels, vision.temporal_patch, vision.patch_size, vision.patch_size)
    head: list[Rule] = [Ignore("lm_head.weight")] if config.text.tied else [Rename("lm_head.weight", "lm_head.weight")]
    text, tower = ("model.language_model", "model.visual") if family == "qwen3_vl" else ("model", "visual")
    shape: dict[str, Any] = dict(their_shape=kernel, our_shape=(vision.width, -1))
    table: list[Rule] = [*head, Reshape(f"{tower}.patch_embed.proj.weight", "visual.patch_embed.weight", **shape)]
    if family == "qwen3_vl":
        table += [
            Rename(f"{tower}.patch_embed.proj.bias", "visual.patch_embed.bias"),
            Rename(f"{tower}.pos_embed.weight", "visual.pos_embed"),
            Rename(f"{tower}.merger.norm.{{rest}}", "visual.merger.norm.{rest}"),
            Rename(f"{tower}.deepstack_merger_list.{{n}}.norm.{{rest}}", "visual.deepstack_mergers.{n}.norm.{rest}"),
        ]
        for layer in (1, 2):
            theirs = f"linear_fc{layer}.{{rest}}"
            ours = f"fc{layer}.{{rest}}"
            table += [
                Rename(f"{tower}.blocks.{{n}}.mlp.{theirs}", f"visual.blocks.{{n}}.mlp.{ours}"),
                Rename(f"{tower}.merger.{theirs}", f"visual.merger.{ours}"),
                Rename(f"{tower}.deepstack_merger_list.{{n}}.{theirs}", f"visual.deepstack_mergers.{{n}}.{ours}"),
            ]
    else:
        for prefix, kind in (("visual", Rename), ("model.visual", Alias)):  # transformers 4.52 on names it model.visual in memory
            table += [
                kind(f"{prefix}.merger.ln_q.{{rest}}", "visual.merger.norm.{rest}"),
                kind(f"{prefix}.merger.mlp.0.{{rest}}", "visual.merger.fc1.{rest}"),
                kind(f"{prefix}.merger.mlp.2.{{rest}}", "visual.merger.fc2.{rest}"),
            ]
        table += [
            Reshape(
                "model.visual.patch_embed.proj.weight", "visual.patch_embed.weight", **shape
            ),  # the first of the two is written
            Alias("model.visual.blocks.{rest}", "visual.blocks.{rest}"),
            Alias("model.language_model.{rest}", "model.{rest}"),
        ]
    # rotary tables, computed today, where a file has them
    table[:0] = [
        Ignore(f"{prefix}.inv_freq")
        for names in {(tower, text), ("model.visual", "model.language_model")}
        for prefix in (f"{names[0]}.rotary_pos_emb", f"{names[1]}.rotary_emb", f"{names[1]}.layers.{{n}}.self_attn.rotary_emb")
    ]
    return [*table, Rename(f"{tower}.blocks.{{rest}}", "visual.blocks.{rest}"), Rename(f"{text}.{{rest}}", "model.{rest}")]


def build(family: str, config: QwenVLConfig) -> QwenVL:
    return QwenVL(config)


def processor(folder: Path, family: str, config: QwenVLConfig, raw: dict[str, Any]) -> ChatProcessor | None:
    if not any((folder / name).exists() for name in CHAT_FILES if name != "generation_config.json"):
        return None
    settings, video = read_processor(folder), read_processor(folder, "video")
    return ChatProcessor.from_folder(folder, raw, lambda tokenizer: QwenPlanner.from_hf(config, settings, video, tokenizer))


def family_of(model: QwenVL) -> str:
    return model.family


def to_hf(model: QwenVL) -> dict[str, Any]:
    config = model.config
    original = model.source.get("config", {})
    out = copy.deepcopy(original) if original.get("model_type") == model.family else {}
    base = "qwen3" if model.family == "qwen3_vl" else "qwen2"
    flat = bool(out) and "text_config" not in out
    section = out if flat else out.setdefault("text_config", {})
    section.update(decoder.text_to_hf(config.text, base, {**section, "model_type": f"{model.family}_text"}))
    if not config.text.rope.interleaved or model.family == "qwen3_vl":
        section["rope_parameters"].pop("mrope_interleaved", None)  # the class says it
    if model.family != "qwen3_vl":
        section.pop("head_dim", None)
    out.update(
        model_type=model.family,
        architectures=[_ARCHITECTURES[model.family]],
        dtype=str(model.head_weight.dtype).removeprefix("torch."),
        tie_word_embeddings=config.text.tied,
        image_token_id=config.image_id,
        video_token_id=config.video_id,
        vision_start_token_id=config.vision_start_id,
        vision_end_token_id=config.vision_end_id,
        vision_config={**out.get("vision_config", {}), **_vision_to_hf(config)},
    )
    out.pop("torch_dtype", None)
    if config.rules != "authors":
        out[OURS] = {**out.get(OURS, {}), "rules": config.rules}
    return out


def _vision_to_hf(config: QwenVLConfig) -> dict[str, Any]:
    vision = config.vision
    out: dict[str, Any] = dict(
        model_type=f"{config.family}_vision",
        depth=vision.depth,
        num_heads=vision.heads,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch,
        spatial_merge_size=vision.merge,
        in_channels=vision.channels,
        hidden_act=vision.activation,
    )
    if config.family == "qwen2_vl":
        return {**out, "embed_dim": vision.width, "mlp_ratio": vision.mlp_width // vision.width, "hidden_size": vision.out_width}
    out.update(hidden_size=vision.width, intermediate_size=vision.mlp_width, out_hidden_size=vision.out_width)
    if config.family == "qwen2_5_vl":
        seconds = config.tokens_per_second
        whole = int(seconds) if seconds == int(seconds) else seconds
        return {**out, "window_size": vision.window, "fullatt_block_indexes": list(vision.full_blocks), "tokens_per_second": whole}
    return {
        **out,
        "num_position_embeddings": (vision.table_side or 0) ** 2,
        "deepstack_visual_indexes": list(vision.deepstack),
    }
