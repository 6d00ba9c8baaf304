"""Vision towers at native resolution: Qwen2-VL's, Qwen2.5-VL's (windows) and Qwen3-VL's (learned positions, DeepStack).

Patches come packed and block-major: the m x m patches that will be merged into one token are neighbours. Every frame (pair) of a clip is
its own attention segment. Sources: Hugging Face `modeling_qwen2_vl.py`, `modeling_qwen2_5_vl.py`, `modeling_qwen3_vl.py`,
`vision_utils.py`; papers arXiv 2409.12191, 2502.13923, 2511.21631.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..batch import States, Visual
from ..errors import IntermodalError
from ..nn.attention import Segments, attention
from ..nn.layers import ACTIVATIONS
from ..nn.rope import rotate, turns
from .decoder import GatedMLP

Grid = tuple[int, int, int]
"""(frames, rows, columns) of patches."""
EPS = 1e-6


@dataclass(frozen=True)
class NativeVisionConfig:
    width: int
    depth: int
    heads: int
    mlp_width: int
    out_width: int
    """Width of the decoder."""
    patch_size: int = 14
    temporal_patch: int = 2
    """Frames in one patch; a still is shown twice."""
    merge: int = 2
    """Side of the square of patches that becomes one token."""
    channels: int = 3
    activation: str = "quick_gelu"
    rms_norm: bool = False
    gated_mlp: bool = False
    patch_bias: bool = False
    window: int | None = None
    """Side of an attention window in pixels (Qwen2.5-VL); None is full attention in every block."""
    full_blocks: tuple[int, ...] = ()
    """Blocks that see the whole frame where there are windows."""
    table_side: int | None = None
    """Side of the square of learned positions (Qwen3-VL); None is rotary positions alone."""
    deepstack: tuple[int, ...] = ()
    """Blocks after which features are taken for the decoder's first layers."""
    theta: float = 10_000.0

    def check(self) -> None:
        """Raises IntermodalError for a shape that cannot be built."""
        if self.width % self.heads or self.width // self.heads % 4:
            raise IntermodalError(f"vision width {self.width} over {self.heads} heads: a head must be a multiple of 4 wide")
        if self.window is not None and self.window % (self.patch_size * self.merge):
            raise IntermodalError(
                f"window {self.window} is not a multiple of a merged patch, {self.patch_size * self.merge} pixels"
            )
        if list(self.deepstack) != sorted(set(self.deepstack)):
            raise IntermodalError(f"deepstack {self.deepstack} must name blocks in rising order")
        if any(not 0 <= block < self.depth for block in (*self.deepstack, *self.full_blocks)):
            raise IntermodalError(f"deepstack {self.deepstack} or full blocks {self.full_blocks} lie outside {self.depth} blocks")

    def norm(self) -> nn.Module:
        return nn.RMSNorm(self.width, eps=EPS) if self.rms_norm else nn.LayerNorm(self.width, eps=EPS)


class VisionMLP(nn.Module):
    def __init__(self, config: NativeVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_PD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_PD)))


class VisionAttention(nn.Module):
    """The leaf names and the fused `qkv` are Qwen's."""

    def __init__(self, config: NativeVisionConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_PD: Tensor, segments: Segments, tables: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x_PD).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k = (rotate(x.to(tables[0].dtype), *tables).to(v.dtype) for x in (q, k))  # the angles need float32
        return self.proj(attention(q, k, v, segments).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, config: NativeVisionConfig):
        super().__init__()
        self.norm1, self.norm2 = config.norm(), config.norm()
        self.attn = VisionAttention(config)
        gated = config.gated_mlp
        self.mlp = GatedMLP(config.width, config.mlp_width, config.activation, bias=True) if gated else VisionMLP(config)

    def forward(self, x_PD: Tensor, segments: Segments, tables: tuple[Tensor, Tensor]) -> Tensor:
        x_PD = x_PD + self.attn(self.norm1(x_PD), segments, tables)
        return x_PD + self.mlp(self.norm2(x_PD))


class Merger(nn.Module):
    """m x m neighbouring patches -> one token of the decoder: norm, join, Linear, GELU (erf), Linear.

    The norm is over one patch; DeepStack's mergers join first and normalise the joined vector.
    """

    def __init__(self, config: NativeVisionConfig, *, norm_joined: bool = False):
        super().__init__()
        joined = config.width * config.merge**2
        self.joined, self.norm_joined = joined, norm_joined
        self.norm = nn.LayerNorm(joined, eps=EPS) if norm_joined else config.norm()
        self.fc1 = nn.Linear(joined, joined)
        self.fc2 = nn.Linear(joined, config.out_width)

    def forward(self, x_PD: Tensor) -> Tensor:
        x = self.norm(x_PD.view(-1, self.joined)) if self.norm_joined else self.norm(x_PD).view(-1, self.joined)
        return self.fc2(F.gelu(self.fc1(x)))


