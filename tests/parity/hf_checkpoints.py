"""Tiny transformers checkpoints with odd sizes, the tokenizers that go with them, and the numbers transformers gets from them.

Nothing here comes from the library under test: every expected value of this folder is computed by transformers, torch or Pillow.
"""

from __future__ import annotations

import io
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

TOLERANCE = 1e-5
MODELS = {"clip": CLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model}
CONFIGS = {"clip": CLIPConfig, "siglip": SiglipConfig, "siglip2": Siglip2Config}
FAMILIES = tuple(MODELS)


def _tower(width, heads, mlp, act, layers=2, **rest):
    return dict(
        hidden_size=width, num_attention_heads=heads, intermediate_size=mlp, hidden_act=act, num_hidden_layers=layers, **rest
    )


def _clip(vision, text, projection, vocab=60, context=11, eos=59):
    text.update(vocab_size=vocab, max_position_embeddings=context, eos_token_id=eos, bos_token_id=vocab - 2, pad_token_id=1)
    vision["projection_dim"] = text["projection_dim"] = projection
    return "clip", {"vision_config": vision, "text_config": text, "projection_dim": projection}


def _siglip(family, vision, text, vocab=60, context=9):
    text.update(vocab_size=vocab, max_position_embeddings=context, projection_size=vision["hidden_size"], eos_token_id=1)
    return family, {"vision_config": vision, "text_config": text}


CASES = {
    "clip-quick-7": _clip(
        _tower(30, 3, 44, "quick_gelu", image_size=30, patch_size=7), _tower(20, 5, 36, "quick_gelu", layers=3), projection=13
    ),
    "clip-gelu-14": _clip(
        _tower(42, 7, 50, "gelu", layers=1, image_size=45, patch_size=14), _tower(22, 2, 30, "gelu"), projection=33
    ),
    "clip-tanh-16": _clip(
        _tower(18, 1, 21, "gelu_pytorch_tanh", image_size=48, patch_size=16, layer_norm_eps=1e-3),
        _tower(28, 7, 28, "gelu_pytorch_tanh", layer_norm_eps=1e-2),
        projection=5,
    ),
    "clip-mixed": _clip(
        _tower(24, 6, 31, "gelu", image_size=16, patch_size=7), _tower(15, 3, 22, "quick_gelu"), projection=41, context=14
    ),
    "clip-legacy-eos": _clip(
        _tower(20, 5, 24, "quick_gelu", image_size=32, patch_size=16, layer_norm_eps=1e-3),
        _tower(18, 3, 29, "quick_gelu"),
        projection=17,
        eos=2,
    ),
    "siglip-tanh-14": _siglip(
        "siglip",
        _tower(36, 3, 50, "gelu_pytorch_tanh", image_size=60, patch_size=14),
        _tower(20, 5, 33, "gelu_pytorch_tanh", layers=3),
    ),
    "siglip-gelu-7": _siglip(
        "siglip", _tower(21, 7, 26, "gelu", image_size=20, patch_size=7), _tower(32, 2, 40, "gelu", layer_norm_eps=1e-3)
    ),
    "siglip-eps-16": _siglip(
        "siglip",
        _tower(30, 5, 19, "gelu_pytorch_tanh", layers=1, image_size=48, patch_size=16, layer_norm_eps=1e-2),
        _tower(30, 6, 31, "gelu_pytorch_tanh", layers=1),
    ),
    "siglip2-tanh-16": _siglip(
        "siglip2", _tower(36, 3, 50, "gelu_pytorch_tanh", patch_size=16, num_patches=16), _tower(20, 5, 33, "gelu_pytorch_tanh")
    ),
    "siglip2-gelu-7": _siglip(
        "siglip2", _tower(22, 11, 26, "gelu", patch_size=7, num_patches=25), _tower(24, 3, 40, "gelu", layers=3)
    ),
    "siglip2-tanh-14": _siglip(
        "siglip2",
        _tower(40, 5, 27, "gelu_pytorch_tanh", layers=1, patch_size=14, num_patches=49, layer_norm_eps=1e-3),
        _tower(18, 1, 33, "gelu_pytorch_tanh"),
    ),
}


def family_of(case: str) -> str:
    return CASES[case][0]


def of(*families: str) -> list[str]:
    return [case for case in CASES if family_of(case) in families]


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough that every one of them moves the output; transformers' own start is close to constant."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.empty(weight.shape).normal_(generator=generator)
        if name == "logit_scale":
            weight.fill_(1.25)
        elif name == "logit_bias":
            weight.fill_(-1.75)
        elif name.endswith("bias"):
            weight.copy_(0.3 * noise)
        elif "norm" in name or "layrnorm" in name:
            weight.copy_(1 + 0.4 * noise)
        elif ("embedding" in name and "patch" not in name) or "probe" in name:
            weight.copy_(noise)
        else:
            gain = 3 if "patch" in name else 1.3
            weight.copy_(gain * noise * weight[0].numel() ** -0.5)
    return model.eval()


