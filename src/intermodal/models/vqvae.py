"""VQGAN: pictures to codes and back, as Chameleon uses it. Encoder, quantiser and decoder; leaf names are the authors' and Hugging Face's.

Sources: chameleon `inference/vqgan.py`; taming-transformers `modules/diffusionmodules/model.py` (decoder); Hugging Face
`ChameleonVQVAE` (encoder only). Pictures are in [-1, 1].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Len
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import Positive
from ..errors import IntermodalError
from ..nn.layers import at_least_float32

EPS = 1e-6


@dataclass(frozen=True)
class VQConfig:
    resolution: Positive = 512
    """Pixels of a side in training; it decides only where `attention` sits."""
    channels: Positive = 3
    width: Positive = 128
    """Channels at the finest level."""
    multipliers: Annotated[tuple[Positive, ...], Len(1)] = (1, 1, 2, 2, 4)
    """Channels of each level in multiples of `width`; each level after the first halves the side."""
    res_blocks: Positive = 2
    attention: tuple[Positive, ...] = ()
    """Sides (at `resolution`) of the levels that have attention after each residual block."""
    mid_attention: bool = True
    latent_channels: Positive = 256
    double_latent: bool = False
    code_width: Positive = 256
    codes: Positive = 8192
    groups: Positive = 32
    """Of every GroupNorm."""
    stem: Positive = 1
    """Pixels of a side that are folded into channels before the first convolution: a cheap first level for models made here. The field's
    checkpoints have 1."""
    unit_codes: bool = False
    """Codes and latents are compared on the unit sphere (l2-normalised). The field's checkpoints do not."""
    beta: Annotated[float, Ge(0)] = 0.25
    """Weight of the term that the rule below puts it on."""
    beta_on: Literal["codebook", "commitment"] = "codebook"
    """The authors' `legacy` rule weighs the codebook's term (PITFALLS 8.12); "commitment" is the paper's and LlamaGen's."""
    tanh_out: bool = False
    """The decoder's pictures go through tanh (`ddconfig.tanh_out` of the authors' yaml). The released checkpoints' do not."""
    decoder: bool = True
    """False: Hugging Face's Chameleon files, which carry no decoder."""

    @property
    def shrink(self) -> int:
        """Pixels of a side that one code stands for."""
        return self.stem * 2 ** (len(self.multipliers) - 1)

    @property
    def sides(self) -> list[int]:
        """Pixels of a side of each level at `resolution`, the finest first."""
        return [self.resolution // self.stem // 2**level for level in range(len(self.multipliers))]

    def check(self) -> None:
        """Raises IntermodalError for a shape that cannot be built; the message begins with the field."""
        if not self.multipliers:
            raise IntermodalError("multipliers=[]: at least one level is needed")
        for multiplier in self.multipliers:
            if self.width * multiplier % self.groups:
                raise IntermodalError(
                    f"width={self.width} times {multiplier} of multipliers is {self.width * multiplier} channels, which do not divide into "
                    f"groups={self.groups}: both must be such that they do"
                )
        if self.beta_on not in ("codebook", "commitment"):
            raise IntermodalError(f"beta_on={self.beta_on!r}: codebook or commitment")

    def differences(self, other: VQConfig) -> list[str]:
        """Where the two shapes differ, as "codes 8192 against 512": weights of one fit the other only where nothing does."""
        mine, theirs = asdict(self), asdict(other)
        weights = [name for name in mine if name not in ("beta", "beta_on", "tanh_out", "decoder")]
        return [f"{name} {mine[name]} against {theirs[name]}" for name in weights if mine[name] != theirs[name]]


class ResBlock(nn.Module):
    def __init__(self, config: VQConfig, width: int, out_width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(config.groups, width, EPS), nn.Conv2d(width, out_width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(config.groups, out_width, EPS), nn.Conv2d(out_width, out_width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out_width, 1) if width != out_width else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_NCHW)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x_NCHW) + h


class PixelAttention(nn.Module):
    """One head over all places."""

    def __init__(self, config: VQConfig, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width, EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h = self.norm(x_NCHW)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x_NCHW.shape)
        return x_NCHW + self.proj_out(seen)


class _Level(nn.Module):
    """Residual blocks of one resolution, with attention where the config wants it, and the step to the next."""

    def __init__(
        self, config: VQConfig, width: int, out_width: int, blocks: int, attention: bool, step: tuple[str, nn.Module] | None
    ):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(config, width if i == 0 else out_width, out_width) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(config, out_width) for _ in range(blocks if attention else 0))
        self.step = step[0] if step else None
        if step:
            setattr(self, *step)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_NCHW = block(x_NCHW)
            if len(self.attn):
                x_NCHW = self.attn[index](x_NCHW)
        return getattr(self, self.step)(x_NCHW) if self.step else x_NCHW


