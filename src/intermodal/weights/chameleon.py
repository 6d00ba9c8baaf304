"""Hugging Face `chameleon` <-> ours: config and key table. A VQ decoder, which that class does not have, lies beside its keys."""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, nearest
from ..inputs.chat import CHAT_FILES, ChatProcessor
from ..inputs.codes import BEGIN, DIGITS, END, CodePlanner, ImageTokens
from ..inputs.image import HALF, ImageProcessor, LookUp, read_processor
from ..models.chameleon import Chameleon, ChameleonConfig
from ..models.decoder import DecoderConfig
from ..models.vqvae import VQVAE, VQConfig
from . import vqgan
from .decoder import rope_from_hf, rope_to_hf
from .qwen2_vl import OURS, rules_said
from .rules import Ignore, Rename, Rule

_DEFAULTS: dict[str, Any] = dict(
    vocab_size=65536, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, hidden_act="silu",
    max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=False, mlp_bias=False, swin_norm=False,
    num_key_value_heads=32,
)  # fmt: skip
LANCZOS = 1
SAME_CODES = 0.01
"""How far, of its own norm, a codebook may be from the one it was saved from: bf16 rounds by less than half of it."""
OWN = {
    "vq": dict, "vq_decoder": bool, "beta_on": str, "tanh_out": bool, "side": int, "rules": str,
    "head_width": int, "qk_layernorm": bool, "qk_norm": bool, "qkv_bias": bool,
}  # fmt: skip
"""What `to_hf` writes beside transformers' keys, where it differs from what they say, and its kind."""
SAME_LEVELS = 2 / 127.5
"""How far a file's pixels may be from the authors' [-1, 1] and mean the same: two grey levels; 0.0078 for 1 / 127.5 is off by 1.4."""
_PICTURES: dict[str, Any] = dict(
    do_center_crop=True, resample=LANCZOS, rescale_factor=0.0078, image_mean=[1.0] * 3, image_std=[1.0] * 3
)
"""What Hugging Face's image processor defaults to where a file leaves a setting out, beside the size."""
PLACEHOLDER, TURN = "<image>", "<reserved08706>"
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{{- part['text'] if part['type'] == 'text' else '<image>' -}}{%- endfor -%}{%- endif -%}"
    "{{- '" + TURN + "' -}}{%- endfor -%}"
)
"""Turns end with the token that Hugging Face's processor appends to a prompt; nothing names who speaks."""