def build(case: str, seed: int = 0) -> torch.nn.Module:
    family, sections = CASES[case]
    torch.manual_seed(seed)
    return randomise(MODELS[family](CONFIGS[family](**json.loads(json.dumps(sections)))), seed)


# -- inputs ---------------------------------------------------------------------------------------------------------------------


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A few strong colours that run into each other, with noise over them, in any mode."""
    rng = np.random.default_rng([seed, width, height, *mode.encode()])
    corners = Image.fromarray(rng.choice([0, 30, 120, 225, 255], (2, 3, 4)).astype(np.uint8))
    smooth = np.asarray(corners.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    image = Image.fromarray((smooth + rng.integers(-30, 31, smooth.shape)).clip(0, 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    if mode in ("P-transparent", "P-alpha"):
        palette = image.convert("RGB").quantize(7)
        buffer = io.BytesIO()
        palette.save(buffer, "png", transparency=2 if mode == "P-transparent" else bytes([0, 80, 255, 160, 20, 255, 90]))
        return Image.open(io.BytesIO(buffer.getvalue()))
    if mode == "RGB-transparent":
        image = image.convert("RGB")
        image.info["transparency"] = image.getpixel((0, 0))
        return image
    image = image.convert("RGB")
    return image.quantize(9) if mode == "P" else image.convert(mode)


def pictures(count: int, largest: int = 90, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [picture(*(int(side) for side in rng.integers(1, largest, 2)), seed=i) for i in range(count)]


def random_pixels(case: str, count: int, seed: int = 1) -> torch.Tensor:
    side = CASES[case][1]["vision_config"]["image_size"]
    return torch.empty(count, 3, side, side).normal_(generator=torch.Generator().manual_seed(seed))


def random_texts(case: str, count: int, seed: int = 2) -> list[list[int]]:
    """Token ids; CLIP's of every length with an end token (often a second one), SigLIP's all as long as the context."""
    family, sections = CASES[case]
    text = sections["text_config"]
    context, vocab = text["max_position_embeddings"], text["vocab_size"]
    rng = np.random.default_rng(seed)
    if family != "clip":
        return [rng.integers(0, vocab, context).tolist() for _ in range(count)]
    out = []
    for i in range(count):
        ids = [vocab - 2, *rng.integers(3, vocab - 2, i % (context - 1)).tolist(), vocab - 1]
        out.append([*ids, 7, vocab - 1][:context] if i % 3 == 2 else ids)
    return out


def padded(texts: list[list[int]], length: int, pad: int) -> torch.Tensor:
    return torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in texts])


@torch.no_grad()
def reference(model: torch.nn.Module, texts: list[list[int]], **images: torch.Tensor):
    """transformers' output for token ids and image inputs, padded with an id that no pooling rule prefers."""
    config = model.config.text_config
    out = model(input_ids=padded(texts, config.max_position_embeddings, 0), **images)
    return out


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ or something is not finite."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return float((a.double() - b.double()).abs().max())


def assert_spread(embeds: torch.Tensor) -> None:
    """The reference must tell its inputs apart, or agreeing with it would mean nothing."""
    cosine = embeds @ embeds.T
    off = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
    assert off.min() < 0.9
    assert off.median() < 0.97


# -- tokenizers -----------------------------------------------------------------------------------------------------------------

SENTENCES = [
    "a photo of a cat",
    "A Photo of TWO dogs, and 1234 birds!",
    "",
    " ",
    "   leading and trailing   ",
    "tabs\tand\nnew\r\nlines\u00a0\u3000and\u2003wide  spaces",
    "don't they're we've i'm she'll he'd it's 'tis",
    "CAFÉ na\u0131\u0308ve Stra\u00dfe \u1e9e",
    "cafe\u0301 decomposed vs caf\u00e9 composed",
    "\u01c5 \u0130stanbul \u03a3\u0391\u03a3 \u039f\u0394\u039f\u03a3 final sigma",
    "数字と漢字 한국어 ไทย हिन्दी",
    "emoji 🙂👩‍👩‍👧 flag 🇩🇪",
    "x² ½ Ⅷ ٣٤ numbers",
    "!!! ... ---- ((((nested)))) a/b\\c #tag @you 100%",
    "under_score and __double__ snake_case_name",
    "<html> &amp; &lt;b&gt;",
    "zero\u200bwidth soft\u00adhyphen",
    "right-to-left \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "tiny \u2581 block\u2581s",
    "\x01control\x7f characters",
    "a cat a cat a cat a cat a cat a cat a cat a cat a cat a cat a cat a cat a cat",
    "supercalifragilisticexpialidocious" * 3,
]