class _Middle(nn.Module):
    def __init__(self, config: VQConfig, width: int):
        super().__init__()
        self.block_1, self.block_2 = ResBlock(config, width, width), ResBlock(config, width, width)
        self.attn_1 = PixelAttention(config, width) if config.mid_attention else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_NCHW)))


class Downsample(nn.Module):
    """Stride 2 with padding on the right and below alone."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_NCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Pictures (N, C, H, W) -> latents (N, L, H / shrink, W / shrink)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.stem, self.checkpoint_activations = config.stem, False
        widths, levels = [config.width * multiplier for multiplier in config.multipliers], []
        self.conv_in = nn.Conv2d(config.channels * config.stem**2, config.width, 3, padding=1)
        before, side = config.width, config.resolution // config.stem
        for number, width in enumerate(widths):
            step = ("downsample", Downsample(width)) if number + 1 < len(widths) else None
            levels.append(_Level(config, before, width, config.res_blocks, side in config.attention, step))
            before, side = width, side // 2
        self.down, self.mid = nn.ModuleList(levels), _Middle(config, before)
        self.norm_out = nn.GroupNorm(config.groups, before, EPS)
        self.conv_out = nn.Conv2d(before, config.latent_channels * (2 if config.double_latent else 1), 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x_NCHW, self.stem))
        for level in self.down:
            x = _run(level, x, self.checkpoint_activations)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents -> pictures; one residual block a level more than the encoder has."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.stem, self.checkpoint_activations, self.tanh_out = config.stem, False, config.tanh_out
        widths = [config.width * multiplier for multiplier in config.multipliers]
        before, levels = widths[-1], []
        self.conv_in, self.mid = nn.Conv2d(config.latent_channels, before, 3, padding=1), _Middle(config, before)
        for number in reversed(range(len(widths))):
            width, side = widths[number], config.resolution // config.stem // 2**number
            step = ("upsample", Upsample(width)) if number else None
            levels.append(_Level(config, before, width, config.res_blocks + 1, side in config.attention, step))
            before = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(config.groups, before, EPS)
        self.conv_out = nn.Conv2d(before, config.channels * config.stem**2, 3, padding=1)

    def forward(self, z_NCHW: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z_NCHW))
        for level in reversed(self.up):
            x = _run(level, x, self.checkpoint_activations)
        pixels_NCHW = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.stem)
        return pixels_NCHW.tanh() if self.tanh_out else pixels_NCHW


def _run(level: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(level, x, use_reentrant=False)  # pyright: ignore[reportReturnType]
    return level(x)


def _widened(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output with its weights in float32 at least, whatever they are kept in."""
    if all(value.dtype.itemsize >= 4 for value in module.parameters()):
        return module(x)
    return torch.func.functional_call(module, {name: at_least_float32(value) for name, value in module.named_parameters()}, (x,))


class Quantiser(nn.Module):
    """The codebook: the nearest code of each latent."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codes, config.code_width)

    def table(self, weight: Tensor | None = None) -> Tensor:
        """(codes, D) as they are compared and decoded; of `weight`, where that is the codebook in another precision."""
        weight = self.embedding.weight if weight is None else weight
        return F.normalize(weight, dim=-1) if self.config.unit_codes else weight

    def nearest(self, z_TD: Tensor) -> Tensor:
        """(T, D) latents -> (T,) codes; ties go to the first. Distances as the authors compute them, in float32 at least: rounded
        to bf16, near codes change places."""
        with torch.autocast(z_TD.device.type, enabled=False):
            z_TD, table = at_least_float32(z_TD), self.table(at_least_float32(self.embedding.weight))
            distances = (z_TD**2).sum(1, keepdim=True) + (table**2).sum(1) - 2 * z_TD @ table.T
            return distances.argmin(1)

    def forward(self, z_NDHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents -> (codes as latents, with the gradient passed straight through; ids (N, H, W); the quantisation loss)."""
        z = z_NDHW.permute(0, 2, 3, 1)
        if self.config.unit_codes:
            z = F.normalize(z, dim=-1)
        ids = self.nearest(z.flatten(0, 2).detach()).view(z.shape[:3])
        found = F.embedding(ids, self.table())
        codebook, commitment = F.mse_loss(found, z.detach()), F.mse_loss(z, found.detach())
        beta = self.config.beta
        loss = beta * codebook + commitment if self.config.beta_on == "codebook" else codebook + beta * commitment
        straight = z + (found - z).detach()
        return straight.permute(0, 3, 1, 2), ids, loss


