"""A training step of a LLaVA- or Qwen2-VL-shaped model on mixed-length conversations: packed here, padded in transformers, same weights
and data.

    python benchmarks/vlm_train_step.py [--dtype fp32]
    python benchmarks/vlm_train_step.py --shape qwen2_vl        # pictures of 56 to 224 pixels a side, each at its own size

Prints tokens/s of both (real tokens, padding not counted), the ratio, and both losses, which must agree.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import intermodal
from intermodal.batch import TokenBatch, Visual
from intermodal.data.packing import bins
from intermodal.data.talks import open_talks
from intermodal.inputs.image import ImageProcessor, open_image
from intermodal.inputs.patches import QwenPlanner
from intermodal.inputs.processor import PairProcessor
from intermodal.losses_tokens import next_token_loss
from intermodal.models.clip import DualConfig, SigLIP, initialise
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import Generative, LanguageModel
from intermodal.models.qwen2_vl import QwenVL, QwenVLConfig
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.models.vit_native import NativeVisionConfig
from intermodal.nn.machine import autocast_for
from intermodal.train.stages import spoken
from intermodal.weights.stitch import fresh_decoder, stitch
from intermodal.weights.stitch_native import stitch_native

SIDE, PATCH = 112, 14
SOURCES = ("captions:scenes:core", "questions:scenes:core?word_share=0.3", "blind:scenes:core")
TEXT = DecoderConfig(width=640, depth=16, heads=10, kv_heads=10, head_width=64, mlp_width=1728, vocab_size=32_000, context=1024)


def build(shape: str) -> tuple[Generative, list[Any]]:
    """About 140M parameters, random, with a real tokenizer; and the conversations."""
    sources = [open_talks(spec, side=SIDE) for spec in SOURCES]
    small = fresh_decoder(replace(TEXT, width=64, depth=1), spoken(sources, 1500), 2000)
    language = random_weights(LanguageModel(TEXT))
    language.processor = small.processor
    assert small.processor is not None
    if shape == "qwen2_vl":
        vision = NativeVisionConfig(384, 8, 6, 1536, TEXT.width, patch_size=PATCH)
        eyes = random_weights(QwenVL(QwenVLConfig("qwen2_vl", vision, replace(TEXT, depth=1))))
        budget = {"min_pixels": 28 * 28, "max_pixels": 224 * 224}
        planner = QwenPlanner.from_hf(eyes.config, budget, budget, small.processor.tokenizer)
        eyes.processor = copy.copy(small.processor)
        eyes.processor.planner = planner
        return stitch_native(eyes, language), sources
    vision = VisionConfig(384, 8, 6, 1536, image_size=SIDE, patch_size=PATCH, activation="gelu_pytorch_tanh", norm_eps=1e-6)
    tower = initialise(SigLIP(DualConfig(vision, TextConfig(32, 1, 2, 64, vocab_size=64, context=8, eos_id=1), 384)))
    tower.processor = PairProcessor(ImageProcessor((SIDE, SIDE)), None, "siglip")
    return stitch(tower, language), sources


def random_weights(model: Generative) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def resized(messages: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """The same conversation with its pictures at sizes of their own."""

    def other(picture: Any) -> Any:
        return open_image(picture).resize((rng.randint(56, 224), rng.randint(56, 224)))

    out = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, list):
            parts = [{**part, "image": other(part["image"])} if "image" in part else part for part in parts]
        out.append({**message, "content": parts})
    return out


def peer_media(shape: str, visuals: list[Visual], ids: torch.Tensor, image_id: int) -> dict[str, torch.Tensor]:
    """transformers' arguments for the pictures of a batch."""
    pixels = torch.cat([visual.pixels for visual in visuals])
    if shape == "llava":
        return {"pixel_values": pixels}
    grids = torch.tensor([grid for visual in visuals for grid in visual.grids or ()])
    return {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": (ids == image_id).int()}


def in_turn(steps, repeats: int) -> list[tuple[float, float]]:
    """(median seconds, loss) of each; they take turns, so that a slow minute of the machine falls on both."""
    losses = [step() for step in steps]  # warm-up
    times = [[] for _ in steps]
    for _ in range(repeats):
        for at, step in enumerate(steps):
            began = time.perf_counter()
            losses[at] = step()
            times[at].append(time.perf_counter() - began)
    return [(statistics.median(seconds), loss) for seconds, loss in zip(times, losses, strict=True)]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--conversations", type=int, default=16)
    arguments.add_argument("--shape", choices=("llava", "qwen2_vl"), default="llava")
    arguments.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast over fp32 weights, on both sides"
    )
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    autocast = autocast_for(options.dtype, torch.device("cpu"))
    torch.manual_seed(0)
    model, sources = build(options.shape)
    assert model.processor is not None
    rng = random.Random(0)
    talks = [rng.choice(sources)[index].messages for index in range(options.conversations)]
    if options.shape == "qwen2_vl":
        talks = [resized(messages, rng) for messages in talks]
    singles = [model.processor(messages) for messages in talks]
    lengths = [len(single.ids) for single in singles]
    tokens = sum(lengths)
    packs = [TokenBatch.pack([singles[i] for i in chosen]) for chosen in bins(lengths, 2048)]
    count = sum(int(single.supervised.sum()) for single in singles)

    import transformers

    with tempfile.TemporaryDirectory() as folder:
        intermodal.save(model, folder)
        peer = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    model.train()

    def ours() -> float:
        total = 0.0
        for pack in packs:
            with autocast():
                loss, _ = next_token_loss(model.hidden(pack), model.head_weight, pack)
            (loss / count).backward()
            total += loss.item() / count
        model.zero_grad(set_to_none=True)
        return total

    longest = max(lengths)
    ids = torch.zeros(len(singles), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, single in enumerate(singles):
        size = len(single.ids)
        ids[row, :size], mask[row, :size] = single.ids, 1
        labels[row, :size] = torch.where(single.supervised, single.ids, -100)
    visuals = [single.visual for single in singles if single.visual is not None]
    media = peer_media(options.shape, visuals, ids, model.config.image_id)

    def theirs() -> float:
        with autocast():
            out = peer(input_ids=ids, attention_mask=mask, labels=labels, **media)
        out.loss.backward()
        peer.zero_grad(set_to_none=True)
        return out.loss.item()

    (seconds, loss), (peer_seconds, peer_loss) = in_turn((ours, theirs), options.repeats)
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{parameters / 1e6:.0f}M parameters, {len(talks)} conversations, {tokens} tokens ({min(lengths)} to {longest}), {options.dtype}"
    table = Table(title=f"{options.shape}: {size}")
    for column in ("", "tokens/s", "step", "loss"):
        table.add_column(column)
    table.add_row("intermodal, packed", f"{tokens / seconds:.0f}", f"{seconds:.2f} s", f"{loss:.5f}")
    table.add_row("transformers, padded", f"{tokens / peer_seconds:.0f}", f"{peer_seconds:.2f} s", f"{peer_loss:.5f}")
    console = Console()
    console.print(table)
    padding = len(talks) * longest / tokens
    console.print(f"ratio {peer_seconds / seconds:.2f}x; padding makes the peer's batch {padding:.2f}x as long")
    if abs(loss - peer_loss) > (1e-3 if options.dtype == "fp32" else 1e-2) * peer_loss:
        raise SystemExit("the losses differ: this is not the same work")


if __name__ == "__main__":
    main()
