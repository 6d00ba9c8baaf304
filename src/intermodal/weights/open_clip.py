"""open_clip's own checkpoint layout for ViT models: `open_clip_config.json` and its weights file.

CLIP towers (`visual.` and top-level text keys, or `text.` with a custom text tower) and SigLIP towers (a timm trunk and a
non-causal text tower). Source of names and defaults: open_clip `model.py`, `transformer.py`, `timm_model.py`.
"""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json
from ..inputs.image import CLIP_MEAN, CLIP_STD, ImageProcessor
from ..inputs.text import canonicalise, lower_case
from ..models.clip import DualConfig, DualEncoder
from ..models.text import LEGACY_EOS, TextConfig
from ..models.vit import VisionConfig
from .clip import family_of
from .files import read_pickle, read_weights, write_weights
from .rules import Ignore, Rename, Reshape, Rule, Split, Transpose, convert

CONFIG = "open_clip_config.json"
OWN_VOCABULARY = 49408
"""Tokens of CLIP's tokenizer, which open_clip brings along."""
STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
TRAINED = (".pt", ".pth")
"""How the files end that open_clip's training writes (`checkpoints/epoch_N.pt`)."""

Described = tuple[str, DualConfig, dict[str, Any], list[Rule], dict[str, Tensor]]
"""Family, config, their config, key table and their tensors."""


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


def read(folder: Path) -> Described:
    """A directory with `open_clip_config.json` and its weights."""
    return _described(str(folder), _config_file(folder / CONFIG), read_weights(folder, STEMS))


def read_trained(path: Path) -> Described:
    """A file that open_clip's training has written. Such a file does not say which model it is of: the model's config stands beside it.

    Raises:
        CheckpointError: no config beside it; what it holds is another kind of model.
    """
    config = path.parent / CONFIG
    if not config.exists():
        raise CheckpointError(
            f"{path} does not say which model it is of: copy open_clip's model_configs/NAME.json of that model to {config} "
            "(and its tokenizer's files, for texts)"
        )
    return _described(str(path), _config_file(config), read_pickle(path))


def _config_file(path: Path) -> dict[str, Any]:
    """`open_clip_config.json`: as published, or one of open_clip's own `model_configs`, which is the inner part alone."""
    raw = read_json(path)
    return raw if "model_cfg" in raw else {"model_cfg": raw}


def _described(where: str, raw: dict[str, Any], state: dict[str, Tensor]) -> Described:
    try:
        if "visual.trunk.pos_embed" in state:
            config = _siglip_config(raw, state)
            return "siglip", config, raw, siglip_rules(config), _scalars(state)
        if "visual.class_embedding" not in state:
            raise CheckpointError(
                f"{where}: only open_clip's ViT towers are read (no visual.class_embedding or visual.trunk.pos_embed)"
            )
        config = _clip_config(raw, state)
        return "clip", config, raw, clip_rules(config, "text.token_embedding.weight" in state), _scalars(state)
    except KeyError as error:
        raise CheckpointError(f"{where} lacks the tensor {error.args[0]}") from None


def _scalars(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.reshape(()) if key in ("logit_scale", "logit_bias") else value for key, value in state.items()}


def _refuse(cfg: dict[str, Any], section: str, allowed: dict[str, tuple]) -> None:
    """Raise for settings that would change the model's answers and that our towers do not have."""
    for name, values in allowed.items():
        if cfg.get(name) and cfg[name] not in values:
            raise CheckpointError(f"open_clip {section}.{name}={cfg[name]!r} is not built here; known: {values}")


def _text_config(raw: dict[str, Any], state: dict[str, Tensor], prefix: str, **defaults: Any) -> TextConfig:
    cfg = raw.get("model_cfg", {}).get("text_cfg", {})
    vocab, width = state[f"{prefix}token_embedding.weight"].shape
    eos = vocab - 1  # pooling at the largest id, CLIP's end token
    if cfg.get("pool_type") == "eos":
        eos = cfg.get("eos_id", 2)
        if eos == LEGACY_EOS:
            raise CheckpointError(
                f"open_clip text_cfg.eos_id={eos} with pool_type 'eos' is not built here: {eos} stands for 'argmax'"
            )
    return TextConfig(
        width=width,
        depth=_depth(state, f"{prefix}transformer.resblocks."),
        heads=cfg.get("heads", 8),
        mlp_width=state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        vocab_size=vocab,
        context=state[f"{prefix}positional_embedding"].shape[0],
        eos_id=eos,
        pad_id=cfg.get("pad_id", 0),
        bos_id=vocab - 2,
        **defaults,
    )


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


