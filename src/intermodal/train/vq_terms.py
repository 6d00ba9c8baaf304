"""Optional terms of a VQ-VAE's loss: sure and even use of the codes, likeness to a trained eye, and a critic of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..batch import Images
from ..errors import IntermodalError
from ..models.clip import DualEncoder
from ..models.vit import ClipVisionTower, SiglipVisionTower
from ..models.vqvae import VQVAE
from ..parallel.setup import World
from ..weights.load import load
from .recipe import AdversarialConfig


def entropy_term(latents_NDHW: Tensor, vq: VQVAE, temperature: float = 0.01, world: World | None = None) -> Tensor:
    """How unsure each latent is of its code, minus how evenly codes are used on the whole: to be made small (MAGVIT-2, section 3).

    Over several ranks, with equal shares of the latents, the mean of its values and gradients is that of one rank that has them all.
    """
    z = latents_NDHW.permute(0, 2, 3, 1).flatten(0, 2)
    z = F.normalize(z, dim=-1) if vq.config.unit_codes else z
    chances = (-(torch.cdist(z, vq.quantize.table()) ** 2) / temperature).softmax(-1)
    each = -(chances * chances.clamp(min=1e-8).log()).sum(-1).mean()
    mean = chances.mean(0)
    if world is not None and world.size > 1:  # the value of all ranks', with the gradient of this one's part in it
        mean = mean + (world.sum(mean) / world.size - mean).detach()
    return each + (mean * mean.clamp(min=1e-8).log()).sum()


class Perceptual:
    """How unlike two pictures look to a trained tower: the mean squared distance of its unit-length states, over all its layers.

    LPIPS (Zhang et al. 2018) in form, with a CLIP or SigLIP tower in the place of VGG, whose weights this project could not ship.
    """

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype = torch.float32):
        """Raises IntermodalError: `source` is no CLIP or SigLIP of a fixed size."""
        model = load(source)
        tower = model.vision if isinstance(model, DualEncoder) else None
        if type(tower) not in (ClipVisionTower, SiglipVisionTower):
            raise IntermodalError(f"train.perceptual={source} is a {type(model).__name__}; a CLIP or a fixed-size SigLIP is wanted")
        assert isinstance(tower, ClipVisionTower | SiglipVisionTower)
        assert model.processor is not None
        self.tower = tower.to(device, dtype).requires_grad_(False)
        pictures = model.processor.images
        # from [-1, 1] to what the tower was trained on
        mean, std = (torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1) for values in (pictures.mean, pictures.std))
        self.scale, self.shift = 0.5 / std, (0.5 - mean) / std

    def __call__(self, drawn_NCHW: Tensor, real_NCHW: Tensor) -> Tensor:
        """Both (N, 3, side, side) in [-1, 1]; gradients flow to `drawn_NCHW` alone."""
        ours, theirs = self._states(drawn_NCHW), self._states(real_NCHW.detach())
        return torch.stack([(a - b).square().sum(-1).mean() for a, b in zip(ours, theirs, strict=True)]).mean()

    def _states(self, pixels_NCHW: Tensor) -> list[Tensor]:
        side = self.tower.config.image_size
        if pixels_NCHW.shape[-1] != side:
            pixels_NCHW = F.interpolate(pixels_NCHW, size=(side, side), mode="bilinear", antialias=True)
        x_TD, segments = self.tower.tokens(Images(pixels_NCHW * self.scale + self.shift))
        states = []
        for layer in self.tower.encoder.layers:
            x_TD = layer(x_TD, segments)
            states.append(F.normalize(x_TD, dim=-1))
        return states


class PatchCritic(nn.Module):
    """(N, 3, side, side) -> (N, 1, h, w): how real each patch looks (pix2pix, section 3.2.2; VQGAN, section 3.1).

    GroupNorm in the place of BatchNorm, so that nothing depends on how a step is split over ranks.
    """

    def __init__(self, config: AdversarialConfig):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, config.width, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = config.width
        for _ in range(config.layers - 1):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, 1, 1))

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        return self.body(pixels_NCHW)

    def fooled(self, drawn_NCHW: Tensor) -> Tensor:
        """The painter's loss: gradients reach the pixels and not the critic."""
        return -functional_call(self, {name: p.detach() for name, p in self.named_parameters()}, (drawn_NCHW,)).mean()

    def told_apart(self, drawn_NCHW: Tensor, real_NCHW: Tensor) -> Tensor:
        """The critic's hinge loss: gradients reach the critic and not the pixels."""
        real, drawn = self(real_NCHW.detach()), self(drawn_NCHW.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + drawn).mean())


def balance(likeness: Tensor, fooled: Tensor, last: Tensor, most: float = 1e4, world: World | None = None) -> Tensor:
    """What to multiply the painter's loss with, so that it pulls at the decoder's last layer as hard as the likeness (VQGAN, eq. 7). It is
    measured by the gradients of all ranks' pictures, and the same on every rank."""
    (wanted,), (given,) = (torch.autograd.grad(loss, last, retain_graph=True) for loss in (likeness, fooled))
    if world is not None:
        wanted, given = (world.sum(gradient) / world.size for gradient in (wanted, given))
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(0, most).detach()