def from_hf(config: dict[str, Any]) -> ChameleonConfig:
    """config.json -> ours.

    Raises:
        CheckpointError: a setting that is not built, or none that there is.
    """
    own = _own(config)
    get = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    heads, bias = get["num_attention_heads"], bool(get["attention_bias"])
    text = DecoderConfig(
        width=get["hidden_size"],
        depth=get["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", _DEFAULTS["num_key_value_heads"]) or heads,
        head_width=own.get("head_width", get["hidden_size"] // heads),
        mlp_width=get["intermediate_size"],
        vocab_size=get["vocab_size"],
        context=get["max_position_embeddings"],
        activation=get["hidden_act"],
        norm_eps=get["rms_norm_eps"],
        rope=rope_from_hf(get),
        qkv_bias=own.get("qkv_bias", bias),
        out_bias=bias,
        mlp_bias=bool(get["mlp_bias"]),
        qk_norm=own.get("qk_norm", False),
        qk_layernorm=own.get("qk_layernorm", True),
        swin_norm=bool(get["swin_norm"]),
        tied=bool(get["tie_word_embeddings"]),
    )
    vq = vqgan.from_hf({"model_type": "vqgan", "vq": own["vq"]}) if "vq" in own else vqgan.from_hf(get.get("vq_config") or {})
    more = {name: own[name] for name in ("beta_on", "tanh_out") if name in own}
    vq = replace(vq, decoder=own.get("vq_decoder", False), **more)
    names = get.get("vocabulary_map")
    if not names:
        raise CheckpointError("config.json has no vocabulary_map, which says which tokens are picture codes")
    if not isinstance(names, dict):
        raise CheckpointError(f"vocabulary_map is a {type(names).__name__}; it should be an object of tokens and their numbers")
    if PLACEHOLDER not in names:
        raise CheckpointError(f"vocabulary_map has no {PLACEHOLDER!r}")
    tokens = ImageTokens.from_vocabulary(names, vq.codes)
    return ChameleonConfig(text, vq, tokens, names[PLACEHOLDER], own.get("side", vq.resolution), rules_said(config))


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """The section of our own settings.

    Raises:
        CheckpointError: it is no object, or has a setting that is misspelt or of another kind.
    """
    own = config.get(OURS)
    if own is None:
        return {}
    if not isinstance(own, dict):
        raise CheckpointError(f'{OURS} is {own!r}; it should be an object of settings, as {{"rules": "transformers"}}')
    for name, value in own.items():
        if name not in OWN:
            if meant := nearest(name, OWN):
                raise CheckpointError(f"{OURS} has no setting {name!r}{meant}; there are {', '.join(OWN)}")
            warnings.warn(
                f"config.json: {OURS}.{name} is no setting that this version knows; it is kept and not read", stacklevel=2
            )
            continue
        if type(value) is not OWN[name] and name != "rules":
            raise CheckpointError(f"{OURS}.{name} is {value!r}; {_KINDS[OWN[name]]} is wanted")
        if OWN[name] is int and value < 1:
            raise CheckpointError(f"{OURS}.{name} is {value}; a number above 0 is wanted")
    if own.get("beta_on", "codebook") not in ("codebook", "commitment"):
        raise CheckpointError(f"{OURS}.beta_on is {own['beta_on']!r}; codebook or commitment is wanted")
    return own


_KINDS = {dict: "an object", bool: "true or false", str: "a name", int: "a whole number"}


def rules(family: str, config: ChameleonConfig) -> list[Rule]:
    head: Rule = Ignore("lm_head.weight") if config.text.tied else Rename("lm_head.weight", "lm_head.weight")
    return [head, Rename("model.vqmodel.{rest}", "vqmodel.{rest}"), Rename("model.{rest}", "model.{rest}")]


def build(family: str, config: ChameleonConfig) -> Chameleon:
    return Chameleon(config)


def processor(folder: Path, family: str, config: ChameleonConfig, raw: dict[str, Any]) -> ChatProcessor | None:
    files = {name: (folder / name).read_bytes() for name in CHAT_FILES if (folder / name).exists()}
    if "tokenizer.json" not in files:
        return None
    try:
        return chat_processor(files, config, read_processor(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def chat_processor(files: dict[str, bytes], config: ChameleonConfig, settings: dict[str, Any] | None = None) -> ChatProcessor:
    """From a tokenizer's files and an image processor's settings."""
    side, pictures = config.side, pictures_of(config, settings or {})
    planner = CodePlanner({"image": config.image_id}, config.image_tokens, side, config.grid, pictures)
    made = ChatProcessor.from_files(files, {}, lambda tokenizer: planner)
    if made.template is None:
        made = ChatProcessor.from_files({**files, "chat_template.jinja": TEMPLATE.encode()}, {}, lambda tokenizer: planner)
    turn = made.tokenizer.token_to_id(TURN)
    if turn is not None and turn not in made.end_ids:
        made.end_ids = (*made.end_ids, turn)
    return made


def pictures_of(config: ChameleonConfig, settings: dict[str, Any]) -> ImageProcessor:
    """What turns pictures to pixels: by the authors' rules their own, and where the directory's `preprocessor_config.json` (`settings`)
    says something else, that is told of; by transformers' rules what that file says.

    Raises:
        CheckpointError: by transformers' rules, the file cannot be read, or makes pictures of another size than the model's.
    """
    side = config.side
    defaults = {**_PICTURES, "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if config.rules == "transformers":
        said = ImageProcessor.from_hf(settings, defaults)
        made = said.output_size if settings else (side, side)
        if made != (side, side):
            raise CheckpointError(
                f"the image processor's settings (preprocessor_config.json) make pictures of {made[0]} x {made[1]} pixels, and "
                f"config.json says {side} x {side}; where the file is right and pictures are square, write their side into config.json, "
                f'as "{OURS}": {{"side": {made[0]}}}'
            )
        return said
    authors = ImageProcessor(side, (side, side), resample=LANCZOS, mean=HALF, std=HALF, rounded=True, truncated_blend=True)
    if other := _said_otherwise(settings, defaults, authors, sized=side == config.vq.resolution):
        warnings.warn(
            f"the image processor's settings (preprocessor_config.json) are not what the authors' rules say, and these are followed (the "
            f"shortest edge resized to {side} by Lanczos, its middle taken, values from -1 to 1): {other}. To follow the file as "
            f'transformers does, write "{OURS}": {{"rules": "transformers"}} into config.json',
            stacklevel=2,
        )
    return authors


def _said_otherwise(settings: dict[str, Any], defaults: dict[str, Any], authors: ImageProcessor, sized: bool) -> str:
    """Which of a file's settings mean other pixels than the authors', by name; of sizes only where config.json has none (`sized`)."""
    try:
        said = ImageProcessor.from_hf(settings, defaults)
    except CheckpointError as error:
        return str(error)
    levels = [LookUp(each.rescale_factor, each.mean, each.std).table for each in (said, authors)]
    compared = ("size", "crop", "resample") if sized else ("resample",)
    other = [name for name in compared if getattr(said, name) != getattr(authors, name)]
    other += ["rescale_factor, image_mean or image_std"] if abs(levels[0] - levels[1]).max() > SAME_LEVELS else []
    return ", ".join(other)


def family_of(model: Chameleon) -> str:
    return model.family


def to_hf(model: Chameleon) -> dict[str, Any]:
    config, text = model.config, model.config.text
    original = model.source.get("config", {})
    out = copy.deepcopy(original) if original.get("model_type") == "chameleon" else {}
    before = out.pop(OURS, None) or {}
    if vqgan.in_hf_class(config.vq):
        out["vq_config"] = vqgan.to_vq_config(config.vq, out.get("vq_config"))
    own = {name: value for name, value in before.items() if name not in OWN} | _own_of(config)
    out.update(
        model_type="chameleon",
        architectures=["ChameleonForConditionalGeneration"],
        dtype=str(model.head_weight.dtype).removeprefix("torch."),
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=text.mlp_width,
        num_hidden_layers=text.depth,
        num_attention_heads=text.heads,
        num_key_value_heads=text.kv_heads,
        hidden_act=text.activation,
        max_position_embeddings=text.context,
        rms_norm_eps=text.norm_eps,
        attention_bias=text.out_bias,
        mlp_bias=text.mlp_bias,
        swin_norm=text.swin_norm,
        tie_word_embeddings=text.tied,
        rope_parameters=rope_to_hf(text.rope),
    )
    out.setdefault("vocabulary_map", vocabulary_map(config))
    out.pop("torch_dtype", None)
    if own:
        out[OURS] = own
    return out


def _own_of(config: ChameleonConfig) -> dict[str, Any]:
    """The section of our own settings: all that transformers' keys do not say. Of what changes the parameters' shapes (`vq`, `head_width`,
    norms and biases) its class cannot build the model."""
    text, vq, own = config.text, config.vq, {}
    if not vqgan.in_hf_class(vq):
        own["vq"] = asdict(vq)
    said: dict[str, tuple[Any, Any]] = {  # what it is, and what goes without saying
        "vq_decoder": (vq.decoder, False),
        "beta_on": (vq.beta_on, "codebook"),
        "tanh_out": (vq.tanh_out, False),
        "side": (config.side, vq.resolution),
        "rules": (config.rules, "authors"),
        "qk_layernorm": (text.qk_layernorm, True),
        "qk_norm": (text.qk_norm, False),
        "qkv_bias": (text.qkv_bias, text.out_bias),
    }
    own |= {name: value for name, (value, plain) in said.items() if value != plain}
    if text.heads * text.head_width != text.width:
        own["head_width"] = text.head_width
    return own


def vocabulary_map(config: ChameleonConfig) -> dict[str, int]:
    """The names that `ImageTokens.from_vocabulary` reads back."""
    letters = {digit: letter for letter, digit in DIGITS.items()}
    names = {f"IMGIMG{''.join(letters[d] for d in str(code))}Z": token for code, token in enumerate(config.image_tokens.ids)}
    return {PLACEHOLDER: config.image_id, BEGIN: config.image_tokens.begin, END: config.image_tokens.end, **names}


def attach_decoder(model: Chameleon, source: VQVAE) -> Chameleon:
    """Give a Chameleon that reads pictures the decoder of the VQGAN it was trained with (`weights.vqgan.read_authors`).

    Raises:
        CheckpointError: it is another VQGAN: of another shape, or its codebook is not the model's.
    """
    mine, theirs = model.vqmodel, source
    if source.decoder is None:
        raise CheckpointError("that VQ-VAE has no decoder either")
    differences = mine.config.differences(theirs.config)
    if differences:
        raise CheckpointError(
            f"that VQ-VAE is of another shape than the one this model reads pictures with: {', '.join(differences)}; take the VQGAN that "
            "the model was trained with"
        )
    table, other = mine.quantize.embedding.weight.float().cpu(), theirs.quantize.embedding.weight.float().cpu()
    if (table - other).norm() > SAME_CODES * other.norm():
        raise CheckpointError("the decoder belongs to another codebook than this model's: it would draw noise")
    was = theirs.config
    vq: VQConfig = replace(model.config.vq, decoder=True, tanh_out=was.tanh_out, beta=was.beta, beta_on=was.beta_on)
    mine.config, model.config = vq, replace(model.config, vq=vq)
    mine.decoder = source.decoder.to(mine.quantize.embedding.weight)
    mine.post_quant_conv.load_state_dict(source.post_quant_conv.state_dict())
    return model