def _eps(cfg: dict[str, Any]) -> float:
    return (cfg.get("norm_kwargs") or {}).get("eps", 1e-5)


def _clip_config(raw: dict[str, Any], state: dict[str, Tensor]) -> DualConfig:
    model = raw.get("model_cfg", {})
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    _refuse(
        vision,
        "vision_cfg",
        {"pool_type": ("tok",), "act_kwargs": (), "attentional_pool": (), "no_ln_pre": (), "ls_init_value": ()},
    )
    _refuse(
        text, "text_cfg", {"pool_type": ("argmax", "eos"), "act_kwargs": (), "no_causal_mask": (), "proj_bias": (), "embed_cls": ()}
    )
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width = state["visual.conv1.weight"].shape[0]
    prefix = "text." if "text.token_embedding.weight" in state else ""
    return DualConfig(
        vision=VisionConfig(
            width=width,
            depth=_depth(state, "visual.transformer.resblocks."),
            heads=width // vision.get("head_width", 64),
            mlp_width=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            activation=activation,
            norm_eps=_eps(vision),
            image_size=vision.get("image_size", 224),
            patch_size=state["visual.conv1.weight"].shape[-1],
        ),
        text=_text_config(raw, state, prefix, activation=activation, norm_eps=_eps(text)),
        embed_width=state["visual.proj"].shape[1],
    )


# timm's SigLIP towers by name: width, depth, heads, MLP width, and (patch, picture) sizes; open_clip's configs give only the name.
# Source: timm 1.0 `vision_transformer.py`, vit_*_siglip_*.
TRUNKS = {
    "vit_base": ((768, 12, 12, 3072), {(16, 224), (16, 256), (16, 384), (16, 512), (32, 256)}),
    "vit_large": ((1024, 24, 16, 4096), {(16, 256), (16, 384), (16, 512)}),
    "vit_so400m": ((1152, 27, 16, 4304), {(14, 224), (14, 378), (14, 384), (16, 256), (16, 384), (16, 512)}),
    "vit_giantopt": ((1536, 40, 16, 6144), {(16, 256), (16, 384)}),
}
TIMM_EPS = 1e-6


def _trunk_heads(raw: dict[str, Any]) -> int:
    """Heads of a timm trunk, from its name."""
    name = raw.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name", "")
    for known, (shape, _) in TRUNKS.items():
        if name.startswith(f"{known}_"):
            return shape[2]
    raise CheckpointError(f"open_clip vision_cfg.timm_model_name={name!r}: heads unknown; known trunks: {', '.join(TRUNKS)}")


def _trunk_name(vision: VisionConfig) -> str:
    """The timm name of a tower's shape.

    Raises:
        CheckpointError: timm has no such tower, and open_clip makes SigLIP towers by timm's names only.
    """
    shape = (vision.width, vision.depth, vision.heads, vision.mlp_width)
    for known, (known_shape, sizes) in TRUNKS.items():
        if known_shape == shape and (vision.patch_size, vision.image_size) in sizes:
            return f"{known}_patch{vision.patch_size}_siglip_{vision.image_size}"
    raise CheckpointError(
        f"open_clip makes SigLIP towers by timm's names, and timm has none of width {vision.width}, depth {vision.depth}, "
        f"{vision.heads} heads, patch {vision.patch_size} and {vision.image_size} px ({', '.join(TRUNKS)}, each with its own sizes): "
        "save it with layout='hf'"
    )


