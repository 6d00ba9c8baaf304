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
from .chameleon import LANCZOS, PLACEHOLDER, chat_processor
from .stitch import CHATML, flatten, initialise_decoder

BOS, TURN, STOP = "<s>", "<|im_start|>", "<|im_end|>"


def fresh_chameleon(config: DecoderConfig, vq: VQVAE, texts: list[str], vocabulary: int, seed: int = 0) -> Chameleon:
    """A decoder from scratch over words and the codes of `vq`, with a ChatML template; the VQ-VAE's weights are copied.

    Args:
        config: its `vocab_size` is replaced. `qk_layernorm` off gives the unstable kind that the paper warns of.

    Raises:
        IntermodalError: a shape that cannot be built.
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
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(STOP)}
    model.source = {"config": {"model_type": "chameleon", **ids}}
    initialise_decoder(model, seed)
    model.vqmodel.load_state_dict(vq.state_dict())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": STOP,
        "sep_token": STOP,  # transformers' processor ends a prompt with it, where it is not asked for a completion
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": config.context,
    }
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        **_picture_files(model.config),
        "chat_template.jinja": (flatten({"image": PLACEHOLDER}) + "{{- bos_token -}}" + CHATML).encode(),
    }
    model.processor = chat_processor(files, model.config)
    model.bind()
    return model.eval()


def _picture_files(config: ChameleonConfig) -> dict[str, bytes]:
    """What transformers' processor reads: the authors' pixels, and how many codes a picture becomes."""
    square = {"height": config.side, "width": config.side}
    pictures = {
        "image_processor_type": "ChameleonImageProcessor",
        "processor_class": "ChameleonProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.side},
        "resample": LANCZOS,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "do_normalize": True,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    joint = {"processor_class": "ChameleonProcessor", "image_seq_length": config.grid**2, "image_token": PLACEHOLDER}
    files = {"preprocessor_config.json": pictures, "processor_config.json": joint}
    return {name: json.dumps(settings, indent=2).encode() for name, settings in files.items()}
