"""A new early-fusion model: a tokenizer counted from the texts, a VQ-VAE's codes after its words, one decoder over both."""

from __future__ import annotations

import json
from dataclasses import replace

from tokenizers import processors

from ..inputs.codes import BEGIN, END, ImageTokens
from ..inputs.text import train_tokenizer
from ..models.chameleon import Chameleon, ChameleonConfig
from ..models.decoder import DecoderConfig
from ..models.vqvae import VQVAE
from .chameleon import PLACEHOLDER, chat_processor
from .stitch import CHATML, flatten, initialise_decoder

BOS, TURN, STOP = "<s>", "<|im_start|>", "<|im_end|>"


def fresh_chameleon(config: DecoderConfig, vq: VQVAE, texts: list[str], vocabulary: int, seed: int = 0) -> Chameleon:
    """A decoder from scratch over words and the codes of `vq`, with a ChatML template; the VQ-VAE's weights are copied.

    Args:
        config: its `vocab_size` is replaced. `qk_layernorm` off gives the unstable kind that the paper warns of.
    """
    tokenizer = train_tokenizer([*texts, "user assistant system draw"], vocabulary)
    tokenizer.add_special_tokens([BOS, PLACEHOLDER, BEGIN, END, TURN, STOP])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")  # the template ends turns
    words = tokenizer.get_vocab_size()
    names = {name: tokenizer.get_vocab()[name] for name in (PLACEHOLDER, BEGIN, END)}
    tokens = ImageTokens(tuple(range(words, words + vq.config.codes)), names[BEGIN], names[END])
    text = replace(config, vocab_size=words + vq.config.codes)
    side = vq.config.resolution
    model = Chameleon(ChameleonConfig(text, vq.config, tokens, names[PLACEHOLDER], side))
    initialise_decoder(model, seed)
    model.vqmodel.load_state_dict(vq.state_dict())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": STOP,
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": config.context,
    }
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        "chat_template.jinja": (flatten({"image": PLACEHOLDER}) + "{{- bos_token -}}" + CHATML).encode(),
    }
    model.processor = chat_processor(files, model.config)
    model.bind()
    return model.eval()
