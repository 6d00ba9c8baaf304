"""Training a VQ-VAE: pictures in, reconstructions and a codebook that is used."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..data.loader import PictureFetcher
from ..data.readers import open_source
from ..data.source import Reject
from ..errors import IntermodalError
from ..inputs.image import BICUBIC, HALF, ImageProcessor
from ..models.vqvae import VQVAE, initialise
from ..nn.layers import at_least_float32
from ..parallel.setup import World, start
from ..weights.load import load, save
from .loop import Trainer
from .optim import optimizer_for
from .recipe import AdversarialConfig, CodebookConfig, VQRecipe
from .stages import sum_gradients
from .vq_terms import PatchCritic, Perceptual, balance, entropy_term


def train_vqvae(
    recipe: VQRecipe, run: str | Path, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> VQVAE:
    """Train a recipe into the folder `run`; returns the trained model, which is also in `run/model`.

    Raises:
        IntermodalError: as `train.contrastive.train`.
    """
    world = start()
    return VQTrainer(recipe, Path(run), world, resume, console or Console(), quiet or not world.main).run()


@dataclass
class Pictures:
    """Prepared pictures of a step on one rank: (N, C, side, side) in [-1, 1]."""

    pixels: Tensor
    keys: list[str]
    rejects: list[Reject] = field(default_factory=list)

    @property
    def read(self) -> int:
        return len(self.pixels)


class PixelFetcher(PictureFetcher):
    """References to pictures alone."""

    pictures: ImageProcessor

    def __getitem__(self, references):
        begin, wanted = references
        rejects: list[Reject] = []
        found = [
            self._usable(which, at, random.Random(f"{self.seed}/pick/{begin + offset}"), rejects)
            for offset, (which, at) in enumerate(wanted)
        ]
        return Pictures(self.pictures([image for _, image in found]).pixels, [sample.key for sample, _ in found], rejects)


class CodebookState(nn.Module):
    """What the codebook remembers from step to step: exponential averages, and how long each code has been idle."""

    counts: Tensor
    sums: Tensor
    idle: Tensor

    def __init__(self, codes: int, width: int, config: CodebookConfig):
        super().__init__()
        self.config = config
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, width))
        # at first every code counts as idle: the first step fills the table with latents of its pictures
        self.register_buffer("idle", torch.full((codes,), config.revive or 0, dtype=torch.long))

    @torch.no_grad()
    def update(self, vq: VQVAE, z_TD: Tensor, ids_T: Tensor, world: World) -> tuple[Tensor, int]:
        """Count the step's codes, move the averages, and give idle codes a latent of this step. Returns (counts, revived)."""
        table = vq.quantize.embedding.weight
        counts = torch.bincount(ids_T, minlength=len(table)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, ids_T, z_TD)
        if world.size > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        if self.config.ema is not None:
            decay = self.config.ema
            self.counts.mul_(decay).add_(counts, alpha=1 - decay)
            self.sums.mul_(decay).add_(sums, alpha=1 - decay)
            known = self.counts > 1e-5
            moved = self.sums / self.counts.clamp(min=1e-5)[:, None]
            table.copy_(torch.where(known[:, None], F.normalize(moved, dim=-1) if vq.config.unit_codes else moved, table))
        self.idle.add_(1).mul_(counts == 0)
        if self.config.revive is None:
            return counts, 0
        dead = (self.idle >= self.config.revive).nonzero().squeeze(1)
        if len(dead):
            fresh = z_TD[torch.randint(len(z_TD), (len(dead),), device="cpu").to(z_TD.device)]
            if world.size > 1:
                dist.broadcast(fresh, 0)
            table[dead], self.sums[dead], self.counts[dead], self.idle[dead] = fresh, fresh, 1.0, 0
        return counts, len(dead)


class VQTraining(nn.Module):
    """The model, its codebook's memory and its critic, saved together in checkpoints."""

    def __init__(self, vq: VQVAE, config: CodebookConfig, adversarial: AdversarialConfig):
        super().__init__()
        self.vq, self.codebook = vq, CodebookState(vq.config.codes, vq.config.code_width, config)
        with torch.random.fork_rng(devices=()):  # until the critic begins, a run is the same as without one
            self.critic = PatchCritic(adversarial) if adversarial.weight else None


