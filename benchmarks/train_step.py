"""Images a second of a whole training step, ours against a plain one, at equal model, batch and precision.

    python benchmarks/train_step.py [--batch 256] [--steps 5]

The plain step is what open_clip's loop does: texts padded to the 77 places of the context, the whole similarity matrix, PyTorch's own
attention over the padded batch, AdamW. Both sides have the same weights (transformers' CLIPModel against ours, loaded from it), the
same pictures and captions (scenes), the same optimizer. The ratio is theirs over ours, step by step in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import plain
import torch
from transformers import CLIPConfig, CLIPModel

import intermodal
from intermodal.batch import Images, PairBatch, Texts
from intermodal.data.scenes import SceneConfig, Scenes
from intermodal.inputs.image import ImageProcessor
from intermodal.inputs.text import fresh, train_tokenizer
from intermodal.losses import softmax_loss
from intermodal.nn.machine import autocast_for


def models(size: int, end: int, folder: Path):
    """The same random CLIP twice: transformers' and ours."""
    text = dict(
        vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, eos_token_id=end
    )
    vision = dict(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=size, patch_size=16
    )
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)).train()
    theirs.save_pretrained(folder)
    ours = intermodal.load(folder).train()
    return theirs, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=96, help="pixels of a side")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    scenes = [Scenes(SceneConfig(side=arguments.size)).scene(n) for n in range(arguments.batch)]
    captions = [scene.facts.caption(n % 5) for n, scene in enumerate(scenes)]
    tokenizer = fresh(train_tokenizer(captions, 1024), "clip", context=77)
    ids = tokenizer.ids(captions)
    pixels = ImageProcessor((arguments.size, arguments.size))([scene.pixels for scene in scenes]).pixels
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = models(arguments.size, tokenizer.eos_id, Path(folder))
    padded = torch.tensor([row + [tokenizer.eos_id] * (77 - len(row)) for row in ids])
    batch = PairBatch(Images(pixels), Texts.pack(ids))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (theirs, ours)]
    autocast = autocast_for("auto", torch.device("cpu"))

    def their_step() -> float:
        with autocast():
            out = theirs(input_ids=padded, pixel_values=pixels)
        loss = plain.softmax_loss(out.image_embeds.float(), out.text_embeds.float(), theirs.logit_scale)
        return finish(loss, optimizers[0])

    def our_step() -> float:
        with autocast():
            e = ours(batch)
        total, count = softmax_loss(e.image, e.text, e.log_scale)
        return finish(total / count, optimizers[1])

    def finish(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    losses, times = [], ([], [])
    for _ in range(arguments.steps + 1):
        row = []
        for step, record in ((their_step, times[0]), (our_step, times[1])):
            began = time.perf_counter()
            row.append(step())
            record.append(time.perf_counter() - began)
        losses.append(row)
    ratios = [a / b for a, b in zip(times[0][1:], times[1][1:], strict=True)]
    words = sum(map(len, ids)) / len(ids)
    print(f"losses of the steps, theirs and ours: {' '.join(f'{a:.4f}/{b:.4f}' for a, b in losses)}")
    print(f"{words:.1f} tokens a caption on average; padded to 77 there, packed here")
    for name, taken in zip(("plain", "intermodal"), times, strict=True):
        print(f"{name}: {arguments.batch / statistics.median(taken[1:]):.0f} images/s")
    print(f"ratio: {statistics.median(ratios):.2f}x (of {len(ratios)} steps, {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
