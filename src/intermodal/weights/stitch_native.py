"""A new model of native resolution from a tower and a decoder, joined by a patch merger: Qwen2-VL's, Qwen2.5-VL's or Qwen3-VL's shape.

The tower of a Qwen-VL model keeps its family. A SigLIP tower becomes Qwen3-VL's, as its authors did with SigLIP 2: patches, learned
positions, blocks and last norm are taken over; the rotary positions that this class adds to every block are new to it, so the tower
has to learn along for a while.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IntermodalError
from ..inputs.chat import ChatProcessor
from ..inputs.image import ImageProcessor, NaflexProcessor
from ..inputs.patches import QwenPlanner
from ..models.clip import DualEncoder, SigLIP
from ..models.decoder import DecoderConfig
from ..models.generative import LanguageModel
from ..models.qwen2_vl import QwenVL, QwenVLConfig
from ..models.vit_native import EPS, NativeVisionConfig
from .decoder import text_to_hf
from .stitch import chat_files, grown

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
_SHARES = {"qwen2_vl": 3 / 8, "qwen2_5_vl": 3 / 8, "qwen3_vl": 5 / 16}
"""The part of a head's frequencies that turns with the row, and again with the column; the rest turns with time."""
LEAST_TOKENS, MOST_SIDES = 4, 4
"""Pictures get at least this many tokens, and at most the pixels of this many squares of the tower's own size."""
CLIP_TOKENS = 24_576
"""The released Qwen3-VL models' budget of a whole clip (transformers' rule)."""


def stitch_native(
    vision: DualEncoder | QwenVL,
    language: LanguageModel,
    *,
    deepstack: tuple[int, ...] | None = None,
    merge: int = 2,
    seed: int = 0,
) -> QwenVL:
    """A tower and a decoder with a fresh patch merger between them.

    Args:
        vision: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, whose tower is taken; or a SigLIP model, fixed size or NaFlex.
        language: a decoder with a chat template: of Llama's or Qwen2's kind for the first two towers, Qwen3's for the others.
        deepstack: blocks of the tower whose states are added after the decoder's first layers (Qwen3-VL). None keeps a Qwen3-VL tower's
            own choice; a SigLIP tower then has none.
        merge: side of the square of a SigLIP tower's patches that becomes one token.
        seed: of the mergers' weights.

    Raises:
        IntermodalError: parts that no class of the field can hold together, and what would fit.
    """
    if language.processor is None or language.processor.template is None:
        raise IntermodalError(
            "the decoder came without a tokenizer or chat template, which a model that is asked about pictures needs"
        )
    tower, state, settings, clips, family = _tower(vision, deepstack, merge, language.config.width)
    text, more = _decoder(language.config, family)
    files, ids = chat_files(
        language.processor, {"image": f"{START}{IMAGE}{END}", "video": f"{START}{VIDEO}{END}"}, (START, END, IMAGE, VIDEO)
    )
    text = replace(text, vocab_size=max(text.vocab_size, *(index + 1 for index in ids)))
    names = ("vision_start_id", "vision_end_id", "image_id", "video_id")
    config = QwenVLConfig(family, tower, text, **dict(zip(names, ids, strict=True)))  # pyright: ignore[reportArgumentType]
    state |= {key: value.clone() for key, value in grown(language.state_dict(), text.vocab_size).items()}
    state |= {key: value.to(language.head_weight.dtype) for key, value in more.items()}
    with torch.device("meta"):
        model = QwenVL(config)
    generator, dtype = torch.Generator().manual_seed(seed), language.head_weight.dtype
    for key, wanted in model.state_dict().items():
        if key in state:
            continue
        if wanted.ndim == 2:  # the mergers' products; their biases are zero, their norms one
            state[key] = torch.empty(wanted.shape).normal_(0, wanted.shape[1] ** -0.5, generator=generator).to(dtype)
        else:
            state[key] = torch.full(wanted.shape, 0.0 if key.endswith("bias") else 1.0, dtype=dtype)
    model.load_state_dict({key: nn.Parameter(value) for key, value in state.items()}, assign=True)
    raw = {"model_type": family, "eos_token_id": list(language.processor.end_ids)}
    # without these transformers takes Qwen's own ids, which a small vocabulary does not have
    original = {"bos_token_id": None, "eos_token_id": raw["eos_token_id"]}
    original |= {key: value for key, value in language.source.get("config", {}).items() if key in original}
    base = "qwen3" if family == "qwen3_vl" else "qwen2"
    section = text_to_hf(text, base, {**original, "model_type": f"{family}_text"})
    model.source = {"config": {**raw, "text_config": section}}
    kind = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    video = {key: value for key, value in settings.items() if key not in ("image_processor_type", "size")}
    video |= {"video_processor_type": kind, "size": {"shortest_edge": clips[0], "longest_edge": clips[1]}}
    files["preprocessor_config.json"] = json.dumps(settings, indent=2).encode()
    files["video_preprocessor_config.json"] = json.dumps(video, indent=2).encode()
    model.processor = ChatProcessor.from_files(files, raw, lambda t: QwenPlanner.from_hf(config, settings, video, t))
    return model.eval()


def _lack(config: DecoderConfig, third: bool) -> str:
    """What Qwen3-VL's class (`third`), or Qwen2-VL's and Qwen2.5-VL's, needs of a decoder that this one has not; empty where it fits."""
    wrong = [
        (config.qk_norm != third, "Qwen3's norm on queries and keys" if third else "no norm on queries and keys"),
        (config.out_bias or config.mlp_bias, "no bias after attention or in the MLP"),
        (config.rope.kind != "default", "plain rotary positions"),
        (not third and config.heads * config.head_width != config.width, "heads that add up to its width"),
    ]
    return next((needed for bad, needed in wrong if bad), "")


