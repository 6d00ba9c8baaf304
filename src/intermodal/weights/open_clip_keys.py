"""open_clip's names for the tensors of CLIP and SigLIP models. Source: open_clip `model.py`, `transformer.py`, `timm_model.py`."""

from __future__ import annotations

from ..models.clip import DualConfig
from .rules import Ignore, Rename, Reshape, Rule, Split, Transpose


def _blocks(theirs: str, ours: str) -> list[Rule]:
    """A residual attention stack; `attn.in_proj` holds q, k and v in one."""
    block, layer = f"{theirs}transformer.resblocks.{{n}}", f"{ours}.encoder.layers.{{n}}"
    return [
        Rename(f"{block}.ln_1.{{rest}}", f"{layer}.layer_norm1.{{rest}}"),
        Rename(f"{block}.ln_2.{{rest}}", f"{layer}.layer_norm2.{{rest}}"),
        Split(f"{block}.attn.in_proj_weight", *(f"{layer}.self_attn.{x}_proj.weight" for x in "qkv")),
        Split(f"{block}.attn.in_proj_bias", *(f"{layer}.self_attn.{x}_proj.bias" for x in "qkv")),
        Rename(f"{block}.attn.out_proj.{{rest}}", f"{layer}.self_attn.out_proj.{{rest}}"),
        Rename(f"{block}.mlp.c_fc.{{rest}}", f"{layer}.mlp.fc1.{{rest}}"),
        Rename(f"{block}.mlp.c_proj.{{rest}}", f"{layer}.mlp.fc2.{{rest}}"),
    ]


def _text(prefix: str) -> list[Rule]:
    return [
        Ignore(f"{prefix}attn_mask"),
        Rename(f"{prefix}token_embedding.weight", "text.token_embedding.weight"),
        Rename(f"{prefix}positional_embedding", "text.position_embedding"),
        Rename(f"{prefix}ln_final.{{rest}}", "text.final_layer_norm.{rest}"),
        *_blocks(prefix, "text"),
    ]


def clip_rules(config: DualConfig, custom_text: bool) -> list[Rule]:
    vision = config.vision
    conv = (vision.width, vision.channels, vision.patch_size, vision.patch_size)
    prefix = "text." if custom_text else ""
    return [
        Rename("logit_scale", "logit_scale"),
        Rename("logit_bias", "logit_bias"),  # where `--siglip` has trained it
        Rename("visual.class_embedding", "vision.class_embedding"),
        Rename("visual.positional_embedding", "vision.position_embedding"),
        Reshape("visual.conv1.weight", "vision.patch_embedding.weight", their_shape=conv, our_shape=(vision.width, -1)),
        Rename("visual.ln_pre.{rest}", "vision.pre_layernorm.{rest}"),
        Rename("visual.ln_post.{rest}", "vision.post_layernorm.{rest}"),
        Transpose("visual.proj", "visual_projection.weight"),
        *_blocks("visual.", "vision"),
        Transpose(f"{prefix}text_projection", "text_projection.weight"),
        *_text(prefix),
    ]


def siglip_rules(config: DualConfig) -> list[Rule]:
    """SigLIP in open_clip: a timm vision trunk with attention pooling, and open_clip's text tower with a biased projection."""
    vision = config.vision
    conv = (vision.width, vision.channels, vision.patch_size, vision.patch_size)
    trunk, block, layer = "visual.trunk", "visual.trunk.blocks.{n}", "vision.encoder.layers.{n}"
    pool, head = "visual.trunk.attn_pool", "vision.head"
    return [
        Rename("logit_scale", "logit_scale"),
        Rename("logit_bias", "logit_bias"),
        Reshape(f"{trunk}.pos_embed", "vision.position_embedding", their_shape=(1, -1, vision.width), our_shape=(-1, vision.width)),
        Reshape(
            f"{trunk}.patch_embed.proj.weight", "vision.patch_embedding.weight", their_shape=conv, our_shape=(vision.width, -1)
        ),
        Rename(f"{trunk}.patch_embed.proj.bias", "vision.patch_embedding.bias"),
        Rename(f"{trunk}.norm.{{rest}}", "vision.post_layernorm.{rest}"),
        Rename(f"{block}.norm1.{{rest}}", f"{layer}.layer_norm1.{{rest}}"),
        Rename(f"{block}.norm2.{{rest}}", f"{layer}.layer_norm2.{{rest}}"),
        Split(f"{block}.attn.qkv.weight", *(f"{layer}.self_attn.{x}_proj.weight" for x in "qkv")),
        Split(f"{block}.attn.qkv.bias", *(f"{layer}.self_attn.{x}_proj.bias" for x in "qkv")),
        Rename(f"{block}.attn.proj.{{rest}}", f"{layer}.self_attn.out_proj.{{rest}}"),
        Rename(f"{block}.mlp.{{rest}}", f"{layer}.mlp.{{rest}}"),
        Reshape(f"{pool}.latent", f"{head}.probe", their_shape=(1, 1, vision.width), our_shape=(1, vision.width)),
        Rename(f"{pool}.q.{{rest}}", f"{head}.q_proj.{{rest}}"),
        Split(f"{pool}.kv.weight", f"{head}.k_proj.weight", f"{head}.v_proj.weight"),
        Split(f"{pool}.kv.bias", f"{head}.k_proj.bias", f"{head}.v_proj.bias"),
        Rename(f"{pool}.proj.{{rest}}", f"{head}.out_proj.{{rest}}"),
        Rename(f"{pool}.norm.{{rest}}", f"{head}.layernorm.{{rest}}"),
        Rename(f"{pool}.mlp.{{rest}}", f"{head}.mlp.{{rest}}"),
        Rename("text.text_projection.{rest}", "text_head.{rest}"),
        *_text("text."),
    ]
