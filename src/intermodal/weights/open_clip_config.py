"""`open_clip_config.json` <-> our configs: the towers (`model_cfg`), how pictures are made (`preprocess_cfg`) and texts cleaned."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..inputs.image import CLIP_MEAN, CLIP_STD, ImageProcessor
from ..inputs.text import canonicalise, lower_case
from ..models.clip import DualConfig, DualEncoder
from ..models.text import LEGACY_EOS, TextConfig
from ..models.vit import VisionConfig
from .open_clip_checks import check_towers, refuse

OWN_VOCABULARY = 49408
"""Tokens of CLIP's tokenizer, which open_clip brings along."""
RESIZE_MODES = ("shortest", "longest", "squash")


def _text_config(raw: dict[str, Any], state: dict[str, Tensor], prefix: str, **defaults: Any) -> TextConfig:
    cfg, layers = raw.get("model_cfg", {}).get("text_cfg", {}), f"{prefix}transformer.resblocks."
    rows, columns = _shape(state, f"{prefix}token_embedding.weight", 2)
    vocab, width = cfg.get("vocab_size", rows), cfg.get("width", columns)
    eos = vocab - 1  # pooling at the largest id, CLIP's end token
    if cfg.get("pool_type") == "eos":
        eos = cfg.get("eos_id", 2)
        if eos == LEGACY_EOS:
            raise CheckpointError(
                f"open_clip text_cfg.eos_id={eos} with pool_type 'eos' is not built here: {eos} stands for 'argmax'"
            )
    return TextConfig(
        width=width,
        depth=cfg.get("layers", _depth(state, layers)),
        heads=cfg.get("heads", 8),
        mlp_width=_mlp_width(state, layers),
        vocab_size=vocab,
        context=cfg.get("context_length", _shape(state, f"{prefix}positional_embedding", 2)[0]),
        eos_id=eos,
        pad_id=cfg.get("pad_id", 0),
        bos_id=vocab - 2,
        **defaults,
    )


def _mlp_width(state: dict[str, Tensor], layers: str, first: str = "c_fc", second: str = "c_proj") -> int:
    """Hidden values of the blocks' MLPs: what most of their tensors say, so that one of a wrong shape is found by the others."""
    said = Counter()
    for key, value in state.items():
        if key.startswith(layers) and key.endswith((f".mlp.{first}.weight", f".mlp.{first}.bias")):
            said[value.shape[0] if value.ndim else 0] += 1
        elif key.startswith(layers) and key.endswith(f".mlp.{second}.weight"):
            said[value.shape[-1] if value.ndim else 0] += 1
    if not said:
        raise KeyError(f"{layers}0.mlp.{first}.weight")
    return said.most_common(1)[0][0]


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    layers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return 1 + max((int(layer) for layer in layers if layer.isdigit()), default=-1)