class NativeVisionTower(nn.Module):
    def __init__(self, config: NativeVisionConfig):
        super().__init__()
        config.check()
        self.config = config
        values = config.channels * config.temporal_patch * config.patch_size**2
        self.patch_embed = nn.Linear(values, config.width, bias=config.patch_bias)
        self.pos_embed = nn.Parameter(torch.empty(config.table_side**2, config.width)) if config.table_side else None
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)
        self.deepstack_mergers = nn.ModuleList(Merger(config, norm_joined=True) for _ in config.deepstack)
        self.checkpoint_activations = False

    def forward(self, visual: Visual) -> States:
        """Packed patches -> the last hidden states (P, width), and those that DeepStack reads."""
        config, grids = self.config, visual.grids
        assert grids is not None
        x_PD = self.patch_embed(visual.pixels.to(self.patch_embed.weight.dtype))
        if self.pos_embed is not None:
            x_PD = x_PD + self.learned_positions(grids).to(x_PD.dtype)
        frames = Segments([rows * columns for count, rows, columns in grids for _ in range(count)])
        angles = torch.cat([rotary_angles(grid, config.merge, config.width // config.heads, config.theta) for grid in grids])
        windows, order = frames, None
        if config.window is not None:
            order, windows = window_order(grids, config.merge, config.window // (config.patch_size * config.merge))
            x_PD, angles = _by_unit(x_PD, order.to(x_PD.device), config.merge), _by_unit(angles, order, config.merge)
        wide = torch.promote_types(x_PD.dtype, torch.float32)
        tables = turns(angles.to(x_PD.device, wide), wide)
        deep = []
        for index, block in enumerate(self.blocks):
            segments = frames if index in config.full_blocks or config.window is None else windows
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_PD = checkpoint(block, x_PD, segments, tables, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x_PD = block(x_PD, segments, tables)
            if index in config.deepstack:
                deep.append(x_PD)
        if order is not None:
            back = torch.argsort(order).to(x_PD.device)
            return _by_unit(x_PD, back, config.merge), *(_by_unit(state, back, config.merge) for state in deep)
        return x_PD, *deep

    def merge(self, states: States) -> tuple[Tensor, list[Tensor]]:
        """Hidden states -> merged tokens (V, decoder width), and one such tensor for each DeepStack layer, in the order of the decoder's
        layers."""
        last, *deep = states
        return self.merger(last), [merger(state) for merger, state in zip(self.deepstack_mergers, deep, strict=True)]

    def learned_positions(self, grids: Sequence[Grid]) -> Tensor:
        """(P, D): the square table resampled to each grid, corners on corners, in block-major order, the same for every frame."""
        side, merge = self.config.table_side, self.config.merge
        assert self.pos_embed is not None
        assert side is not None
        square = self.pos_embed.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        tables: dict[tuple[int, int], Tensor] = {}
        for _, rows, columns in grids:
            if (rows, columns) not in tables:
                resized = F.interpolate(square, size=(rows, columns), mode="bilinear", align_corners=True)[0]
                blocks = resized.unflatten(1, (-1, merge)).unflatten(3, (-1, merge))  # D, rows/m, m, columns/m, m
                tables[rows, columns] = blocks.permute(1, 3, 2, 4, 0).flatten(0, 3)
        return torch.cat([tables[rows, columns] for frames, rows, columns in grids for _ in range(frames)])


@lru_cache(maxsize=256)
def rotary_angles(grid: Grid, merge: int, head: int, theta: float) -> Tensor:
    """(P, K/2) float32 angles in block-major order: half of them turn with the row, half with the column."""
    frames, rows, columns = grid
    inverse = 1.0 / theta ** (torch.arange(0, head // 2, 2, dtype=torch.float32) / (head // 2))
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    blocks = places.unflatten(0, (-1, merge)).unflatten(2, (-1, merge)).transpose(1, 2).flatten(0, 3)  # (rows * columns, 2)
    angles = (blocks[..., None].float() * inverse).flatten(1)
    return angles.repeat(frames, 1)


def window_order(grids: Sequence[Grid], merge: int, side: int) -> tuple[Tensor, Segments]:
    """Qwen2.5-VL's windows: the order of merged units that makes each window of `side` x `side` units contiguous, and their sizes.

    Returns:
        (units,) index, and segments in patches.
    """
    orders, lengths, start = [], [], 0
    for grid in grids:
        order, sizes = _windows(grid, merge, side)
        orders.append(order + start)
        lengths += [size * merge**2 for size in sizes]
        start += len(order)
    return torch.cat(orders), Segments(lengths)


@lru_cache(maxsize=256)
def _windows(grid: Grid, merge: int, side: int) -> tuple[Tensor, list[int]]:
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    units = torch.arange(frames * rows * columns).view(frames, rows, columns)
    windows = [
        units[frame, top : top + side, left : left + side].flatten()
        for frame in range(frames)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    return torch.cat(windows), [len(window) for window in windows]


def _by_unit(x: Tensor, order: Tensor, merge: int) -> Tensor:
    """Reorder (P, ...) by merged units of m * m patches."""
    return x.unflatten(0, (-1, merge**2))[order].flatten(0, 1)
