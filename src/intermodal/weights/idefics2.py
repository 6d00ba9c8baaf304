"""Hugging Face `idefics2` <-> ours: config and key table. Pictures of one square size only, as `stitch` makes them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import CheckpointError
from ..inputs import image as images
from ..inputs.chat import CHAT_FILES, ChatProcessor
from ..inputs.queries import LatentPlanner
from ..models.idefics2 import Idefics2, Idefics2Config
from . import decoder
from .llava import tower_from_hf, tower_to_hf
from .rules import Ignore, Rename, Reshape, Rule

BOUNDARY, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
# What transformers' config classes default to where a config.json leaves a field out.
_VISION: dict[str, Any] = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
                               image_size=224, patch_size=32, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)  # fmt: skip
_PICTURES: dict[str, Any] = {**images.SIGLIP_DEFAULTS, "resample": images.BILINEAR, "do_image_splitting": False}
_PERCEIVER: dict[str, Any] = dict(hidden_act="silu", hidden_size=4096, rms_norm_eps=1e-6, resampler_n_latents=64, resampler_depth=3,
                                  resampler_n_heads=16, resampler_head_dim=96, num_key_value_heads=4)  # fmt: skip


def from_hf(config: dict[str, Any]) -> Idefics2Config:
    vision = {**_VISION, **_given(config.get("vision_config"))}
    perceiver = {**_PERCEIVER, **_given(config.get("perceiver_config"))}
    text = {"model_type": "mistral", **_given(config.get("text_config"))}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    shape = decoder.from_hf({**text, "tie_word_embeddings": tied})
    if perceiver["hidden_size"] != shape.width:  # the class takes the decoder's then, and its eps
        perceiver["rms_norm_eps"] = shape.norm_eps
    return Idefics2Config(
        vision=tower_from_hf(vision),
        text=shape,
        latents=perceiver["resampler_n_latents"],
        depth=perceiver["resampler_depth"],
        heads=perceiver["resampler_n_heads"],
        kv_heads=perceiver["num_key_value_heads"],
        head_width=perceiver["resampler_head_dim"],
        activation=perceiver["hidden_act"],
        norm_eps=perceiver["rms_norm_eps"],
        image_id=config.get("image_token_id", 32001),
    )


def _given(section: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (section or {}).items() if value is not None}


def rules(family: str, config: Idefics2Config) -> list[Rule]:
    vision, tower, connector = config.vision, "model.vision_model", "model.connector"
    kernel = (vision.width, vision.channels, vision.patch_size, vision.patch_size)
    return [
        Ignore("lm_head.weight") if config.text.tied else Rename("lm_head.weight", "lm_head.weight"),
        Reshape(
            f"{tower}.embeddings.patch_embedding.weight",
            "vision.patch_embedding.weight",
            their_shape=kernel,
            our_shape=(vision.width, -1),
        ),
        Rename(f"{tower}.embeddings.patch_embedding.bias", "vision.patch_embedding.bias"),
        Rename(f"{tower}.embeddings.position_embedding.weight", "vision.position_embedding"),
        Rename(f"{tower}.{{rest}}", "vision.{rest}"),
        Rename(f"{connector}.modality_projection.{{rest}}", "connector.projection.{rest}"),
        Rename(f"{connector}.perceiver_resampler.{{rest}}", "connector.{rest}"),
        Rename("model.text_model.{rest}", "model.{rest}"),
    ]


def build(family: str, config: Idefics2Config) -> Idefics2:
    return Idefics2(config)


def processor(folder: Path, family: str, config: Idefics2Config, raw: dict[str, Any]) -> ChatProcessor | None:
    """Raises CheckpointError: pictures of native size or split into quarters, or another number of tokens than the resampler makes."""
    if not any((folder / name).exists() for name in CHAT_FILES if name != "generation_config.json"):
        return None
    settings, side = {**_PICTURES, **images.read_processor(folder)}, config.vision.image_size
    size, split = settings["size"], settings["do_image_splitting"]
    if split or (size.get("height"), size.get("width")) != (side, side):
        raise CheckpointError(
            f"{folder}: its pictures are split, or are not the tower's square (size {size}, do_image_splitting {split}); built is Idefics2 "
            f"with one square: in preprocessor_config.json, size {{'height': {side}, 'width': {side}}} and do_image_splitting false"
        )
    joint = folder / "processor_config.json"
    count = json.loads(joint.read_text()).get("image_seq_len", 64) if joint.exists() else 64
    if count != config.latents:
        raise CheckpointError(f"{joint}: image_seq_len {count}, but the resampler makes {config.latents} tokens of a picture")
    pictures = images.ImageProcessor.from_hf(settings, _PICTURES)
    return ChatProcessor.from_folder(folder, raw, lambda tokenizer: planner(config, pictures, tokenizer))


def planner(config: Idefics2Config, pictures: images.ImageProcessor, tokenizer: Tokenizer) -> LatentPlanner:
    """Raises CheckpointError: the tokenizer lacks the token that stands around pictures."""
    if tokenizer.token_to_id(BOUNDARY) is None:
        raise CheckpointError(f"the tokenizer has no {BOUNDARY}, which stands on both sides of a picture")
    return LatentPlanner({"image": config.image_id}, BOUNDARY, config.vision.image_size, config.latents, pictures)


def family_of(model: Idefics2) -> str:
    return model.family


def to_hf(model: Idefics2) -> dict[str, Any]:
    config = model.config
    original = model.source.get("config", {})
    out = copy.deepcopy(original) if original.get("model_type") == "idefics2" else {}
    text = out.get("text_config") or {"model_type": "mistral", "sliding_window": None}
    out.update(
        model_type="idefics2",
        architectures=["Idefics2ForConditionalGeneration"],
        dtype=str(model.head_weight.dtype).removeprefix("torch."),
        tie_word_embeddings=config.text.tied,
        image_token_id=config.image_id,
        text_config=decoder.text_to_hf(config.text, decoder.family_of_text(text), text),
        vision_config={
            **out.get("vision_config", {}),
            "model_type": "idefics2_vision",
            **tower_to_hf(config.vision),
        },
        perceiver_config={
            **out.get("perceiver_config", {}),
            "model_type": "idefics2_perceiver",
            "hidden_size": config.text.width,
            "hidden_act": config.activation,
            "rms_norm_eps": config.norm_eps,
            "resampler_n_latents": config.latents,
            "resampler_depth": config.depth,
            "resampler_n_heads": config.heads,
            "resampler_head_dim": config.head_width,
            "num_key_value_heads": config.kv_heads,
        },
    )
    out.pop("torch_dtype", None)
    return out