def _shape(state: dict[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that must have so many axes; raises KeyError where it is missing."""
    shape = tuple(state[key].shape)
    if len(shape) != axes:
        raise CheckpointError(f"misshapen {key}: file {shape}, which should have {axes} axes")
    return shape


def _eps(cfg: dict[str, Any]) -> float:
    return (cfg.get("norm_kwargs") or {}).get("eps", 1e-5)


def clip_config(raw: dict[str, Any], state: dict[str, Tensor]) -> DualConfig:
    """A CLIP's config, from `model_cfg`, and from the shapes of its tensors where that leaves a size out.

    It has a bias where the file has one: `open_clip_train --siglip` learns it whatever the model's own config says.

    Raises:
        CheckpointError: a setting that is not built here, a tensor of another number of axes.
        KeyError: a tensor that shapes are read from is missing.
    """
    model = raw.get("model_cfg", {})
    check_towers(model)
    vision, text = model["vision_cfg"], model["text_cfg"]
    refuse(
        vision,
        "vision_cfg",
        {
            "pool_type": ("tok",),
            "act_kwargs": (),
            "attentional_pool": (),
            "no_ln_pre": (),
            "ls_init_value": (),
            "timm_model_name": (),
        },
    )
    refuse(
        text, "text_cfg", {"pool_type": ("argmax", "eos"), "act_kwargs": (), "no_causal_mask": (), "proj_bias": (), "embed_cls": ()}
    )
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    columns, _, _, side = _shape(state, "visual.conv1.weight", 4)
    width, layers = vision.get("width", columns), "visual.transformer.resblocks."
    head_width = vision.get("head_width", 64)
    if isinstance(head_width, bool) or not isinstance(head_width, int) or not 1 <= head_width <= width:
        raise CheckpointError(f"open_clip_config.json: vision_cfg.head_width {head_width!r} does not fit a tower {width} wide")
    prefix = "text." if "text.token_embedding.weight" in state else ""
    return DualConfig(
        vision=VisionConfig(
            width=width,
            depth=vision.get("layers", _depth(state, layers)),
            heads=width // head_width,
            mlp_width=_mlp_width(state, layers),
            activation=activation,
            norm_eps=_eps(vision),
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", side),
        ),
        text=_text_config(raw, state, prefix, activation=activation, norm_eps=_eps(text)),
        embed_width=model.get("embed_dim", _shape(state, "visual.proj", 2)[1]),
        with_bias="logit_bias" in state,
        **_starts(model),
    )


def _starts(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """What a scale and bias began from, where `model_cfg` says it. open_clip writes the scale as its logarithm, as it is learned."""
    starts = {}
    if model_cfg.get("init_logit_scale") is not None:
        starts["init_scale"] = math.exp(model_cfg["init_logit_scale"])
    if model_cfg.get("init_logit_bias") is not None:
        starts["init_bias"] = float(model_cfg["init_logit_bias"])
    return starts


# timm's SigLIP towers by name: width, depth, heads, MLP width, and (patch, picture) sizes; open_clip's configs give only the name.
# Source: timm 1.0 `vision_transformer.py`, vit_*_siglip_*.
TRUNKS = {
    "vit_base": ((768, 12, 12, 3072), {(16, 224), (16, 256), (16, 384), (16, 512), (32, 256)}),
    "vit_large": ((1024, 24, 16, 4096), {(16, 256), (16, 384), (16, 512)}),
    "vit_so400m": ((1152, 27, 16, 4304), {(14, 224), (14, 378), (14, 384), (16, 256), (16, 384), (16, 512)}),
    "vit_giantopt": ((1536, 40, 16, 6144), {(16, 256), (16, 384)}),
}
TIMM_EPS = 1e-6


def _trunk_width(raw: dict[str, Any]) -> tuple[int, int]:
    """Width and heads of a timm trunk, from its name: of those with `_gap` and the like in it the pooling is another.

    Raises:
        CheckpointError: a name that is not known.
    """
    name = raw.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name", "")
    for known, ((width, _, heads, _), _) in TRUNKS.items():
        if re.fullmatch(rf"{re.escape(known)}_patch\d+_siglip_\d+(\..*)?", str(name)):
            return width, heads
    raise CheckpointError(
        f"open_clip vision_cfg.timm_model_name={name!r}: heads unknown; known are NAME_patchP_siglip_SIZE with NAME of {', '.join(TRUNKS)}"
    )


def trunk_name(vision: VisionConfig) -> str:
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


def siglip_config(raw: dict[str, Any], state: dict[str, Tensor]) -> DualConfig:
    """A SigLIP's config; raises as `clip_config`, and for a trunk that is not timm's SigLIP."""
    model = raw.get("model_cfg", {})
    check_towers(model)
    refuse(model["vision_cfg"], "vision_cfg", {"timm_pool": ("map",), "timm_proj": ("none",)})
    width, heads = _trunk_width(raw)
    text_kwargs = model.get("text_cfg", {}).get("act_kwargs") or {}
    vision = VisionConfig(
        width=width,
        depth=_depth(state, "visual.trunk.blocks."),
        heads=heads,
        mlp_width=_mlp_width(state, "visual.trunk.blocks.", "fc1", "fc2"),
        activation="gelu_pytorch_tanh" if text_kwargs.get("approximate") == "tanh" else "gelu",
        norm_eps=TIMM_EPS,
        image_size=model.get("vision_cfg", {}).get("image_size", 224),
        patch_size=_shape(state, "visual.trunk.patch_embed.proj.weight", 4)[-1],
    )
    text = _text_config(
        raw,
        state,
        "text.",
        activation=vision.activation,
        norm_eps=_eps(model.get("text_cfg", {})),
    )
    return DualConfig(vision=vision, text=text, embed_width=width, **_starts(model))


def pictures(raw: dict[str, Any], side: int) -> ImageProcessor:
    """The image processor that open_clip's `preprocess_cfg` asks for. Source: open_clip `transform.py`, `image_transform` in evaluation.

    Raises:
        CheckpointError: a resize mode that open_clip does not have; a standard deviation of 0.
    """
    cfg = raw.get("preprocess_cfg", {})
    mode, square = cfg.get("resize_mode", "shortest"), (side, side)
    if mode not in RESIZE_MODES:
        raise CheckpointError(f"open_clip_config.json: resize_mode {mode!r} is not one of {', '.join(RESIZE_MODES)}")
    std = tuple(cfg.get("std") or CLIP_STD)
    if not all(value > 0 for value in std):
        raise CheckpointError(
            f"open_clip_config.json: preprocess_cfg.std {list(std)} divides by 0: three numbers above 0 are wanted"
        )
    return ImageProcessor(
        size=side if mode == "shortest" else square,
        crop=square if mode == "shortest" else None,
        resample={"bicubic": 3, "bilinear": 2}.get(cfg.get("interpolation", "bicubic"), 3),
        mean=tuple(cfg.get("mean") or CLIP_MEAN),
        std=std,
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


def clean_as_saved(model: DualEncoder) -> None:
    """Give a CLIP's tokenizer now the clean-up that it has once the model was saved in this layout and loaded again.

    The layout has no word for a tokenizer that takes texts as they are. A run that resumes from its saved start must read texts as the
    one that made it.

    Raises:
        CheckpointError: the model has a setting that the layout cannot say.
    """
    loaded = model.source.get("config", {})
    raw = loaded if "model_cfg" in loaded else to_config(model, "clip")
    if model.processor is not None and model.processor.tokenizer is not None:
        model.processor.tokenizer.clean = text_clean_up(raw)


CLEAN_UPS = {"whitespace": _single_spaces, "lower": _lower, "canonicalize": _canonical}


def to_config(model: DualEncoder, family: str) -> dict[str, Any]:
    """`open_clip_config.json` of a model that did not come with one.

    Raises:
        CheckpointError: a setting or size that it cannot say.
    """
    config = model.config
    model_cfg = {
        "embed_dim": config.embed_width,
        "vision_cfg": _vision_cfg(config.vision, family),
        "text_cfg": _text_cfg(model, family),
        **({"quick_gelu": config.vision.activation == "quick_gelu"} if family == "clip" else {"custom_text": True}),
        **bias_cfg(model),
    }
    return {"model_cfg": model_cfg, "preprocess_cfg": _preprocess_cfg(model)}


def bias_cfg(model: DualEncoder) -> dict[str, float]:
    """What makes open_clip build a model with a bias, of either kind of tower."""
    if model.logit_bias is None:
        return {}
    return {"init_logit_scale": math.log(model.config.init_scale), "init_logit_bias": model.config.init_bias}


def _vision_cfg(vision: VisionConfig, family: str) -> dict[str, Any]:
    cfg: dict[str, Any] = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    if family == "siglip":
        if vision.norm_eps != TIMM_EPS:
            raise CheckpointError(f"open_clip's SigLIP trunks have a norm epsilon of {TIMM_EPS}, this one {vision.norm_eps}")
        return cfg | {
            "timm_model_name": trunk_name(vision),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
    cfg |= {"layers": vision.depth, "width": vision.width, "head_width": vision.width // vision.heads}
    cfg["mlp_ratio"] = _ratio(vision.mlp_width, vision.width)
    return cfg if vision.norm_eps == 1e-5 else cfg | {"norm_kwargs": {"eps": vision.norm_eps}}


def _text_cfg(model: DualEncoder, family: str) -> dict[str, Any]:
    text = model.config.text
    activations = {model.config.vision.activation, text.activation}
    allowed = {"clip": ({"gelu"}, {"quick_gelu"}), "siglip": ({"gelu"}, {"gelu_pytorch_tanh"})}[family]
    if activations not in allowed:
        raise CheckpointError(f"open_clip's config cannot say activations {sorted(activations)} for {family}")
    cfg: dict[str, Any] = {
        "context_length": text.context,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": _ratio(text.mlp_width, text.width),
    }
    if family == "siglip":
        cfg |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": text.norm_eps}}
        if text.activation == "gelu_pytorch_tanh":
            cfg["act_kwargs"] = {"approximate": "tanh"}
    else:
        if text.eos_id not in (LEGACY_EOS, text.vocab_size - 1):  # open_clip pools at the largest id if it is not told
            cfg |= {"pool_type": "eos", "eos_id": text.eos_id}
        if text.norm_eps != 1e-5:
            cfg["norm_kwargs"] = {"eps": text.norm_eps}
    if model.processor is not None and model.processor.tokenizer is not None and text.vocab_size != OWN_VOCABULARY:
        # else open_clip would take its own tokenizer; from a `local-dir:` it reads the files beside the config, whatever the name
        cfg["hf_tokenizer_name"] = "local-dir"
        cfg["tokenizer_kwargs"] = {"clean": _clean_up_name(model.processor.tokenizer.clean)}
    return cfg


def _preprocess_cfg(model: DualEncoder) -> dict[str, Any]:
    if model.processor is None or not isinstance(model.processor.images, ImageProcessor):
        return {"mean": list(CLIP_MEAN), "std": list(CLIP_STD), "interpolation": "bicubic"}
    images = model.processor.images
    return {
        "mean": list(images.mean or ()),
        "std": list(images.std or ()),
        "interpolation": {3: "bicubic", 2: "bilinear"}[int(images.resample)],
        "resize_mode": "longest" if images.letterbox else "shortest" if isinstance(images.size, int) else "squash",
        **({"fill_color": images.fill} if images.fill else {}),
    }


def _ratio(hidden: int, width: int) -> float:
    """open_clip builds `int(width * ratio)` hidden values: a ratio that rounds down to one less is nudged up."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
