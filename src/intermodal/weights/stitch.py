"""A new model from a vision tower and a decoder: LLaVA's shape, saved as `llava`, `llava_next` or `llava_onevision`, which transformers
loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor, nn

from ..errors import IntermodalError
from ..inputs.chat import ChatProcessor
from ..inputs.image import ImageProcessor
from ..inputs.text import train_tokenizer
from ..inputs.tiles import LlavaPlanner, without_crop
from ..models.clip import CLIP, DualEncoder
from ..models.decoder import DecoderConfig
from ..models.generative import Generative, LanguageModel
from ..models.llava import Llava, LlavaConfig
from ..models.vit import ClipVisionTower, SiglipVisionTower
from .decoder import family_that_holds, text_to_hf

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
ONEVISION_SIDE, ONEVISION_TILES = 6, 9
"""LLaVA-OneVision's grids go from 1 x 1 to 6 x 6 tiles; the features of a picture beyond 9 of them are scaled down (`anyres_max_9`)."""
_FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set flat.messages = flat.messages + [message] -%}{%- else -%}"
    "{%- set said = namespace(text='') -%}{%- for part in message['content'] -%}"
    "{%- set said.text = said.text + (part['text'] if part['type'] == 'text' else MEDIA[part['type']]) -%}{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=said.text)] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def stitch(
    vision: DualEncoder,
    language: LanguageModel,
    *,
    layer: int | None = None,
    anyres: Sequence[tuple[int, int]] = (),
    onevision: bool = False,
    seed: int = 0,
) -> Llava:
    """A vision tower and a decoder with a fresh two-layer projector between them.

    The tower's and decoder's weights are copied; an image token is added to the tokenizer, and the vocabulary grows by a row where it
    has no spare one. Multi-modal training starts from here: an untrained projector says nothing.

    Args:
        vision: a CLIP or fixed-size SigLIP model; its image processor comes along.
        language: a decoder with a chat template.
        layer: which hidden state of the tower is read, the embeddings being 0. None takes the last but one for CLIP (LLaVA 1.5) and the
            last for SigLIP (OneVision).
        anyres: grids of tiles, (down, across), that a picture may be cut into beside its view as a whole (LLaVA-NeXT); with none, a
            picture is one padded square (LLaVA 1.5).
        onevision: a LLaVA-OneVision, which also reads clips, and whose pictures leave the tiles when there are several; its grids are
            the published ones where `anyres` names none.
        seed: of the projector's weights.

    Raises:
        IntermodalError: a NaFlex tower, or a decoder that came without tokenizer or chat template.
    """
    pictures, talk = _fitting(vision, language)
    tokens = (IMAGE_TOKEN, VIDEO_TOKEN) if onevision else (IMAGE_TOKEN,)
    media = {token.strip("<>"): f"{token}\n" for token in tokens}
    files, ids = chat_files(talk, media, tokens)
    if onevision and not anyres:
        anyres = [(down, across) for down in range(1, ONEVISION_SIDE + 1) for across in range(1, ONEVISION_SIDE + 1)]
    config = _config(vision, language, ids, layer, anyres, onevision)
    with torch.device("meta"):
        model = Llava(config)
    model.load_state_dict(_weights(vision, language, config, seed), assign=True)
    model.source = {
        "config": {
            "model_type": config.family,
            "eos_token_id": list(talk.end_ids),
            "text_config": text_to_hf(config.text, language.family, dict(language.source.get("config", {}))),
        }
    }
    model.processor = _processor(files, model.source["config"], config, pictures)
    return model.eval()


def _fitting(vision: DualEncoder, language: LanguageModel) -> tuple[ImageProcessor, ChatProcessor]:
    """The processors of two models that fit together; raises IntermodalError where one does not."""
    tower = vision.vision
    if type(tower) not in (ClipVisionTower, SiglipVisionTower) or vision.processor is None:
        raise IntermodalError(
            f"a {type(tower).__name__} cannot be stitched: fixed-size towers of CLIP and SigLIP that came with their processor can; "
            "--connector=merger takes those of SigLIP without a fixed size (NaFlex)"
        )
    if language.processor is None or language.processor.template is None:
        raise IntermodalError(
            "the decoder came without a tokenizer or chat template, which a model that is asked about pictures needs"
        )
    pictures = vision.processor.images
    assert isinstance(pictures, ImageProcessor)  # a fixed-size tower's
    return pictures, language.processor