class VQVAE(nn.Module):
    """Pictures <-> codes."""

    def __init__(self, config: VQConfig):
        super().__init__()
        config.check()
        self.config, self.family = config, "vqgan"
        self.encoder, self.quantize = Encoder(config), Quantiser(config)
        width = config.latent_channels * (2 if config.double_latent else 1)
        self.quant_conv = nn.Conv2d(width, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)
        self.decoder = Decoder(config) if config.decoder else None
        self.source: dict = {}
        self.processor = None

    def latents(self, pixels_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, h, w) before quantisation.

        Raises:
            ValueError: a side is not a multiple of the pixels of a code.
        """
        self._check_sides(pixels_NCHW)
        return self.quant_conv(self.encoder(pixels_NCHW.to(self.quant_conv.weight.dtype)))

    def _check_sides(self, pixels_NCHW: Tensor) -> None:
        if any(side % self.config.shrink for side in pixels_NCHW.shape[2:]):
            raise ValueError(f"sides {tuple(pixels_NCHW.shape[2:])} are not multiples of {self.config.shrink}")

    @torch.no_grad()
    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> codes (N, h, w). In float32 at least, as the authors run it beside a model in bf16: a latent rounded to
        bf16 lies nearer to another code too often."""
        self._check_sides(pixels_NCHW)
        with torch.autocast(pixels_NCHW.device.type, enabled=False):
            wide = torch.promote_types(self.quant_conv.weight.dtype, torch.float32)
            h = _widened(self.encoder, pixels_NCHW.to(wide))
            z = _widened(self.quant_conv, h).permute(0, 2, 3, 1)
        if self.config.unit_codes:
            z = F.normalize(z, dim=-1)
        return self.quantize.nearest(z.flatten(0, 2)).view(z.shape[:3])

    def decode(self, codes_NHW: Tensor) -> Tensor:
        """Codes -> pictures, about [-1, 1], not clamped.

        Raises:
            IntermodalError: the checkpoint carries no decoder.
        """
        return self.decode_latents(F.embedding(codes_NHW, self.quantize.table()).permute(0, 3, 1, 2))

    def decode_latents(self, z_NDHW: Tensor) -> Tensor:
        if self.decoder is None:
            raise IntermodalError(
                "this VQ-VAE came without a decoder (Hugging Face's Chameleon files have none): it reads pictures and cannot draw; "
                "load the authors' vqgan.ckpt, or train one"
            )
        return self.decoder(self.post_quant_conv(z_NDHW))

    def forward(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures -> (reconstructions, codes (N, h, w), quantisation loss)."""
        z, codes, loss = self.quantize(self.latents(pixels_NCHW))
        return self.decode_latents(z), codes, loss


@torch.no_grad()
def initialise(model: VQVAE, seed: int = 0) -> VQVAE:
    """Starting weights, the same for a seed on every machine: convolutions by fan-in, the last of a residual block small, codes
    uniform within 1 / codes (as the authors) or on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            small = 0.1 if name.endswith(("conv2", "proj_out")) else 1.0
            module.weight.copy_(torch.empty(module.weight.shape).normal_(0, small * fan**-0.5, generator=generator))
            assert module.bias is not None
            module.bias.zero_()
        elif isinstance(module, nn.GroupNorm):
            module.weight.fill_(1)
            module.bias.zero_()
    weight = model.quantize.embedding.weight
    drawn = torch.empty(weight.shape)
    if model.config.unit_codes:
        weight.copy_(F.normalize(drawn.normal_(0, 1, generator=generator), dim=-1))
    else:
        weight.copy_(drawn.uniform_(-1 / len(weight), 1 / len(weight), generator=generator))
    return model
