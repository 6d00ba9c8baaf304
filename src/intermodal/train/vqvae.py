"""Training a VQ-VAE: pictures in, reconstructions and a codebook that is used."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..config import SettingError, validated
from ..data.loader import Loader, Mixture, PictureFetcher, Rejects
from ..data.readers import open_source
from ..data.source import Reject, Source
from ..data.sprites import HELD_OUT_STYLE
from ..data.stream import StreamSource
from ..errors import IntermodalError
from ..inputs.image import BICUBIC, HALF, ImageProcessor
from ..models.vqvae import VQVAE, VQConfig, initialise
from ..nn.layers import at_least_float32
from ..parallel.setup import start
from ..weights.load import load, save
from .codebook import CodebookState, codebook_use
from .loop import Trainer
from .optim import optimizer_for
from .ranks import sum_gradients
from .recipe import VQRecipe
from .vq_terms import PatchCritic, Perceptual, balance, entropy_term

HELD_OUT_BATCHES = 16
"""How many batches of pictures never trained on are measured at the end, over all their sources."""
UNSEEN = {"scenes": "split=test", "sprites": f'styles=["{HELD_OUT_STYLE}"]', "signs": "fonts=test"}
"""The setting that makes the test side of a drawn source of it."""


def train_vqvae(
    recipe: VQRecipe, run: str | Path, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> VQVAE:
    """Train a recipe into the folder `run`; returns the trained model, which is also in `run/model`. What its codes keep of pictures that
    were never trained on is in `run/held_out.json`.

    Raises:
        SettingError: as `checked_settings`.
        IntermodalError: as `train.contrastive.train`.
    """
    recipe, world = checked_settings(recipe), start()
    return VQTrainer(recipe, Path(run), world, resume, console or Console(), quiet or not world.main).run()


def checked_settings(recipe: VQRecipe) -> VQRecipe:
    """The recipe, its values of their types, in their ranges, and such that they go together.

    Raises:
        SettingError: names the field that is not, and what it may be.
    """
    recipe = validated(recipe)
    config, critic = recipe.model, recipe.adversarial
    if recipe.start is None:  # else the shape is that of the model that is gone on with
        try:
            config.check()
        except IntermodalError as error:
            raise SettingError(f"model.{error}") from None
        if config.channels != 3:
            raise SettingError(f"model.channels={config.channels}: pictures have 3")
        if not config.decoder:
            raise SettingError("model.decoder=false: a VQ-VAE is trained by its reconstructions, which a decoder makes")
        if set(config.attention) - set(config.sides):
            sides = ", ".join(map(str, config.sides))
            raise SettingError(f"model.attention={list(config.attention)}: the levels have sides of {sides} pixels, and no others")
        _check_side(config.resolution, config)
    if critic.layers > 1 and critic.width % 4:
        raise SettingError(f"adversarial.width={critic.width} is not a multiple of 4, which the critic's norms need")
    if config.resolution < 2**critic.layers:
        most = config.resolution.bit_length() - 1
        raise SettingError(
            f"adversarial.layers={critic.layers}: {config.resolution} pixels can be halved {most} times, not more often"
        )
    return recipe


def _check_side(side: int, config: VQConfig) -> None:
    if side % config.shrink:
        raise SettingError(
            f"model.resolution={side} is not a multiple of {config.shrink}, the pixels of a side that one code stands for "
            f"(stem={config.stem}, halved between {len(config.multipliers)} levels)"
        )


def unseen(specs: Sequence[str]) -> tuple[str, ...]:
    """The test sides of those sources that are drawn; a source that is one already has no other."""
    out = []
    for spec in specs:
        setting = UNSEEN.get(spec.partition("?")[0].partition(":")[0])
        if setting and setting not in spec:
            out.append(f"{spec}{'&' if '?' in spec else '?'}{setting}")
    return tuple(out)


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

    captioned = False
    pictures: ImageProcessor

    def __getitem__(self, references):
        begin, wanted = references
        rejects: list[Reject] = []
        found = [
            self._usable(which, at, random.Random(f"{self.seed}/pick/{begin + offset}"), rejects)
            for offset, (which, at) in enumerate(wanted)
        ]
        return Pictures(self.pictures([image for _, image in found]).pixels, [sample.key for sample, _ in found], rejects)


class VQTraining(nn.Module):
    """The model, its codebook's memory and its critic, saved together in checkpoints."""

    def __init__(self, vq: VQVAE, recipe: VQRecipe):
        super().__init__()
        codes, width, loaded = vq.config.codes, vq.config.code_width, recipe.start is not None
        self.vq, self.codebook, self.critic = vq, CodebookState(codes, width, recipe.codebook, loaded), None
        if recipe.adversarial.weight:
            with torch.random.fork_rng(devices=()):  # until the critic begins, a run is the same as without one
                torch.default_generator.manual_seed(recipe.train.seed)  # each rank's own state would make it a critic of its own
                self.critic = PatchCritic(recipe.adversarial)


