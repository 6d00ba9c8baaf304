"""Hugging Face text decoders (`llama`, `mistral`, `qwen2`, `qwen3`) <-> ours: config and key table.

Leaf names are equal, so the table is the identity. A stitched model's `text_config` goes through the same two functions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, nearest
from ..inputs.chat import CHAT_FILES, ChatProcessor
from ..models.decoder import DecoderConfig
from ..models.generative import LanguageModel
from ..nn.rope import RopeConfig
from .rules import Ignore, Rename, Rule

# What transformers' config classes default to where a config.json leaves a field out.
_SHARED: dict[str, Any] = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False
)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_SHARED, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_SHARED,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        **_SHARED,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        **_SHARED,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}
FAMILIES = tuple(_DEFAULTS)
_SWITCHES = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "qk_layernorm", "swin_norm")
"""Of `DecoderConfig`: what decides which parameters a layer has, and where its norms stand."""
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TEXT_FAMILIES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


def family_of_text(config: dict[str, Any]) -> str:
    """The decoder family of a `text_config`; a stitched model names its own (`qwen3_vl_text`).

    Raises:
        CheckpointError: a decoder that is not built here.
    """
    kind = str(config.get("model_type", "llama"))
    family = _TEXT_FAMILIES.get(kind, kind)
    if family not in _DEFAULTS:
        raise CheckpointError(f"the decoder is {kind!r}; built are {', '.join(FAMILIES)}{nearest(kind, FAMILIES)}")
    return family


def from_hf(config: dict[str, Any], defaults: dict[str, Any] | None = None) -> DecoderConfig:
    """`config.json` (or its `text_config`) -> ours.

    Args:
        defaults: what the stitched model's own text config class defaults to, over the family's.

    Raises:
        CheckpointError: a setting that this library does not build.
    """
    family = family_of_text(config)
    get = {**_DEFAULTS[family], **(defaults or {}), **{key: value for key, value in config.items() if value is not None}}
    heads, kind = get["num_attention_heads"], config.get("model_type", family)
    _check_window(config, get, family)
    # transformers reads each of these in some families only; elsewhere a file may say what it likes
    bias = family in ("llama", "qwen3") and bool(get.get("attention_bias", False))
    mlp_bias = family == "llama" and bool(get.get("mlp_bias", False))
    head_width = None if kind in ("qwen2_vl_text", "qwen2_5_vl_text") else get.get("head_dim")
    return DecoderConfig(
        width=get["hidden_size"],
        depth=get["num_hidden_layers"],
        heads=heads,
        kv_heads=get.get("num_key_value_heads") or heads,
        head_width=head_width or get["hidden_size"] // heads,
        mlp_width=get["intermediate_size"],
        vocab_size=get["vocab_size"],
        context=get["max_position_embeddings"],
        activation=get["hidden_act"],
        norm_eps=get["rms_norm_eps"],
        rope=rope_from_hf(get),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        tied=bool(get["tie_word_embeddings"]),
    )


def _unheld(config: DecoderConfig, family: str) -> list[str]:
    """The switches of a decoder that this family's class has no place for, as "qk_norm=true (here false)"."""
    held: dict[str, bool] = dict.fromkeys(_SWITCHES, False)
    if family == "qwen2":
        held["qkv_bias"] = True
    if family in ("llama", "qwen3"):  # their `attention_bias` is one for all four products
        held["qkv_bias"] = held["out_bias"] = config.out_bias
    if family == "llama":
        held["mlp_bias"] = config.mlp_bias
    held["qk_norm"] = family == "qwen3"
    return [
        f"{name}={str(getattr(config, name)).lower()} (here {str(value).lower()})"
        for name, value in held.items()
        if getattr(config, name) != value
    ]


def family_that_holds(config: DecoderConfig) -> str:
    """The family that a new decoder of this shape is saved as: Llama's where its class can hold it, else Qwen2's or Qwen3's.

    Raises:
        CheckpointError: none can. It could be trained, and never be loaded again.
    """
    families = ("llama", "qwen2", "qwen3")
    found = next((family for family in families if not _unheld(config, family)), None)
    if found is None:
        wants = "; ".join(f"{family} cannot hold {', '.join(_unheld(config, family))}" for family in families)
        raise CheckpointError(f"no decoder of transformers has these switches together, so it could not be saved: {wants}")
    return found


_WINDOW_FROM = {"qwen2": 28, "qwen3": 28, "qwen2_vl_text": 80, "qwen2_5_vl_text": 80}
"""The layer from which on attention is windowed where a config.json with `use_sliding_window` leaves `max_window_layers` out."""


