"""Pictures to a tower's input: transformers' PIL processors and ours, on the same pictures, with equal pixels.

    python benchmarks/preprocess.py

Prints pictures/s of both, the ratio and the largest difference, for each family's processor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib import import_module

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from intermodal.inputs.image import CLIP_DEFAULTS, CLIP_MEAN, CLIP_STD, SIGLIP_DEFAULTS, ImageProcessor
from intermodal.inputs.patches import QwenPlanner
from intermodal.inputs.tiles import LlavaPlanner

SIDE = 336
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def pictures(count: int) -> list[Image.Image]:
    """Photos' sizes, smooth with some noise."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        width, height = (int(v) for v in rng.integers(300, 1200, 2))
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        out.append(Image.fromarray((smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)))
    return out


def peer(module: str, name: str, **settings):
    return getattr(import_module(f"transformers.models.{module}"), name)(**settings)


def cases():
    clip = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    ours = ImageProcessor.from_hf(clip, CLIP_DEFAULTS)
    theirs = peer("clip.image_processing_pil_clip", "CLIPImageProcessorPil", **clip)
    yield "CLIP, 336 px", lambda images: ours(images).pixels, lambda images: theirs(images, return_tensors="pt")["pixel_values"]

    square = {"size": {"height": 384, "width": 384}}
    siglip = ImageProcessor.from_hf(square, SIGLIP_DEFAULTS)
    other = peer("siglip.image_processing_pil_siglip", "SiglipImageProcessorPil", **square)
    yield "SigLIP, 384 px", lambda images: siglip(images).pixels, lambda images: other(images, return_tensors="pt")["pixel_values"]

    tiles = LlavaPlanner(
        "llava_next", {"image": 0}, SIDE, SIDE // 14, ImageProcessor((SIDE, SIDE), mean=CLIP_MEAN, std=CLIP_STD),
        pinpoints=tuple((a, b) for a, b in PINPOINTS),
    )  # fmt: skip
    anyres = peer(
        "llava_next.image_processing_pil_llava_next", "LlavaNextImageProcessorPil", **clip, image_grid_pinpoints=PINPOINTS
    )

    def tiled(images):
        return tiles.pixels(images, [tiles.plan(image, 1) for image in images])

    def tiled_peer(images):  # one by one: together it pads them to the largest number of tiles
        return torch.cat([anyres(image, return_tensors="pt")["pixel_values"][0] for image in images])

    yield "LLaVA-NeXT, AnyRes", tiled, tiled_peer

    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    planner = QwenPlanner("qwen2_vl", {"image": 0, "video": 1}, "", "", names)
    native = peer(
        "qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil",
        size={"shortest_edge": planner.min_pixels, "longest_edge": planner.max_pixels},
    )  # fmt: skip
    yield (
        "Qwen2-VL",
        lambda images: planner.pixels(images, [planner.plan(image, 1) for image in images]),
        lambda images: native(images, return_tensors="pt")["pixel_values"],
    )


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--pictures", type=int, default=24)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2, help="ours; the peer's processors use one")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    images = pictures(options.pictures)
    table = Table(title=f"{options.pictures} pictures of 300 to 1,200 pixels a side; our threads: {options.threads}")
    for column in ("", "intermodal pictures/s", "transformers pictures/s", "ratio", "largest difference"):
        table.add_column(column)
    for name, ours, theirs in cases():
        difference = (ours(images) - theirs(images)).abs().max().item()  # and warm-up
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.repeats):
            for step, seconds in zip((ours, theirs), times, strict=True):
                began = time.perf_counter()
                step(images)
                seconds.append(time.perf_counter() - began)
        mine, other = map(statistics.median, times)
        speed, peer_speed = options.pictures / mine, options.pictures / other
        table.add_row(name, f"{speed:.1f}", f"{peer_speed:.1f}", f"{other / mine:.2f}x", f"{difference:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