class VQTrainer(Trainer):
    model: VQTraining
    recipe: VQRecipe

    def _set_up(self) -> None:
        recipe, data = self.recipe, self.recipe.data
        if recipe.train.parallel != "ddp":
            raise IntermodalError("a VQ-VAE is small and stays whole on every rank: train.parallel=ddp")
        if recipe.start is not None:
            vq = load(recipe.start)
        else:
            vq = initialise(VQVAE(recipe.model), recipe.train.seed)
        self.model = VQTraining(vq, recipe.codebook, recipe.adversarial).to(self.world.device, self.dtype).train()
        self.perceptual = Perceptual(recipe.train.perceptual, self.world.device, self.dtype) if recipe.train.perceptual else None
        if recipe.codebook.ema is not None:
            vq.quantize.embedding.weight.requires_grad_(False)
            beta = recipe.model.beta  # the averages move the codes: only the commitment is left of the loss
            vq.config = vq.quantize.config = replace(vq.config, beta_on="commitment", beta=beta)
        vq.encoder.checkpoint_activations = recipe.train.checkpoint_activations
        if vq.decoder is not None:
            vq.decoder.checkpoint_activations = recipe.train.checkpoint_activations
        self.optimizer = optimizer_for(self.model, recipe.optim, recipe.train.precision)
        side = recipe.model.resolution
        sources = [open_source(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in data.train]
        pictures = ImageProcessor(side, (side, side), resample=BICUBIC, mean=HALF, std=HALF)
        self.loader = self._loader(sources, PixelFetcher(sources, pictures, data.seed, data.crop_scale))
        self.used = torch.zeros(recipe.model.codes, device=self.world.device)
        """Counts since the last logged step."""
        self.revived = 0
        self.alarmed = False

    def _train_step(self, fetched: Pictures, logging: bool) -> dict[str, Any]:
        recipe, vq = self.recipe, self.model.vq
        pixels = fetched.pixels.to(self.world.device, self.dtype)
        with self.autocast():
            latents = at_least_float32(vq.latents(pixels))
            z, ids, quantisation = vq.quantize(latents)
            drawn = at_least_float32(vq.decode_latents(z))
        error = F.l1_loss(drawn, pixels) if recipe.train.reconstruction == "l1" else F.mse_loss(drawn, pixels)
        terms: dict[str, Tensor] = {}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(drawn, pixels)
            error = error + recipe.train.perceptual_weight * terms["perceptual"]
        loss = error + recipe.train.quantisation * quantisation
        if recipe.codebook.entropy:
            loss = loss + recipe.codebook.entropy * entropy_term(latents, vq)
        if self.model.critic is not None and self.step >= recipe.adversarial.start:
            loss = loss + self._adversarial(self.model.critic, drawn, pixels, error, terms)
        self._check_finite(loss.detach(), fetched)
        (loss / self.world.size).backward()
        sum_gradients(self.model, self.world)
        rate, norm = self._update(fetched.keys)
        flat = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
        flat = F.normalize(flat, dim=-1) if vq.config.unit_codes else flat
        counts, revived = self.model.codebook.update(vq, flat, ids.flatten(), self.world)
        self.used += counts
        self.revived += revived
        if not logging:
            return {}
        mse = self.world.sum(F.mse_loss(drawn.detach().clamp(-1, 1), pixels)) / self.world.size
        shares = self.used / self.used.sum()
        perplexity = torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()).item()
        use = (self.used > 0).float().mean().item()
        values = {
            "loss": (self.world.sum(loss.detach()) / self.world.size).item(),
            "psnr": psnr(mse.item()),
            "quantisation": quantisation.item(),
            "codebook_use": use,
            "perplexity": perplexity,
            "revived": self.revived,
            "lr": rate,
            "gradient_norm": norm.item(),
            **{name: value.item() for name, value in terms.items()},  # of this rank
        }
        if perplexity < recipe.codebook.alarm * recipe.model.codes and self.step > recipe.optim.warmup and not self.alarmed:
            self.alarmed = True
            if self.world.main:
                self.console.print(
                    f"[yellow]the codebook collapses: perplexity {perplexity:.1f} of {recipe.model.codes} codes; try codebook.ema, "
                    f"codebook.revive, model.unit_codes or codebook.entropy[/yellow]"
                )
        self.used.zero_()
        self.revived = 0
        return values

    def _adversarial(self, critic: PatchCritic, drawn: Tensor, pixels: Tensor, error: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The painter's term and the critic's loss together: neither's gradient reaches the other's weights."""
        decoder = self.model.vq.decoder
        assert decoder is not None
        fooled, apart = critic.fooled(drawn), critic.told_apart(drawn, pixels)
        terms |= {"fooled": fooled.detach(), "told_apart": apart.detach()}
        return self.recipe.adversarial.weight * balance(error, fooled, decoder.conv_out.weight) * fooled + apart

    def _note(self, values: dict[str, Any]) -> str:
        return (
            f"{values['samples_per_second']:.0f} img/s  loss {values['loss']:.3f}  PSNR {values['psnr']:.1f} dB  "
            f"codes used {values['codebook_use']:.0%}"
        )

    def _finish(self) -> VQVAE:
        vq = self.model.vq
        if self.average is not None:
            self.model.load_state_dict({**self.model.state_dict(), **self.average})
        vq.float().eval()
        if self.world.main:
            save(vq, self.folder / "model")
        return vq


def psnr(mse: float) -> float:
    """Decibels of a mean squared error of pictures in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-12))
