"""Vision towers of the contrastive family: CLIP's (class token), SigLIP's (attention pooling), SigLIP 2's NaFlex (any grid)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Images
from ..config import Positive
from ..errors import InputError, IntermodalError
from ..nn.attention import Segments
from ..nn.layers import AttentionPool, Encoder, TransformerConfig


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    image_size: Positive = 224
    """Side of the square input in pixels; for NaFlex the side that the position table was made for."""
    patch_size: Positive = 16
    channels: int = 3

    @property
    def grid(self) -> int:
        """Patches along one side; a remainder of the image is cut off, as a strided convolution does."""
        return self.image_size // self.patch_size

    def check(self) -> None:
        super().check()
        if self.channels != 3:
            raise IntermodalError(f"channels {self.channels}: pictures have 3, red, green and blue")
        if self.patch_size > self.image_size:
            raise IntermodalError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}: there is no patch")


def patchify(pixels_BCHW: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B * rows * columns, C * patch * patch), row-major patches, values in a convolution weight's order."""
    batch, channels, height, width = pixels_BCHW.shape
    rows, columns = height // patch, width // patch
    x = pixels_BCHW[:, :, : rows * patch, : columns * patch]
    x = x.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch * rows * columns, channels * patch * patch)


def embed_patches(layer: nn.Linear, patches_PK: Tensor) -> Tensor:
    """Pixels come in float32; the tower's weights say in what it computes.

    Raises:
        InputError: they are still bytes.
    """
    if not patches_PK.is_floating_point():
        raise InputError(
            "these pixels are bytes as data workers hand them over: make them numbers with the image processor's `normalised`"
        )
    return layer(patches_PK.to(layer.weight.dtype))


def resize_positions(table_PD: Tensor, grid: tuple[int, int], *, prefix: int = 0, mode: str = "bicubic") -> Tensor:
    """Resample a square table of learned positions to another grid, with antialiasing; the first `prefix` rows stay as they are.

    Args:
        table_PD: (prefix + side * side, D).
        grid: (rows, columns) wanted.
        mode: bicubic for CLIP and SigLIP (open_clip `model.py:790`), bilinear for NaFlex (open_clip `naflex_vit.py:38-81`).

    Returns:
        (prefix + rows * columns, D) in the dtype of the table.

    Raises:
        ValueError: the table is not square.
    """
    kept, body = table_PD[:prefix], table_PD[prefix:]
    side = round(body.shape[0] ** 0.5)
    if side * side != body.shape[0]:
        raise ValueError(f"a position table of {body.shape[0]} rows is not a square grid")
    if (side, side) == tuple(grid):
        return table_PD
    square = body.to(torch.promote_types(body.dtype, torch.float32)).unflatten(0, (side, side)).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=grid, mode=mode, align_corners=False, antialias=True)
    return torch.cat([kept, resized[0].flatten(1).T.to(table_PD.dtype)])


class ClipVisionTower(nn.Module):
    """Class token first, LayerNorm before the blocks, `post_layernorm` on the class token only, patch embedding without bias.

    Source: open_clip `transformer.py:632-660`; Hugging Face `CLIPVisionModel` (whose key is spelled `pre_layrnorm`).
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Linear(config.channels * config.patch_size**2, config.width, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1 + config.grid**2, config.width))
        self.pre_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images: Images) -> Tensor:
        """(B, C, S, S) pixels -> (B, D) pooled."""
        x_TD, segments = self.tokens(images)
        return self.post_layernorm(self.encoder(x_TD, segments)[:: segments.longest])

    def tokens(self, images: Images) -> tuple[Tensor, Segments]:
        check_fixed_size(images, self.config)
        count = len(images)
        patches_BPD = embed_patches(self.patch_embedding, patchify(images.pixels, self.config.patch_size)).unflatten(0, (count, -1))
        x_BPD = torch.cat([self.class_embedding.to(patches_BPD.dtype).expand(count, 1, -1), patches_BPD], dim=1)
        x_BPD = x_BPD + self.position_embedding.to(x_BPD.dtype)
        return self.pre_layernorm(x_BPD.flatten(0, 1)), Segments([x_BPD.shape[1]] * count)


class SiglipVisionTower(nn.Module):
    """No class token, LayerNorm after the blocks, attention pooling. Source: big_vision `models/vit.py`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(config.channels * config.patch_size**2, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.grid**2, config.width))
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = AttentionPool(config)

    def forward(self, images: Images) -> Tensor:
        """(B, C, S, S) pixels -> (B, D) pooled."""
        x_TD, segments = self.tokens(images)
        return self.head(self.post_layernorm(self.encoder(x_TD, segments)), segments)

    def tokens(self, images: Images) -> tuple[Tensor, Segments]:
        check_fixed_size(images, self.config)
        count = len(images)
        x_BPD = embed_patches(self.patch_embedding, patchify(images.pixels, self.config.patch_size)).unflatten(0, (count, -1))
        x_BPD = x_BPD + self.position_embedding.to(x_BPD.dtype)
        return x_BPD.flatten(0, 1), Segments([x_BPD.shape[1]] * count)


class NaflexVisionTower(SiglipVisionTower):
    """SigLIP 2 at native aspect ratio: patches of any grid, the position table resized for each picture.

    Packed, so there is no padding to mask in attention or pooling. Source: open_clip `naflex_vit.py:38-81`; Hugging Face
    `Siglip2VisionEmbeddings`.
    """

    def tokens(self, images: Images) -> tuple[Tensor, Segments]:
        if images.grids is None:
            raise ValueError("a NaFlex tower takes packed patches with their grids; make them with `model.processor.images`")
        table = self.position_embedding
        resized = {grid: resize_positions(table, grid, mode="bilinear") for grid in dict.fromkeys(images.grids)}
        positions_PD = torch.cat([resized[grid] for grid in images.grids])
        x_PD = embed_patches(self.patch_embedding, images.pixels)
        return x_PD + positions_PD.to(x_PD.dtype), Segments([rows * columns for rows, columns in images.grids])


def check_fixed_size(images: Images, config: VisionConfig) -> None:
    """Raises InputError: the pixels are not the tower's size. A wrong size would otherwise read wrong positions."""
    wanted = (config.channels, config.image_size, config.image_size)
    if images.grids is not None or tuple(images.pixels.shape[1:]) != wanted:
        raise InputError(
            f"this tower takes pixels of shape (B, {wanted[0]}, {wanted[1]}, {wanted[2]}), got {tuple(images.pixels.shape)}; "
            f"load it with image_size=... to resample its positions"
        )