def _decoder(config: DecoderConfig, family: str) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """The decoder as the family's class holds it, and the weights that it lacks: a bias of zero changes nothing.

    Raises:
        IntermodalError: the class cannot hold it; with what can.
    """
    third = family == "qwen3_vl"
    if needed := _lack(config, third):
        other = "Qwen2-VL or Qwen2.5-VL" if third else "Qwen3-VL"
        advice = "" if _lack(config, not third) else f"take the tower of a {other} model, or "
        raise IntermodalError(
            f"a {family} needs a decoder with {needed}; {advice}give a fixed-size CLIP or SigLIP model as --vision with --connector=mlp, "
            "which takes every decoder"
        )
    half = config.head_width // 2
    side = int(half * _SHARES[family])
    rope = replace(config.rope, sections=(half - 2 * side, side, side), interleaved=third)
    if third or config.qkv_bias:
        return replace(config, rope=rope), {}
    widths = {
        "q": config.heads * config.head_width,
        "k": config.kv_heads * config.head_width,
        "v": config.kv_heads * config.head_width,
    }
    zeros = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": torch.zeros(width)
        for layer in range(config.depth)
        for part, width in widths.items()
    }
    return replace(config, rope=rope, qkv_bias=True), zeros


def _tower(
    vision: DualEncoder | QwenVL, deepstack: tuple[int, ...] | None, merge: int, out_width: int
) -> tuple[NativeVisionConfig, dict[str, Tensor], dict[str, Any], tuple[int, int], Any]:
    """(config, weights without the mergers' products, image processor's settings, least and most pixels of clips, family)."""
    if isinstance(vision, QwenVL):
        if deepstack and vision.family != "qwen3_vl":
            raise IntermodalError(f"deepstack is Qwen3-VL's: a {vision.family} has no place for it")
        given = vision.config.vision
        config = replace(given, out_width=out_width, deepstack=given.deepstack if deepstack is None else deepstack)
        kept = {
            f"visual.{key}": value.clone()
            for key, value in vision.visual.state_dict().items()
            if not key.startswith(("merger.fc", "deepstack_mergers."))
        }
        assert vision.processor is not None
        planner = vision.processor.planner
        assert isinstance(planner, QwenPlanner)
        if planner.mean is None or planner.std is None:
            raise IntermodalError(
                f"this {vision.family} takes pictures that are not normalised (do_normalize is false in preprocessor_config.json), which "
                "stitch does not write: set it to true, with the mean and deviation that its tower was trained with"
            )
        settings = _settings(config, planner.mean, planner.std, planner.min_pixels, planner.max_pixels)
        return config, kept, settings, planner.video_pixels, vision.family
    pictures = vision.processor.images if vision.processor else None
    if not isinstance(vision, SigLIP) or not isinstance(pictures, ImageProcessor | NaflexProcessor):
        raise IntermodalError(
            f"a {type(vision).__name__}'s tower does not fit a merger: SigLIP's towers that came with their processor do, and those of "
            "Qwen2-VL, Qwen2.5-VL and Qwen3-VL models; --connector=mlp takes CLIP's"
        )
    given = vision.config.vision
    if given.norm_eps != EPS:
        raise IntermodalError(f"the tower's norms have eps {given.norm_eps}, and Qwen3-VL's class has {EPS}")
    state = vision.vision.state_dict()
    side = round(len(state["position_embedding"]) ** 0.5)
    config = NativeVisionConfig(
        given.width, given.depth, given.heads, given.mlp_width, out_width, patch_size=given.patch_size, merge=merge,
        channels=given.channels, activation=given.activation, patch_bias=True, table_side=side, deepstack=deepstack or (),
    )  # fmt: skip
    kernel = state["patch_embedding.weight"]
    if vision.config.naflex:  # its patches are (row, column, channel)
        kernel = kernel.unflatten(1, (given.patch_size, given.patch_size, given.channels)).permute(0, 3, 1, 2)
    kernel = kernel.reshape(given.width, given.channels, 1, -1) / config.temporal_patch  # a still is shown that often
    out = {
        "visual.patch_embed.weight": kernel.expand(-1, -1, config.temporal_patch, -1).flatten(1).clone(),
        "visual.patch_embed.bias": state["patch_embedding.bias"].clone(),
        "visual.pos_embed": state["position_embedding"].clone(),
    }
    for kind in ("weight", "bias"):
        out[f"visual.merger.norm.{kind}"] = state[f"post_layernorm.{kind}"].clone()
        for n in range(given.depth):
            theirs, ours = f"encoder.layers.{n}", f"visual.blocks.{n}"
            out[f"{ours}.attn.qkv.{kind}"] = torch.cat([state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            for old, new in (("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("self_attn.out_proj", "attn.proj"),
                             ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):  # fmt: skip
                out[f"{ours}.{new}.{kind}"] = state[f"{theirs}.{old}.{kind}"].clone()
    unit = (given.patch_size * merge) ** 2
    least = LEAST_TOKENS * unit
    mean, std = pictures.mean or (0.0,) * 3, pictures.std or (1.0,) * 3
    settings = _settings(config, mean, std, least, MOST_SIDES * (side * given.patch_size) ** 2)
    return config, out, settings, (least, CLIP_TOKENS * unit), "qwen3_vl"


def _settings(config: NativeVisionConfig, mean: Any, std: Any, least: int, most: int) -> dict[str, Any]:
    """`preprocessor_config.json` of a Qwen2-VL image processor, which all three families use."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch,
        "merge_size": config.merge,
        "size": {"shortest_edge": int(least), "longest_edge": int(most)},
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
    }