def _siglip_config(raw: dict[str, Any], state: dict[str, Tensor]) -> DualConfig:
    model = raw.get("model_cfg", {})
    trunk = "visual.trunk"
    width = state[f"{trunk}.pos_embed"].shape[-1]
    text_kwargs = model.get("text_cfg", {}).get("act_kwargs") or {}
    vision = VisionConfig(
        width=width,
        depth=_depth(state, f"{trunk}.blocks."),
        heads=_trunk_heads(raw),
        mlp_width=state[f"{trunk}.blocks.0.mlp.fc1.weight"].shape[0],
        activation="gelu_pytorch_tanh" if text_kwargs.get("approximate") == "tanh" else "gelu",
        norm_eps=TIMM_EPS,
        image_size=model.get("vision_cfg", {}).get("image_size", 224),
        patch_size=state[f"{trunk}.patch_embed.proj.weight"].shape[-1],
    )
    text = _text_config(
        raw,
        state,
        "text.",
        activation=vision.activation,
        norm_eps=_eps(model.get("text_cfg", {})),
    )
    return DualConfig(vision=vision, text=text, embed_width=width)


def pictures(raw: dict[str, Any], side: int) -> ImageProcessor:
    """The image processor that open_clip's `preprocess_cfg` asks for. Source: open_clip `transform.py`, `image_transform` in evaluation.

    Raises:
        CheckpointError: a resize mode that open_clip does not have.
    """
    cfg = raw.get("preprocess_cfg", {})
    mode, square = cfg.get("resize_mode", "shortest"), (side, side)
    if mode not in RESIZE_MODES:
        raise CheckpointError(f"open_clip_config.json: resize_mode {mode!r} is not one of {', '.join(RESIZE_MODES)}")
    return ImageProcessor(
        size=side if mode == "shortest" else square,
        crop=square if mode == "shortest" else None,
        resample={"bicubic": 3, "bilinear": 2}.get(cfg.get("interpolation", "bicubic"), 3),
        mean=tuple(cfg.get("mean") or CLIP_MEAN),
        std=tuple(cfg.get("std") or CLIP_STD),
        letterbox=mode == "longest",
        fill=int(cfg.get("fill_color") or 0),
    )


def text_clean_up(raw: dict[str, Any]) -> Callable[[str], str]:
    """What `text_cfg.tokenizer_kwargs.clean` asks to do to a text before it becomes tokens.

    Where it says nothing, open_clip lowers the case for its own tokenizer and not for others (`hf_tokenizer_name`). open_clip also
    repairs broken encodings (the `ftfy` package) before; texts here are taken to be sound.
    Source: open_clip `tokenizer.py`, `get_clean_fn`; `factory.py`, `get_tokenizer`.

    Raises:
        CheckpointError: a clean-up that open_clip does not have.
    """
    text_cfg = raw.get("model_cfg", {}).get("text_cfg", {})
    default = "whitespace" if text_cfg.get("hf_tokenizer_name") else "lower"
    name = (text_cfg.get("tokenizer_kwargs") or {}).get("clean", default)
    if name not in CLEAN_UPS:
        raise CheckpointError(f"open_clip_config.json: the text clean-up {name!r} is not one of {', '.join(CLEAN_UPS)}")
    return CLEAN_UPS[name]


def _single_spaces(text: str) -> str:
    return " ".join(html.unescape(html.unescape(text)).split())


def _lower(text: str) -> str:
    return lower_case(_single_spaces(text))


def _canonical(text: str) -> str:
    return canonicalise(html.unescape(html.unescape(text)))


def _clean_up_name(clean: Callable[[str], str] | None) -> str:
    """open_clip's word for a tokenizer's clean-up; it has none for "as it is", and single spaces are nearest to that."""
    if isinstance(clean, partial) and clean.func is canonicalise:
        return "canonicalize"
    if clean is lower_case:
        return "lower"
    return next((name for name, function in CLEAN_UPS.items() if function is clean), "whitespace")


RESIZE_MODES = ("shortest", "longest", "squash")
CLEAN_UPS = {"whitespace": _single_spaces, "lower": _lower, "canonicalize": _canonical}