def _check_window(config: dict[str, Any], get: dict[str, Any], family: str) -> None:
    """Raise where transformers would look at a window of the positions alone: `mistral` in all layers, Qwen's text models in those that
    `layer_types` or `max_window_layers` says, if they use it at all. Other families have no window, whatever their file says.

    Raises:
        CheckpointError: a window shorter than the context.
    """
    # null says that there is none, unlike a field that is left out
    window, kind = config.get("sliding_window", 4096), config.get("model_type", family)
    if family == "mistral":
        windowed = True
    elif kind in _WINDOW_FROM and get.get("use_sliding_window"):
        first, types = get.get("max_window_layers", _WINDOW_FROM[kind]), get.get("layer_types")
        windowed = "sliding_attention" in types if types else first < get["num_hidden_layers"]
    else:
        windowed = False
    if windowed and window and window < get["max_position_embeddings"]:
        raise CheckpointError(
            f"sliding-window attention (sliding_window={window} of {get['max_position_embeddings']} positions) is not built; "
            f"set it to null in config.json to use the model on inputs shorter than the window"
        )


def rope_from_hf(get: dict[str, Any]) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` + `rope_scaling` (4), where "mrope" is default angles with sections."""
    scaling = get.get("rope_parameters") or get.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = scaling.get("rope_theta") or get.get("rope_theta") or 10_000.0
    if float(get.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))) != 1.0:
        raise CheckpointError("partial_rotary_factor is not 1: rotating a part of each head is not built")
    sections = scaling.get("mrope_section")
    rope: dict[str, Any] = dict(
        theta=float(theta),
        sections=tuple(sections) if sections else None,
        interleaved=bool(scaling.get("mrope_interleaved", False)),
    )
    if kind in ("default", "mrope"):
        return RopeConfig(**rope)
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(f"rope_type {kind!r} is not built: default, mrope, linear, llama3 or yarn")
    if kind == "yarn" and any(key in scaling for key in ("mscale", "mscale_all_dim", "truncate")):
        raise CheckpointError("yarn with mscale or truncate is not built")
    numbers = {
        "original_max_position_embeddings": "original_context",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    }
    rope.update({ours: scaling[theirs] for theirs, ours in numbers.items() if scaling.get(theirs) is not None})
    if kind == "yarn" and "original_context" not in rope:
        rope["original_context"] = get["max_position_embeddings"]
    return RopeConfig(kind=kind, factor=float(scaling["factor"]), **rope)


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` that transformers 5 reads."""
    out: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.sections is not None:
        out["mrope_section"] = list(rope.sections)
        if rope.interleaved:
            out["mrope_interleaved"] = True
    if rope.kind != "default":
        out["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        out.update(low_freq_factor=rope.low_freq_factor, high_freq_factor=rope.high_freq_factor)
    if rope.kind == "yarn":
        out.update(beta_fast=rope.beta_fast, beta_slow=rope.beta_slow)
        if rope.attention_factor is not None:
            out["attention_factor"] = rope.attention_factor
    return out


def text_to_hf(config: DecoderConfig, family: str, original: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ours -> the fields of a decoder config, over what the loaded file said.

    Raises:
        CheckpointError: switches that this family's class cannot hold; without a word it would be another model when it is read again.
    """
    if lost := _unheld(config, family):
        raise CheckpointError(f"a decoder saved as {family} cannot hold {', '.join(lost)}")
    out = copy.deepcopy(original or {})
    out.update(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        intermediate_size=config.mlp_width,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context,
        hidden_act=config.activation,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        rope_parameters=rope_to_hf(config.rope),
        rope_theta=config.rope.theta,
    )
    out.pop("rope_scaling", None)
    out.setdefault("model_type", family)
    if family in ("llama", "qwen3"):
        out["attention_bias"] = config.out_bias
    if family == "llama":
        out["mlp_bias"] = config.mlp_bias
    return out


def rules(family: str, config: DecoderConfig) -> list[Rule]:
    """The key table of a text-only model."""
    head: Rule = Ignore("lm_head.weight") if config.tied else Rename("lm_head.weight", "lm_head.weight")
    return [Ignore("model.layers.{n}.self_attn.rotary_emb.inv_freq"), Rename("model.{rest}", "model.{rest}"), head]


def build(family: str, config: DecoderConfig) -> LanguageModel:
    return LanguageModel(config, family)


def processor(folder: Path, family: str, config: DecoderConfig, raw: dict[str, Any]) -> ChatProcessor | None:
    """Tokenizer and chat template; None for a directory of weights alone."""
    if not any((folder / name).exists() for name in CHAT_FILES if name != "generation_config.json"):
        return None
    return ChatProcessor.from_folder(folder, raw)


def family_of(model: LanguageModel) -> str:
    return model.family


def to_hf(model: LanguageModel) -> dict[str, Any]:
    """The whole `config.json` of a text-only model."""
    original = model.source.get("config", {})
    out = text_to_hf(model.config, model.family, original if original.get("model_type") == model.family else {})
    out.update(architectures=[_ARCHITECTURES[model.family]], dtype=str(model.head_weight.dtype).removeprefix("torch."))
    out.pop("torch_dtype", None)
    return out