class VQTrainer(Trainer):
    model: VQTraining
    recipe: VQRecipe
    judged = "reconstruction_error"  # the loss jumps where the critic begins, and is below zero with an entropy term

    def _set_up(self) -> None:
        recipe, data = self.recipe, self.recipe.data
        if recipe.train.parallel != "ddp":
            raise IntermodalError("a VQ-VAE is small and stays whole on every rank: train.parallel=ddp")
        vq = _begun(recipe)
        side = recipe.model.resolution
        vq.config = vq.quantize.config = at_side(vq.config, side)
        self.model = VQTraining(vq, recipe).to(self.world.device, self.dtype).train()
        self.perceptual = Perceptual(recipe.train.perceptual, self.world.device, self.dtype) if recipe.train.perceptual else None
        if recipe.codebook.ema is not None:
            vq.quantize.embedding.weight.requires_grad_(False)
            # the averages move the codes: only the commitment is left of the loss
            vq.config = vq.quantize.config = replace(vq.config, beta_on="commitment")
        vq.encoder.checkpoint_activations = recipe.train.checkpoint_activations
        if vq.decoder is not None:
            vq.decoder.checkpoint_activations = recipe.train.checkpoint_activations
        self.optimizer = optimizer_for(self.model, recipe.optim, recipe.train.precision)
        sources = [open_source(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in data.train]
        self.pictures = ImageProcessor(side, (side, side), resample=BICUBIC, mean=HALF, std=HALF)
        self.loader = self._loader(sources, PixelFetcher(sources, self.pictures, data.seed, data.crop_scale))
        names = unseen(data.train) if recipe.held_out is None else recipe.held_out
        self.held_out = {spec: open_source(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in names}
        self.used = torch.zeros(vq.config.codes, device=self.world.device)
        """Counts since the last logged step."""
        self.revived = 0
        self.told_of_collapse = False

    def _fixed(self, name: str) -> bool:
        """The model is the run's own from its first step on."""
        return super()._fixed(name) or name.startswith("model.")

    def _counted(self) -> dict[str, Any]:
        return {"used": self.used.long().tolist(), "revived": self.revived}

    def _count_on(self, counted: dict[str, Any]) -> None:
        self.used.copy_(torch.tensor(counted.get("used", [0]), dtype=self.used.dtype))
        self.revived = counted.get("revived", 0)

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
        if recipe.codebook.ema is not None:
            # the averages move the codes, so the codebook's term has no gradient: it is no part of what is learned by. Its value is the
            # commitment's without beta
            quantisation = quantisation - quantisation.detach() / (1 + vq.config.beta)
        loss = error + recipe.train.quantisation * quantisation
        if recipe.codebook.entropy:
            loss = loss + recipe.codebook.entropy * entropy_term(latents, vq, world=self.world)
        if self.model.critic is not None and self.step >= recipe.adversarial.start:
            loss = loss + self._adversarial(self.model.critic, drawn, pixels, error, terms)
        self._check_finite(loss.detach(), fetched.keys)
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
        terms |= {"loss": loss, "quantisation": quantisation, "reconstruction_error": error}
        terms["mse"] = F.mse_loss(drawn.detach().clamp(-1, 1), pixels)
        means = {name: (self.world.sum(value) / self.world.size).item() for name, value in terms.items()}
        return {**self._codes_used(), "psnr": psnr(means.pop("mse")), "lr": rate, "gradient_norm": norm.item(), **means}

    def _codes_used(self) -> dict[str, Any]:
        """How the codes were used since the last logged step, and whether it is time to tell of a collapse; counting begins anew."""
        codes, settings = len(self.used), self.recipe.codebook
        use, perplexity = codebook_use(self.used)
        values = {"codebook_use": use, "perplexity": perplexity, "revived": self.revived}
        if perplexity < settings.alarm * codes and self.step > self.recipe.optim.warmup and not self.told_of_collapse:
            self.told_of_collapse = True
            if self.world.main:
                self._warn(
                    f"the codebook collapses: perplexity {perplexity:.1f} of {codes} codes; try codebook.ema, codebook.revive, "
                    f"model.unit_codes or codebook.entropy"
                )
        self._count_on({})
        return values

    def _adversarial(self, critic: PatchCritic, drawn: Tensor, pixels: Tensor, error: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The painter's term and the critic's loss together: neither's gradient reaches the other's weights."""
        decoder = self.model.vq.decoder
        assert decoder is not None
        fooled, apart = critic.fooled(drawn), critic.told_apart(drawn, pixels)
        terms |= {"fooled": fooled.detach(), "told_apart": apart.detach()}
        pull = balance(error, fooled, decoder.conv_out.weight, world=self.world)
        return self.recipe.adversarial.weight * pull * fooled + apart

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
            try:
                self._measure(vq)
            except IntermodalError as error:  # the model is trained and kept, whatever the pictures are
                self._warn(f"the held-out pictures cannot be measured: {error}")
        return vq

    def _measure(self, vq: VQVAE) -> None:
        """Measure pictures that were never trained on, source by source and together, and keep it in `held_out.json`."""
        found = {spec: self._kept(vq, source) for spec, source in self.held_out.items()}
        if not found:
            if not self.quiet:
                self.console.print(
                    "nothing is held out, so the PSNR is that of the training pictures: held_out='[\"FOLDER\"]' measures others"
                )
            return
        rows = {spec: kept.row() for spec, kept in found.items()}
        together = sum(found.values(), Kept()).row()
        (self.folder / "held_out.json").write_text(json.dumps({**together, "sources": rows}, indent=2) + "\n")
        if not self.quiet:
            parts = "; ".join(f"{spec}: {row['psnr']:.1f} dB" for spec, row in rows.items())
            self.console.print(
                f"{together['pictures']} held-out pictures: PSNR {together['psnr']:.1f} dB, codes used {together['codebook_use']:.0%}, "
                f"perplexity {together['perplexity']:.0f} ({parts})",
                markup=False,
            )

    @torch.no_grad()
    def _kept(self, vq: VQVAE, source: Source | StreamSource) -> Kept:
        """Look at a source's share of the held-out batches."""
        data = self.recipe.data
        batch, batches = data.batch, -(-HELD_OUT_BATCHES // len(self.held_out))
        if not isinstance(source, StreamSource):
            batch = min(batch, len(source))
            batches = min(batches, len(source) // batch)
        fetcher = PixelFetcher([source], self.pictures, data.seed, None)
        rejects = Rejects(None, data.max_reject_share)
        loader = iter(Loader(Mixture([source], None, data.seed), fetcher, batch=batch, workers=0, rejects=rejects))
        kept = Kept()
        for _, fetched in zip(range(batches), loader, strict=False):
            pixels = fetched.pixels.to(self.world.device)
            drawn, ids, _ = vq(pixels)
            error = (drawn.clamp(-1, 1) - pixels).double().square().sum().item()
            kept += Kept(len(pixels), pixels.numel(), error, torch.bincount(ids.flatten(), minlength=vq.config.codes).double())
        return kept


@dataclass(frozen=True)
class Kept:
    """What codes keep of pictures, as sums that can be added up."""

    pictures: int = 0
    values: int = 0
    """Numbers that the pictures are made of, three a pixel."""
    error: float = 0.0
    """Of the reconstructions: the sum of squares, in pixels from -1 to 1."""
    counts: Tensor | float = 0.0
    """(codes,) how often each code came."""

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.pictures + other.pictures, self.values + other.values, self.error + other.error, self.counts + other.counts
        )

    def row(self) -> dict[str, float]:
        assert isinstance(self.counts, Tensor)
        use, perplexity = codebook_use(self.counts)
        return {"pictures": self.pictures, "psnr": psnr(self.error / self.values), "codebook_use": use, "perplexity": perplexity}


def _begun(recipe: VQRecipe) -> VQVAE:
    """The model as it is before the first step.

    Raises:
        SettingError: what `start` names cannot be trained, or not on pictures of this side.
    """
    if recipe.start is None:
        return initialise(VQVAE(recipe.model), recipe.train.seed)
    vq = load(recipe.start)
    if not isinstance(vq, VQVAE):
        raise SettingError(f"start={recipe.start} is a {type(vq).__name__}; a VQ-VAE is wanted")
    if vq.decoder is None:
        raise SettingError(f"start={recipe.start} has no decoder, and a VQ-VAE is trained by its reconstructions")
    _check_side(recipe.model.resolution, vq.config)
    return vq


def at_side(config: VQConfig, side: int) -> VQConfig:
    """The same model for pictures of another side: its levels with attention have other sides then. As it is for those of its own."""
    if side == config.resolution:
        return config
    other = replace(config, resolution=side)
    moved = dict(zip(config.sides, other.sides, strict=True))
    return replace(other, attention=tuple(moved[level] for level in config.attention if level in moved))


def psnr(mse: float) -> float:
    """Decibels of a mean squared error of pictures in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-12))
