"""Hugging Face `chameleon` <-> ours: config and key table. A VQ decoder, which that class does not have, lies beside its keys."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..inputs.chat import CHAT_FILES, ChatProcessor
from ..inputs.codes import BEGIN, DIGITS, END, CodePlanner, ImageTokens
from ..inputs.image import HALF, ImageProcessor, read_processor
from ..models.chameleon import Chameleon, ChameleonConfig
from ..models.decoder import DecoderConfig
from ..models.vqvae import VQVAE, VQConfig
from . import vqgan
from .decoder import rope_from_hf, rope_to_hf
from .qwen2_vl import OURS
from .rules import Ignore, Rename, Rule

_DEFAULTS: dict[str, Any] = dict(
    vocab_size=65536, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, hidden_act="silu",
    max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=False, mlp_bias=False, swin_norm=False,
)  # fmt: skip
LANCZOS = 1
SAME_CODES = 0.01
"""How far, of its own norm, a codebook may be from the one it was saved from: bf16 rounds by less than half of it."""
OWN_KEYS = ("vq", "vq_decoder", "side", "rules", "qk_layernorm")
"""What `to_hf` writes beside transformers' keys, where it differs from what they say."""
PLACEHOLDER, TURN = "<image>", "<reserved08706>"
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{{- part['text'] if part['type'] == 'text' else '<image>' -}}{%- endfor -%}{%- endif -%}"
    "{{- '" + TURN + "' -}}{%- endfor -%}"
)
"""Turns end with the token that Hugging Face's processor appends to a prompt; nothing names who speaks."""


def from_hf(config: dict[str, Any]) -> ChameleonConfig:
    get = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    heads = get["num_attention_heads"]
    text = DecoderConfig(
        width=get["hidden_size"],
        depth=get["num_hidden_layers"],
        heads=heads,
        kv_heads=get.get("num_key_value_heads") or heads,
        head_width=get["hidden_size"] // heads,
        mlp_width=get["intermediate_size"],
        vocab_size=get["vocab_size"],
        context=get["max_position_embeddings"],
        activation=get["hidden_act"],
        norm_eps=get["rms_norm_eps"],
        rope=rope_from_hf(get),
        qkv_bias=bool(get["attention_bias"]),
        out_bias=bool(get["attention_bias"]),
        mlp_bias=bool(get["mlp_bias"]),
        qk_layernorm=True,
        swin_norm=bool(get["swin_norm"]),
        tied=bool(get["tie_word_embeddings"]),
    )
    own = config.get(OURS, {})
    if not own.get("qk_layernorm", True):
        text = replace(text, qk_layernorm=False)
    vq = vqgan.from_hf({"model_type": "vqgan", "vq": own["vq"]}) if "vq" in own else vqgan.from_hf(get.get("vq_config") or {})
    vq = replace(vq, decoder=bool(own.get("vq_decoder", False)))
    names = get.get("vocabulary_map")
    if not names:
        raise CheckpointError("config.json has no vocabulary_map, which says which tokens are picture codes")
    if PLACEHOLDER not in names:
        raise CheckpointError(f"vocabulary_map has no {PLACEHOLDER!r}")
    tokens = ImageTokens.from_vocabulary(names, vq.codes)
    return ChameleonConfig(text, vq, tokens, names[PLACEHOLDER], own.get("side", vq.resolution), own.get("rules", "authors"))


def rules(family: str, config: ChameleonConfig) -> list[Rule]:
    head: Rule = Ignore("lm_head.weight") if config.text.tied else Rename("lm_head.weight", "lm_head.weight")
    return [head, Rename("model.vqmodel.{rest}", "vqmodel.{rest}"), Rename("model.{rest}", "model.{rest}")]


def build(family: str, config: ChameleonConfig) -> Chameleon:
    return Chameleon(config)


def processor(folder: Path, family: str, config: ChameleonConfig, raw: dict[str, Any]) -> ChatProcessor | None:
    files = {name: (folder / name).read_bytes() for name in CHAT_FILES if (folder / name).exists()}
    if "tokenizer.json" not in files:
        return None
    return chat_processor(files, config, read_processor(folder))


def chat_processor(files: dict[str, bytes], config: ChameleonConfig, settings: dict[str, Any] | None = None) -> ChatProcessor:
    """From a tokenizer's files; `settings` are an image processor's, of which only the transformers rule reads the pixel scale."""
    side = config.side
    pictures = ImageProcessor(side, (side, side), resample=LANCZOS, mean=HALF, std=HALF, rounded=True)
    if config.rules == "transformers":
        factor = (settings or {}).get("rescale_factor", 0.0078)
        pictures = replace(pictures, rescale_factor=factor, mean=(1.0,) * 3, std=(1.0,) * 3, rounded=False)
    planner = CodePlanner({"image": config.image_id}, config.image_tokens, side, config.grid, pictures)
    made = ChatProcessor.from_files(files, {}, lambda tokenizer: planner)
    if made.template is None:
        made = ChatProcessor.from_files({**files, "chat_template.jinja": TEMPLATE.encode()}, {}, lambda tokenizer: planner)
    turn = made.tokenizer.token_to_id(TURN)
    if turn is not None and turn not in made.end_ids:
        made.end_ids = (*made.end_ids, turn)
    return made


def family_of(model: Chameleon) -> str:
    return model.family


def to_hf(model: Chameleon) -> dict[str, Any]:
    config, text = model.config, model.config.text
    original = model.source.get("config", {})
    out = copy.deepcopy(original) if original.get("model_type") == "chameleon" else {}
    own = {key: value for key, value in out.pop(OURS, {}).items() if key not in OWN_KEYS}
    plain = config.vq.stem == 1 and config.vq.groups == 32 and not config.vq.unit_codes
    if plain:
        out["vq_config"] = vqgan.to_vq_config(config.vq, out.get("vq_config"))
    else:  # a tokenizer of our own shape: transformers cannot build it
        own["vq"] = asdict(config.vq)
    if config.vq.decoder:
        own["vq_decoder"] = True
    if config.side != config.vq.resolution:
        own["side"] = config.side
    if config.rules != "authors":
        own["rules"] = config.rules
    if not text.qk_layernorm:
        own["qk_layernorm"] = False
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
    vq: VQConfig = replace(model.config.vq, decoder=True)
    mine.config, model.config = vq, replace(model.config, vq=vq)
    mine.decoder = source.decoder.to(mine.quantize.embedding.weight)
    mine.post_quant_conv.load_state_dict(source.post_quant_conv.state_dict())
    return model