def _merge_words(words: list[str], last: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Every word as a chain of pairs from left to right; `last` is appended to its final symbol."""
    pieces, merges = [], []
    for word in words:
        symbols = [*word[:-1], word[-1] + last]
        left = symbols[0]
        for right in symbols[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
                pieces.append(left + right)
            left += right
    return list(dict.fromkeys(pieces)), merges


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """All bytes, all bytes at the end of a word, some words, then the two special tokens, as OpenAI's file is ordered."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    accent = "caf\u00c3\u00a9"  # café: the two UTF-8 bytes of é as the byte alphabet writes them
    words = ["a", "photo", "of", "cat", "dogs", "and", "'t", "'re", "12", "birds", accent, "the", "under", "numbers"]
    pieces, merges = _merge_words([word for word in words if len(word) > 1], "</w>")
    entries = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *pieces, "<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(dict.fromkeys(entries))}, merges


def clip_tokenizer() -> CLIPTokenizer:
    vocab, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocab), merges=list(merges))


def write_clip_vocabulary(folder: Path) -> None:
    vocab, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@cache
def siglip2_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Gemma's kind: special tokens, all bytes for what is unknown, letters in both cases, `▁` for a space."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"0123456789.,!'_-", "▁", "é", "ß", "σ", "ς", "α", "i̇"]
    words = ["▁photo", "▁of", "▁cat", "▁dogs", "▁and", "birds", "caf", "under", "numbers", "▁a"]
    pieces, merges = _merge_words(words, "")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    entries = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    return {piece: i for i, piece in enumerate(dict.fromkeys(entries))}, merges


def siglip2_tokenizer(**settings) -> Siglip2Tokenizer:
    vocab, merges = siglip2_vocabulary()
    return Siglip2Tokenizer(vocab=dict(vocab), merges=list(merges), **settings)


@cache
def spiece_model() -> bytes:
    """A sentencepiece file with the special ids of SigLIP's: `<pad>` 0, `</s>` 1, `<unk>` 2, no start token."""
    out = io.BytesIO()
    text = [sentence.lower() for sentence in SENTENCES if sentence.strip() and sentence.isascii()] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=out,
        vocab_size=120,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def siglip_tokenizer(folder: Path, **settings) -> SiglipTokenizer:
    path = folder / "spiece.model"
    path.write_bytes(spiece_model())
    return SiglipTokenizer(str(path), **settings)


# -- whole directories ----------------------------------------------------------------------------------------------------------

CONTEXT = 16


def save_whole(family: str, folder: Path, seed: int = 5):
    """Weights, image processor and tokenizer in one directory -> (model, image processor, tokenizer) of transformers.

    "siglip2-fixed" is how SigLIP 2 at one resolution is published: SigLIP's class with Gemma's tokenizer.
    """
    gemma = len(siglip2_vocabulary()[0])
    vocab = {"clip": len(clip_vocabulary()[0]), "siglip": 200, "siglip2": gemma, "siglip2-fixed": gemma}[family]
    text = _tower(24, 3, 30, "gelu", vocab_size=vocab, max_position_embeddings=CONTEXT)
    vision = _tower(30, 5, 37, "gelu", patch_size=7)
    if family == "clip":
        vision["image_size"] = 29
        text.update(eos_token_id=vocab - 1, bos_token_id=vocab - 2, pad_token_id=vocab - 1)
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=19)
        images = CLIPImageProcessorPil(size={"shortest_edge": 29}, crop_size={"height": 29, "width": 29})
        tokenizer = clip_tokenizer()
    elif family == "siglip":
        vision["image_size"] = 29
        text["projection_size"] = 30
        config = SiglipConfig(vision_config=vision, text_config=text)
        images = SiglipImageProcessorPil(size={"height": 29, "width": 29})
        tokenizer = siglip_tokenizer(folder, model_max_length=CONTEXT)
    elif family == "siglip2-fixed":
        vision["image_size"] = 29
        text.update(projection_size=30, eos_token_id=1, pad_token_id=0)
        config = SiglipConfig(vision_config=vision, text_config=text)
        images = SiglipImageProcessorPil(size={"height": 29, "width": 29})
        tokenizer = siglip2_tokenizer(padding_side="right", add_eos_token=True, add_bos_token=False)
        family = "siglip"
    else:
        vision["num_patches"] = 16
        text.update(projection_size=30, eos_token_id=1, pad_token_id=0)
        config = Siglip2Config(vision_config=vision, text_config=text)
        images = Siglip2ImageProcessorPil(patch_size=7, max_num_patches=20)
        tokenizer = siglip2_tokenizer()
    model = randomise(MODELS[family](config), seed)
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, images, tokenizer


@torch.no_grad()
def end_to_end(family: str, model, images, tokenizer, pictures: list[Image.Image], texts: list[str]):
    """transformers' whole way from pictures and texts to its output. SigLIP texts go in without a mask, as they were trained."""
    padding = "longest" if family == "clip" else "max_length"
    tokens = tokenizer(texts, padding=padding, truncation=True, max_length=CONTEXT, return_tensors="pt")
    masks = {"attention_mask": tokens.attention_mask} if family == "clip" else {}
    return model(input_ids=tokens.input_ids, **masks, **images(pictures, return_tensors="pt"))


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
