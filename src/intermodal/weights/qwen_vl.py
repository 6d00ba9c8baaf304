"""Qwen-VL's own checkpoint layout (`model_type` "qwen" with a `visual` section) <-> ours: config and key table."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..inputs.chat import CHAT_FILES, ChatProcessor
from ..inputs.image import BICUBIC, CLIP_MEAN, CLIP_STD, ImageProcessor
from ..inputs.queries import TEMPLATE, QueryPlanner
from ..models.decoder import DecoderConfig
from ..models.qwen_vl import QwenVL1, QwenVLConfig
from ..models.vit import VisionConfig
from ..nn.rope import RopeConfig
from .rules import Ignore, Rename, Reshape, Rule, Split, Transpose
from .tiktoken import tokenizer_files

# What the checkpoint's own `configuration_qwen.py` defaults to.
_DEFAULTS: dict[str, Any] = dict(
    vocab_size=151936, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, layer_norm_epsilon=1e-6,
    max_position_embeddings=8192, rotary_pct=1.0, rotary_emb_base=10000, use_dynamic_ntk=True, use_logn_attn=True,
    intermediate_size=22016, no_bias=True, tie_word_embeddings=False, kv_channels=128, seq_length=2048,
)  # fmt: skip


class SplitHeads(Rule):
    """Their one tensor has query, key and value rows head by head; ours are three."""

    def __init__(self, theirs: str, *ours: str, heads: int):
        super().__init__((theirs,), ours)
        object.__setattr__(self, "heads", heads)

    def load(self, tensors: list[Tensor]) -> list[Tensor]:
        heads: int = self.heads  # pyright: ignore[reportAttributeAccessIssue]
        if tensors[0].shape[0] % (3 * heads):
            raise CheckpointError(f"file {tuple(tensors[0].shape)}, which does not divide into 3 x {heads} heads")
        return [part.flatten(0, 1) for part in tensors[0].unflatten(0, (heads, 3, -1)).unbind(1)]

    def save(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack([t.unflatten(0, (self.heads, -1)) for t in tensors], dim=1).flatten(0, 2)]  # pyright: ignore[reportAttributeAccessIssue]


def from_hf(config: dict[str, Any]) -> QwenVLConfig:
    get = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    visual = get.get("visual")
    if not visual:
        raise CheckpointError('model_type "qwen" without a "visual" section is the text-only first Qwen, which is not built')
    if get["rotary_pct"] != 1.0:
        raise CheckpointError(f"rotary_pct {get['rotary_pct']}: rotating a part of each head is not built")
    if visual["output_dim"] != get["hidden_size"]:
        raise CheckpointError(f"visual.output_dim {visual['output_dim']} is not the decoder's width {get['hidden_size']}")
    biased = not get["no_bias"]
    stretched = get["use_dynamic_ntk"] or get["use_logn_attn"]  # they change nothing up to the length of training
    text = DecoderConfig(
        width=get["hidden_size"],
        depth=get["num_hidden_layers"],
        heads=get["num_attention_heads"],
        kv_heads=get["num_attention_heads"],
        head_width=get["kv_channels"],
        mlp_width=get["intermediate_size"] // 2,
        vocab_size=get["vocab_size"],
        context=get["seq_length"] if stretched else get["max_position_embeddings"],
        norm_eps=get["layer_norm_epsilon"],
        rope=RopeConfig(theta=float(get["rotary_emb_base"])),
        qkv_bias=True,
        out_bias=biased,
        mlp_bias=biased,
        tied=bool(get["tie_word_embeddings"]),
    )
    width = visual["width"]
    vision = VisionConfig(
        width=width,
        depth=visual["layers"],
        heads=visual["heads"],
        mlp_width=int(width * visual["mlp_ratio"]),
        activation="gelu",
        norm_eps=1e-6,
        image_size=visual["image_size"],
        patch_size=visual["patch_size"],
    )
    return QwenVLConfig(vision, text, queries=visual.get("n_queries", 256), image_start_id=visual.get("image_start_id", 151857))


def rules(family: str, config: QwenVLConfig) -> list[Rule]:
    vision, tower, layer = config.vision, "transformer.visual", "transformer.h.{n}"
    kernel = (vision.width, vision.channels, vision.patch_size, vision.patch_size)
    block, ours = f"{tower}.transformer.resblocks.{{n}}", "visual.encoder.layers.{n}"
    table: list[Rule] = [
        Rename("transformer.wte.weight", "model.embed_tokens.weight"),
        Rename("transformer.ln_f.weight", "model.norm.weight"),
        Ignore("lm_head.weight") if config.text.tied else Rename("lm_head.weight", "lm_head.weight"),
        Ignore("transformer.rotary_emb.inv_freq"),
        Rename(f"{layer}.ln_1.weight", "model.layers.{n}.input_layernorm.weight"),
        Rename(f"{layer}.ln_2.weight", "model.layers.{n}.post_attention_layernorm.weight"),
        Rename(f"{layer}.attn.c_proj.{{rest}}", "model.layers.{n}.self_attn.o_proj.{rest}"),
        Rename(f"{layer}.mlp.w1.{{rest}}", "model.layers.{n}.mlp.up_proj.{rest}"),
        Rename(f"{layer}.mlp.w2.{{rest}}", "model.layers.{n}.mlp.gate_proj.{rest}"),
        Rename(f"{layer}.mlp.c_proj.{{rest}}", "model.layers.{n}.mlp.down_proj.{rest}"),
        Reshape(f"{tower}.conv1.weight", "visual.patch_embedding.weight", their_shape=kernel, our_shape=(vision.width, -1)),
        Rename(f"{tower}.positional_embedding", "visual.position_embedding"),
        Rename(f"{tower}.ln_pre.{{rest}}", "visual.pre_layernorm.{rest}"),
        Rename(f"{tower}.ln_post.{{rest}}", "visual.post_layernorm.{rest}"),
        Transpose(f"{tower}.proj", "visual.proj.weight"),
        Rename(f"{block}.ln_1.{{rest}}", f"{ours}.layer_norm1.{{rest}}"),
        Rename(f"{block}.ln_2.{{rest}}", f"{ours}.layer_norm2.{{rest}}"),
        Rename(f"{block}.attn.out_proj.{{rest}}", f"{ours}.self_attn.out_proj.{{rest}}"),
        Rename(f"{block}.mlp.c_fc.{{rest}}", f"{ours}.mlp.fc1.{{rest}}"),
        Rename(f"{block}.mlp.c_proj.{{rest}}", f"{ours}.mlp.fc2.{{rest}}"),
        Rename(f"{tower}.attn_pool.attn.out_proj.{{rest}}", "visual.resampler.out_proj.{rest}"),
    ]
    for kind in ("weight", "bias"):
        names = [f"model.layers.{{n}}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        table.append(Split(f"{layer}.attn.c_attn.{kind}", *names))
        names = [f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        table.append(SplitHeads(f"{block}.attn.in_proj.{kind}", *names, heads=vision.heads))
        names = [f"visual.resampler.{part}_proj.{kind}" for part in "qkv"]
        table.append(Split(f"{tower}.attn_pool.attn.in_proj_{kind}", *names))
    return [*table, Rename(f"{tower}.attn_pool.{{rest}}", "visual.resampler.{rest}")]


def build(family: str, config: QwenVLConfig) -> QwenVL1:
    return QwenVL1(config)


def processor(folder: Path, family: str, config: QwenVLConfig, raw: dict[str, Any]) -> ChatProcessor | None:
    files = {name: (folder / name).read_bytes() for name in CHAT_FILES if (folder / name).exists()}
    if "tokenizer.json" not in files and "qwen.tiktoken" in files:
        # the checkpoint's tokenizer_config.json names a Python class of its own; ours takes its place
        files |= tokenizer_files(files["qwen.tiktoken"])
    if "tokenizer.json" not in files:
        return None
    if not any(name.startswith("chat_template") for name in files):
        files["chat_template.jinja"] = TEMPLATE.encode()
    side = config.vision.image_size
    pictures = ImageProcessor((side, side), resample=BICUBIC, mean=CLIP_MEAN, std=CLIP_STD)
    planner = QueryPlanner({"image": config.image_id}, side, config.query_side, pictures)
    try:
        return ChatProcessor.from_files(files, raw, lambda tokenizer: planner)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def family_of(model: QwenVL1) -> str:
    return model.family


def to_hf(model: QwenVL1) -> dict[str, Any]:
    config, text, vision = model.config, model.config.text, model.config.vision
    original = model.source.get("config", {})
    out = copy.deepcopy(original) if original.get("model_type") == "qwen" else {}
    visual = dict(out.get("visual") or {})
    if int(vision.width * visual.get("mlp_ratio", 0)) != vision.mlp_width:
        visual["mlp_ratio"] = (vision.mlp_width + 0.5) / vision.width  # the reader truncates
    visual.update(
        width=vision.width,
        layers=vision.depth,
        heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        output_dim=text.width,
        image_start_id=config.image_start_id,
    )
    if config.queries != visual.get("n_queries", 256):
        visual["n_queries"] = config.queries
    out.update(
        model_type="qwen",
        architectures=["QWenLMHeadModel"],
        visual=visual,
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        num_hidden_layers=text.depth,
        num_attention_heads=text.heads,
        kv_channels=text.head_width,
        intermediate_size=2 * text.mlp_width,
        layer_norm_epsilon=text.norm_eps,
        rotary_emb_base=int(text.rope.theta) if text.rope.theta == int(text.rope.theta) else text.rope.theta,
        no_bias=not text.out_bias,
        tie_word_embeddings=text.tied,
    )
    out.setdefault("seq_length", text.context)
    return out