def write(model: DualEncoder, folder: Path) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`, a directory for open_clip's `local-dir:` and hub models.

    Raises:
        CheckpointError: a NaFlex model, which open_clip keeps in another tower class; a setting or size that its config cannot say.
    """
    family = family_of(model)
    if family == "siglip2":
        raise CheckpointError("open_clip's ViT layout does not hold NaFlex models; use layout='hf'")
    loaded = model.source.get("config", {})
    raw = copy.deepcopy(loaded) if "model_cfg" in loaded else _config(model, family)
    vision_cfg, side = raw["model_cfg"]["vision_cfg"], model.config.vision.image_size
    if family == "siglip" and vision_cfg["image_size"] != side:  # resampled since it was loaded
        vision_cfg["timm_model_name"] = _trunk_name(model.config.vision)
    vision_cfg["image_size"] = side
    custom = family == "siglip" or bool(raw["model_cfg"].get("custom_text"))
    rules = siglip_rules(model.config) if family == "siglip" else clip_rules(model.config, custom)
    write_weights(convert(model.state_dict(), rules, saving=True), folder, stem="open_clip_model")
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")


def _config(model: DualEncoder, family: str) -> dict[str, Any]:
    config, vision, text = model.config, model.config.vision, model.config.text
    activations = {vision.activation, text.activation}
    allowed = {"clip": ({"gelu"}, {"quick_gelu"}), "siglip": ({"gelu"}, {"gelu_pytorch_tanh"})}[family]
    if activations not in allowed:
        raise CheckpointError(f"open_clip's config cannot say activations {sorted(activations)} for {family}")
    text_cfg: dict[str, Any] = {
        "context_length": text.context,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": _ratio(text.mlp_width, text.width),
    }
    vision_cfg: dict[str, Any] = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    model_cfg: dict[str, Any] = {"embed_dim": config.embed_width, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    if family == "clip":
        model_cfg["quick_gelu"] = vision.activation == "quick_gelu"
        if text.eos_id not in (LEGACY_EOS, text.vocab_size - 1):  # open_clip pools at the largest id if it is not told
            text_cfg.update(pool_type="eos", eos_id=text.eos_id)
        vision_cfg.update(layers=vision.depth, width=vision.width, head_width=vision.width // vision.heads)
        vision_cfg["mlp_ratio"] = _ratio(vision.mlp_width, vision.width)
        for cfg, tower in ((vision_cfg, vision), (text_cfg, text)):
            if tower.norm_eps != 1e-5:
                cfg["norm_kwargs"] = {"eps": tower.norm_eps}
    else:
        if vision.norm_eps != TIMM_EPS:
            raise CheckpointError(f"open_clip's SigLIP trunks have a norm epsilon of {TIMM_EPS}, this one {vision.norm_eps}")
        vision_cfg.update(timm_model_name=_trunk_name(vision), timm_model_pretrained=False, timm_pool="map", timm_proj="none")
        text_cfg.update(no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs={"eps": text.norm_eps})
        if text.activation == "gelu_pytorch_tanh":
            text_cfg["act_kwargs"] = {"approximate": "tanh"}
        model_cfg.update(custom_text=True, init_logit_bias=-10)
    if model.processor is not None and model.processor.tokenizer is not None and text.vocab_size != OWN_VOCABULARY:
        # else open_clip would take its own tokenizer; from a `local-dir:` it reads the files beside the config, whatever the name
        text_cfg["hf_tokenizer_name"] = "local-dir"
        text_cfg["tokenizer_kwargs"] = {"clean": _clean_up_name(model.processor.tokenizer.clean)}
    preprocess: dict[str, Any] = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD), "interpolation": "bicubic"}
    if model.processor is not None and isinstance(model.processor.images, ImageProcessor):
        images = model.processor.images
        preprocess = {
            "mean": list(images.mean or ()),
            "std": list(images.std or ()),
            "interpolation": {3: "bicubic", 2: "bilinear"}[int(images.resample)],
            "resize_mode": "longest" if images.letterbox else "shortest" if isinstance(images.size, int) else "squash",
            **({"fill_color": images.fill} if images.fill else {}),
        }
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}


def _ratio(hidden: int, width: int) -> float:
    """open_clip builds `int(width * ratio)` hidden values: a ratio that rounds down to one less is nudged up."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
