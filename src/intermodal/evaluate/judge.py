"""A small classifier that says which thing stands where in a scene, cell by cell: the referee of what a model draws."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
from ..models.clip import DualEncoder
from ..models.vit import SiglipVisionTower, VisionConfig
from .retrieval import ranks

TOWER = VisionConfig(128, 2, 4, 512, activation="gelu_pytorch_tanh", norm_eps=1e-6)
STANDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "left of": lambda first, second: first[0] < second[0],
    "right of": lambda first, second: first[0] > second[0],
    "above": lambda first, second: first[1] < second[1],
    "below": lambda first, second: first[1] > second[1],
}
"""For each relation whether two middles (x, y) stand in it."""


class Judge(nn.Module):
    """(N, 3, side, side) in [-1, 1] -> scores (N, cells, concepts + 1) of what stands in each cell of the picture, the last: nothing.

    A cell is a patch of the tower, so that every thing is learned together with its place.
    """

    def __init__(self, tower: SiglipVisionTower, concepts: Sequence[int] | None = None):
        """`concepts` are those that it tells apart, by default the core ones."""
        super().__init__()
        self.concepts = list(concepts) if concepts is not None else [concept.index for concept in sprites.core()]
        self.tower = tower
        self.head = nn.Linear(tower.config.width, len(self.concepts) + 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def grid(self) -> int:
        return self.tower.config.grid

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        x_TD, segments = self.tower.tokens(Images(pixels_NCHW))
        seen_TD = self.tower.post_layernorm(self.tower.encoder(x_TD, segments))
        return self.head(seen_TD).unflatten(0, (len(pixels_NCHW), -1))


def fresh_tower(side: int) -> SiglipVisionTower:
    """A tower with a quarter of the picture's side as its patch, from random weights."""
    tower = SiglipVisionTower(replace(TOWER, image_size=side, patch_size=side // 4))
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    nn.init.normal_(tower.position_embedding, std=0.02)
    nn.init.normal_(tower.head.probe, std=0.1)
    return tower


def labels(scene: Scene, grid: int, concepts: Sequence[int]) -> Tensor:
    """(grid * grid,) what stands in each cell: the thing whose box holds the cell's middle, or whose own middle is in the cell.

    A cell with nothing in it has the number len(concepts).
    """
    out = torch.full((grid, grid), len(concepts))
    size = scene.pixels.shape[0] / grid
    middles = (np.arange(grid) + 0.5) * size
    for group, boxes in scene.boxes:
        concept = concepts.index(scene.facts.groups[group].concept)
        for left, top, right, bottom in boxes:
            rows, columns = (np.flatnonzero((low <= middles) & (middles < high)) for low, high in ((top, bottom), (left, right)))
            out[np.ix_(rows, columns)] = concept
            out[int((top + bottom) / 2 / size), int((left + right) / 2 / size)] = concept
    return out.flatten()


def pixels_of(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_judge(
    config: SceneConfig,
    tower: SiglipVisionTower | None = None,
    steps: int = 600,
    batch: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Judge:
    """Train on real scenes of the training side, half of them blurred: a drawing through few codes must not be read as noise.

    Args:
        tower: a trained one to begin with, which is copied; None begins with random weights and wants some three times the steps.
    """
    torch.manual_seed(seed)
    source = Scenes(config)
    judge = Judge(fresh_tower(config.side) if tower is None else copy.deepcopy(tower), source.pool)
    alone = Scenes(replace(config, pair_share=0.0, most=1))
    rate = 1.5e-3 if tower is None else 1e-3
    optimizer = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    judge.train()
    for step in track(range(steps), "training the judge", transient=True, disable=not progress):
        # every other picture holds one thing alone: that is what binds its look to its name
        scenes = [(alone if index % 2 else source).scene(step * batch + index) for index in range(batch)]
        pixels = pixels_of([scene.pixels for scene in scenes])
        if step % 2:
            small = F.interpolate(pixels, scale_factor=0.5, mode="area")
            pixels = F.interpolate(small, size=pixels.shape[2:], mode="bilinear")
        wanted = torch.stack([labels(scene, judge.grid, judge.concepts) for scene in scenes])
        loss = F.cross_entropy(judge(pixels).flatten(0, 1), wanted.flatten())
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
    """Whether both things were found and stand as the caption says; None without a relation."""


@torch.no_grad()
def verdicts(judge: Judge, pictures: Sequence[Image.Image | np.ndarray], facts: Sequence[Facts]) -> list[Verdict]:
    chances_NPC = torch.cat([judge(part).softmax(-1) for part in pixels_of(pictures).split(64)])[..., :-1]
    grid = judge.grid
    at = torch.arange(grid * grid)
    middles_P2 = torch.stack([at % grid, at // grid], 1) + 0.5
    out = []
    for chances_PC, fact in zip(chances_NPC, facts, strict=True):
        named = [judge.concepts.index(group.concept) for group in fact.groups]
        best = chances_PC.amax(0).topk(len(named)).indices.tolist()
        things = [concept in best for concept in named]
        place = None
        if fact.relation is not None:
            shares_P2 = chances_PC[:, named] / chances_PC[:, named].sum(0)
            place = all(things) and bool(STANDS[fact.relation](*(shares_P2.T @ middles_P2)))
        out.append(Verdict(things, place))
    return out


def shares(found: Sequence[Verdict]) -> dict[str, float]:
    """{"things": share of named things found, "whole": pictures with all of them, "place": pairs found and placed right}."""
    things = [thing for verdict in found for thing in verdict.things]
    places = [verdict.place for verdict in found if verdict.place is not None]
    return {
        "things": sum(things) / len(things),
        "whole": sum(all(verdict.things) for verdict in found) / len(found),
        "place": sum(places) / max(1, len(places)),
    }


def ranked(model: DualEncoder, pictures: Sequence[Image.Image], facts: Sequence[Facts], at: int = 5) -> list[bool]:
    """For each picture whether its own caption is among the first `at` of all that a CLIP or SigLIP ranks for it: a second opinion."""
    captions = [fact.caption() for fact in facts]
    places = ranks(model.embed_images(list(pictures)), model.embed_texts(captions), [[index] for index in range(len(captions))])
    return (places < at).tolist()