def _config(
    vision: DualEncoder,
    language: LanguageModel,
    ids: Sequence[int],
    layer: int | None,
    anyres: Sequence[tuple[int, int]],
    onevision: bool,
) -> LlavaConfig:
    """What is built of the two. `ids` are those of the image token and, for a OneVision, of the video token."""
    clip, side, depth = isinstance(vision, CLIP), vision.config.vision.image_size, vision.config.vision.depth
    layer = layer if layer is not None else -2 if clip else -1
    if not -depth - 1 <= layer <= depth:
        raise IntermodalError(
            f"layer {layer}: a tower of {depth} layers has the hidden states 0 to {depth} (or -{depth + 1} to -1)"
        )
    rows = max(language.config.vocab_size, *(index + 1 for index in ids))
    return LlavaConfig(
        "llava_onevision" if onevision else "llava_next" if anyres else "llava",
        vision.config.vision,
        replace(language.config, vocab_size=rows),
        tower="clip" if clip else "siglip",
        layer=layer,
        drop_first=clip,
        image_id=ids[0],
        video_id=ids[1] if onevision else None,
        pinpoints=tuple((down * side, across * side) for down, across in anyres),
        max_tiles=ONEVISION_TILES if onevision else None,
    )


def fresh_decoder(config: DecoderConfig, texts: list[str], vocabulary: int, seed: int = 0) -> LanguageModel:
    """A decoder from scratch with a tokenizer counted from `texts` and a ChatML template; of Llama's kind, or of Qwen2's (`qkv_bias`) or
    Qwen3's (`qk_norm`) where its switches are theirs.

    Args:
        config: its `vocab_size` is replaced by the tokenizer's.
        vocabulary: size of the tokenizer once it has all letters of the texts.

    Raises:
        CheckpointError: switches that no family of transformers holds together.
    """
    family = family_that_holds(config)
    tokenizer = train_tokenizer([*texts, "user assistant system"], vocabulary)
    tokenizer.add_special_tokens([IMAGE_TOKEN, "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B"
    )  # the template ends turns, not the tokenizer
    model = LanguageModel(replace(config, vocab_size=tokenizer.get_vocab_size()), family)
    initialise_decoder(model, seed)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": config.context,
        "chat_template": CHATML,
    }
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
    model.processor = ChatProcessor.from_files(files, {})
    return model.eval()


