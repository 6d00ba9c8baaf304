"""A new model from a SigLIP tower and a decoder, joined by a resampler: Idefics2's shape, saved as an `idefics2` directory."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import IntermodalError
from ..inputs.chat import ChatProcessor
from ..inputs.image import ImageProcessor
from ..models.clip import DualEncoder
from ..models.generative import LanguageModel
from ..models.idefics2 import Idefics2, Idefics2Config, places
from ..models.vit import SiglipVisionTower
from .decoder import text_to_hf
from .idefics2 import BOUNDARY, END_OF_UTTERANCE, IMAGE, planner
from .stitch import chat_files, grown


def stitch_resampler(vision: DualEncoder, language: LanguageModel, *, latents: int = 64, depth: int = 3, seed: int = 0) -> Idefics2:
    """A tower and a decoder with a fresh resampler between them: every picture becomes `latents` tokens, whatever the tower's grid.

    Args:
        vision: a fixed-size SigLIP model that came with its processor.
        language: a decoder with a chat template.
        latents: tokens of a picture.
        depth: layers of the resampler, whose heads are the decoder's in number and width.
        seed: of the resampler's weights.

    Raises:
        IntermodalError: parts that Idefics2's class cannot hold, and what would fit.
    """
    tower, pictures = vision.vision, vision.processor.images if vision.processor else None
    if type(tower) is not SiglipVisionTower or not isinstance(pictures, ImageProcessor) or not isinstance(pictures.size, tuple):
        raise IntermodalError(
            f"a {type(tower).__name__} does not fit a resampler: fixed-size towers of SigLIP that came with their processor do; "
            "--connector=mlp takes CLIP's too, --connector=merger those of SigLIP without a fixed size (NaFlex)"
        )
    grid = vision.config.vision.grid
    if not torch.equal(places(grid), torch.arange(grid**2)):
        raise IntermodalError(
            f"Idefics2's class reads the positions of a grid of {grid} x {grid} patches wrongly (two neighbours share one, by a rounding); "
            "load the tower with another image_size, or take --connector=mlp"
        )
    if language.processor is None or language.processor.template is None:
        raise IntermodalError(
            "the decoder came without a tokenizer or chat template, which a model that is asked about pictures needs"
        )
    files, ids = chat_files(language.processor, {"image": f"{IMAGE}\n"}, (BOUNDARY, IMAGE, END_OF_UTTERANCE))
    text = replace(language.config, vocab_size=max(language.config.vocab_size, max(ids) + 1))
    config = Idefics2Config(
        vision.config.vision,
        text,
        latents=latents,
        depth=depth,
        heads=text.heads,
        kv_heads=text.kv_heads,
        head_width=text.head_width,
        norm_eps=text.norm_eps,
        image_id=ids[1],
    )
    with torch.device("meta"):
        model = Idefics2(config)
    model.load_state_dict(_weights(model, vision, language, seed), assign=True)
    raw = {"model_type": "idefics2", "eos_token_id": list(language.processor.end_ids)}
    section = text_to_hf(text, language.family, dict(language.source.get("config", {})))
    model.source = {"config": {**raw, "text_config": section}}
    settings = {
        **pictures.to_hf("siglip"),
        "image_processor_type": "Idefics2ImageProcessor",
        "processor_class": "Idefics2Processor",
        "do_pad": True,
        "do_image_splitting": False,
    }
    files["preprocessor_config.json"] = json.dumps(settings, indent=2).encode()
    files["processor_config.json"] = json.dumps(
        {"processor_class": "Idefics2Processor", "image_seq_len": latents}, indent=2
    ).encode()
    model.processor = ChatProcessor.from_files(files, model.source["config"], lambda t: planner(config, pictures, t))
    return model.eval()


def _weights(model: Idefics2, vision: DualEncoder, language: LanguageModel, seed: int) -> dict[str, nn.Parameter]:
    """The parents' weights, and a resampler drawn by fan-in. Its latents start at random: equal ones, as the class has them, would stay
    equal for ever. Its last norm has the size of the decoder's words."""
    state: dict[str, Tensor] = {
        f"vision.{key}": value.clone() for key, value in vision.vision.state_dict().items() if not key.startswith("head.")
    }
    state |= {key: value.clone() for key, value in grown(language.state_dict(), model.config.text.vocab_size).items()}
    generator, dtype = torch.Generator().manual_seed(seed), language.head_weight.dtype
    for key, wanted in model.state_dict().items():
        if key in state:
            continue
        if wanted.ndim == 2:
            std = 1.0 if key.endswith("latents") else wanted.shape[1] ** -0.5
            state[key] = torch.empty(wanted.shape).normal_(0, std, generator=generator).to(dtype)
        else:
            state[key] = torch.ones(wanted.shape, dtype=dtype)
    size = language.model.embed_tokens.weight.detach().float().square().mean().sqrt()
    state["connector.norm.weight"] = (state["connector.norm.weight"] * size).to(dtype)
    return {key: nn.Parameter(value) for key, value in state.items()}
