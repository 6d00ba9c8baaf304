"""A small classifier that looks at a scene and says which things are in it, and on which side: the referee of what a model draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from ..batch import Images
from ..data import sprites
from ..data.compose import Scene
from ..data.facts import Facts
from ..data.scenes import SceneConfig, Scenes
from ..models.vit import SiglipVisionTower, VisionConfig

SIDES = ("left", "right", "top", "bottom")
WANTED = {"left of": (0, 1), "right of": (1, 0), "above": (2, 3), "below": (3, 2)}
"""For each relation the sides of the first and of the second group."""


class Judge(nn.Module):
    """(N, 3, side, side) in [-1, 1] -> scores of each concept (N, concepts), and of where it would stand (N, concepts, 4): left, right,
    top, bottom half."""

    def __init__(self, side: int = 64):
        super().__init__()
        self.concepts = [concept.index for concept in sprites.core()]
        shape = dict(width=128, depth=2, heads=4, mlp_width=512, activation="gelu_pytorch_tanh", norm_eps=1e-6)
        self.tower = SiglipVisionTower(VisionConfig(**shape, image_size=side, patch_size=side // 4))  # pyright: ignore[reportArgumentType]
        self.head = nn.Linear(128, len(self.concepts) * (1 + len(SIDES)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tower.position_embedding, std=0.02)
        nn.init.normal_(self.tower.head.probe, std=0.1)

    def forward(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(self.tower(Images(pixels_NCHW))).unflatten(-1, (-1, 1 + len(SIDES)))
        return out[..., 0], out[..., 1:]


def labels(scene: Scene, side: int, concepts: Sequence[int]) -> Tensor:
    """(concepts, 4) ones where a thing of the scene has its middle in that half."""
    out = torch.zeros(len(concepts), len(SIDES))
    for group, boxes in scene.boxes:
        row = concepts.index(scene.facts.groups[group].concept)
        for left, top, right, bottom in boxes:
            out[row, 0 if left + right < side else 1] = 1
            out[row, 2 if top + bottom < side else 3] = 1
    return out


def pixels_of(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_judge(config: SceneConfig, steps: int = 1500, batch: int = 64, seed: int = 0) -> Judge:
    """Train on real scenes of the training side, some of them blurred: a drawing through few codes must not be read as noise."""
    torch.manual_seed(seed)
    judge, source = Judge(config.side), Scenes(config)
    alone = Scenes(replace(config, pair_share=0.0, most=1, colour_share=0.0))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    for step in track(range(steps), "training the judge", transient=True):
        # every other picture holds one thing alone: that is what binds its look to its name
        scenes = [(alone if index % 2 else source).scene(step * batch + index) for index in range(batch)]
        pixels = pixels_of([scene.pixels for scene in scenes])
        if step % 2:
            small = F.interpolate(pixels, scale_factor=0.5, mode="area")
            pixels = F.interpolate(small, size=pixels.shape[2:], mode="bilinear")
        wanted = torch.stack([labels(scene, config.side, judge.concepts) for scene in scenes])
        there = wanted.amax(-1)
        things, sides = judge(pixels)
        loss = F.cross_entropy(things, there / there.sum(1, keepdim=True))
        loss = loss + F.binary_cross_entropy_with_logits(sides[there > 0], wanted[there > 0])
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


@dataclass(frozen=True)
class Verdict:
    things: list[bool]
    """For each group of the caption whether its thing is among the likeliest of the picture, as many as the caption names."""
    place: bool | None
    """Whether both things stand on the sides that the caption says; None without a relation."""


@torch.no_grad()
def verdicts(judge: Judge, pictures: Sequence[Image.Image | np.ndarray], facts: Sequence[Facts]) -> list[Verdict]:
    parts = [judge(part) for part in pixels_of(pictures).split(64)]
    out = []
    for things, row, fact in zip(*(torch.cat(scores) for scores in zip(*parts, strict=True)), facts, strict=True):
        named = [judge.concepts.index(group.concept) for group in fact.groups]
        best = things.topk(len(named)).indices.tolist()
        place = None
        if fact.relation is not None:
            sides = WANTED[fact.relation]
            first, second = (row[concept] for concept in named)
            place = bool(first[sides[0]] > first[sides[1]]) and bool(second[sides[1]] > second[sides[0]])
        out.append(Verdict([concept in best for concept in named], place))
    return out


def shares(found: Sequence[Verdict]) -> dict[str, float]:
    """{"things": share of named things found, "whole": pictures with all of them, "place": relations drawn right}."""
    things = [thing for verdict in found for thing in verdict.things]
    places = [verdict.place for verdict in found if verdict.place is not None]
    return {
        "things": sum(things) / len(things),
        "whole": sum(all(verdict.things) for verdict in found) / len(found),
        "place": sum(places) / max(1, len(places)),
    }