@torch.no_grad()
def initialise_decoder(model: Generative, seed: int) -> None:
    """Starting weights of a decoder and its output layer, the same for a seed on every machine: normal by fan-in, residual outputs smaller
    by 1/sqrt(2 depth), embeddings small, norms one and zero. A tower is left alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith(("model.", "lm_head.")):
            continue
        if parameter.ndim < 2 or ".q_norm." in name or ".k_norm." in name:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= (2 * model.config_text.depth) ** -0.5
        parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))


def _weights(vision: DualEncoder, language: LanguageModel, config: LlavaConfig, seed: int) -> dict[str, Tensor]:
    state = {f"vision.{key}": value.clone() for key, value in vision.vision.state_dict().items() if not key.startswith("head.")}
    text = {key: value.clone() for key, value in grown(language.state_dict(), config.text.vocab_size).items()}
    generator = torch.Generator().manual_seed(seed)
    width, out = config.vision.width, config.text.width
    dtype = language.head_weight.dtype
    for name, columns in (("linear_1", width), ("linear_2", out)):
        drawn = torch.empty(out, columns).normal_(0, columns**-0.5, generator=generator)
        state[f"projector.{name}.weight"], state[f"projector.{name}.bias"] = drawn.to(dtype), torch.zeros(out, dtype=dtype)
    if config.pinpoints:
        state["image_newline"] = torch.empty(out).normal_(0, out**-0.5, generator=generator).to(dtype)
    return {key: nn.Parameter(value) for key, value in {**state, **text}.items()}


def grown(state: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """A decoder's weights with a vocabulary of `rows`: new rows are the mean of the others, which no prompt can tell from an average
    word."""
    out = dict(state)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in out and (missing := rows - len(out[key])) > 0:
            out[key] = torch.cat([out[key], out[key].float().mean(0, keepdim=True).expand(missing, -1).to(out[key].dtype)])
    return out


def chat_files(processor: ChatProcessor, media: dict[str, str], tokens: tuple[str, ...]) -> tuple[dict[str, bytes], list[int]]:
    """A text decoder's files for a model that sees: `tokens` in the tokenizer, a template that writes `media`; and the tokens' ids.

    Args:
        media: what a part of each kind ("image", "video") is in the text.
    """
    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    settings = json.loads(processor.files.get("tokenizer_config.json", b"{}"))
    settings.pop("chat_template", None)
    settings.pop("added_tokens_decoder", None)  # the tokenizer.json says it, with the new token
    assert processor.template is not None
    for name, token in processor.template.special.items():
        settings.setdefault(name, token)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    source = processor.template.source
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        "chat_template.jinja": (source if all(text in source for text in media.values()) else flatten(media) + source).encode(),
    }
    generation = processor.files.get("generation_config.json")
    ids = [index for token in tokens if (index := tokenizer.token_to_id(token)) is not None]
    return {**files, **({"generation_config.json": generation} if generation else {})}, ids


def flatten(media: dict[str, str]) -> str:
    """Put before a text-only template: pictures become placeholders in the text, and the template sees strings."""
    return "{%- set MEDIA = " + json.dumps(media) + " -%}" + _FLATTEN


def _processor(files: dict[str, bytes], raw: dict[str, Any], config: LlavaConfig, pictures: ImageProcessor) -> ChatProcessor:
    side = config.vision.image_size
    kind = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[config.family]
    square = {"height": side, "width": side}
    settings = {**pictures.to_hf(config.tower), "processor_class": f"{kind}Processor"}
    joint = {
        "processor_class": f"{kind}Processor",
        "vision_feature_select_strategy": "default" if config.drop_first else "full",
        "image_token": IMAGE_TOKEN,
    }
    if config.pinpoints:
        settings["image_processor_type"] = f"{kind}ImageProcessor"
        settings["image_grid_pinpoints"] = [list(size) for size in config.pinpoints]
    if config.family == "llava_onevision":
        settings |= {"size": square, "do_center_crop": False, "do_pad": True}
        settings.pop("crop_size", None)
        joint |= {
            "num_image_tokens": config.vision.grid**2 + (0 if config.drop_first or config.tower == "siglip" else 1),
            "vision_aspect_ratio": f"anyres_max_{config.max_tiles}",
            "video_token": VIDEO_TOKEN,
        }
        clips = {key: settings[key] for key in ("size", "resample", "image_mean", "image_std", "rescale_factor") if key in settings}
        clips = {"video_processor_type": "LlavaOnevisionVideoProcessor", **clips, "do_sample_frames": False}
        files = {**files, "video_preprocessor_config.json": json.dumps(clips, indent=2).encode()}
    else:
        if config.pinpoints:
            settings["crop_size"] = square  # the class cuts tiles of this size, whether it crops or not
        joint |= {
            "patch_size": config.vision.patch_size,
            "num_additional_image_tokens": 1 if config.tower == "clip" else 0,
        }
    files = {
        **files,
        "preprocessor_config.json": json.dumps(settings, indent=2).encode(),
        "processor_config.json": json.dumps(joint, indent=2).encode(),
    }
    placeholders = {"image": config.image_id, **({} if config.video_id is None else {"video": config.video_id})}
    planner = LlavaPlanner(
        config.family,
        placeholders,
        side=side,
        grid=config.vision.grid,
        processor=without_crop(pictures, side) if config.family == "llava_onevision" else pictures,
        pinpoints=config.pinpoints,
        max_tiles=config.max_tiles,
    )
    return ChatProcessor.from_files(files, raw, lambda tokenizer: planner)
