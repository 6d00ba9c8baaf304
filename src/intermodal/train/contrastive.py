"""Training CLIP and SigLIP: pairs in, one loss over all pairs of the step on all ranks."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..batch import PairBatch
from ..config import SettingError, validated
from ..data.loader import Fetched, Fetcher, Loader, Mixture
from ..data.readers import open_source
from ..data.source import Sample, Source
from ..data.stream import StreamSource
from ..errors import IntermodalError, SampleError
from ..inputs import text as texts
from ..inputs.image import CLIP_DEFAULTS, ImageProcessor, NaflexProcessor
from ..inputs.processor import PairProcessor
from ..losses import sigmoid_loss, softmax_loss
from ..models.clip import CLIP, DualConfig, DualEncoder, Embeddings, SigLIP, initialise
from ..nn.layers import Encoder, at_least_float32
from ..parallel.setup import reduce_gradients, start, sync_scalars, whole_state, wrap
from ..weights.hub import tokenizer_folder
from ..weights.load import layout_of, other_layout
from ..weights.load import load_encoder as load_model
from ..weights.load import save as save_model
from ..weights.open_clip_config import clean_as_saved
from .gradcache import backward_in_parts
from .loop import Trainer
from .optim import optimizer_for
from .recipe import ModelConfig, Recipe

CAPTIONS_LOOKED_AT, CUT_SHARE = 512, 0.02
"""How many captions are looked at before a run, and the share of cut ones that is worth a word."""


def train(
    recipe: Recipe, run: str | Path, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> DualEncoder:
    """Train a recipe into the folder `run`; returns the trained model (whole, on its device, in eval mode).

    The folder holds `recipe.json`, `metrics.jsonl`, `rejects.jsonl`, `checkpoints/` and, at the end, `model/`: a Hugging Face directory,
    or open_clip's for a CLIP with a bias.

    Args:
        resume: go on from the newest checkpoint in `run`, bit for bit where the number of ranks is the same.

    Raises:
        SettingError: as `checked_settings`.
        IntermodalError: the folder holds another run and `resume` is off, or one that began with another model or loss and it is on; the
            data cannot be read, the loss is not finite, or the run was interrupted (after saving).
    """
    recipe, world = checked_settings(recipe), start()
    trainer = PairTrainer(recipe, Path(run), world, resume, console or Console(), quiet or not world.main)
    return trainer.run()


def checked_settings(recipe: Recipe) -> Recipe:
    """The recipe, its values of their types and such that they go together.

    Raises:
        SettingError: names the field.
    """
    recipe = validated(recipe)
    if recipe.data.batch < 2:
        raise SettingError("data.batch=1: a pair is told from the other pairs of its step, so there have to be some")
    if recipe.model.start is None:
        for name, tower in (("vision", recipe.model.vision), ("text", recipe.model.text)):
            try:
                tower.check()
            except IntermodalError as error:
                raise SettingError(f"model.{name}: {error}") from None
    return recipe


def build_model(config: ModelConfig, captions: Callable[[], list[str]], loss: str = "softmax") -> DualEncoder:
    """The model a recipe asks for, with its processor: loaded, or fresh with a tokenizer of its own or counted from `captions()`.

    With the sigmoid loss a CLIP has a bias (open_clip's `--siglip`). transformers has no such model, so it is kept in open_clip's layout.

    Raises:
        IntermodalError: no model or tokenizer where the recipe says; a CLIP with a bias whose settings open_clip's config cannot say.
    """
    model = _fresh_model(config, captions, loss) if config.start is None else load_model(config.start)
    if model.processor is None or model.processor.tokenizer is None:
        raise IntermodalError(f"model.start={config.start} came without tokenizer files: put them beside its weights")
    if isinstance(model, CLIP) and loss == "sigmoid":
        if model.logit_bias is None:
            model.add_bias(config.init_scale or 10.0, config.init_bias)
        clean_as_saved(model)
    return model


def _fresh_model(config: ModelConfig, captions: Callable[[], list[str]], loss: str) -> DualEncoder:
    vision, text = config.vision, config.text
    family = "clip" if config.family == "clip" else "siglip"
    if config.tokenizer is not None:
        folder = tokenizer_folder(config.tokenizer)
        tokenizer = texts.from_folder(folder, config.family, context=text.context, eos_id=text.eos_id, pad_id=text.pad_id)
        if tokenizer is None:
            raise IntermodalError(
                f"model.tokenizer={config.tokenizer} holds no tokenizer files ({', '.join(texts.TOKENIZER_FILES[:3])}, ...)"
            )
        tokenizer = texts.borrowed(tokenizer, config.family)
    else:
        tokenizer = texts.fresh(texts.train_tokenizer(captions(), config.vocabulary), family, context=text.context)
    size, eos = tokenizer.vocabulary_size, tokenizer.eos_id
    text = replace(text, vocab_size=size, eos_id=eos, pad_id=tokenizer.pad_id, bos_id=min(text.bos_id, size - 1))
    scale = config.init_scale or (1 / 0.07 if family == "clip" and loss == "softmax" else 10.0)
    if family == "clip":
        dual = DualConfig(vision, text, config.embed_width, init_scale=scale)
        model: DualEncoder = CLIP(replace(dual, with_bias=loss == "sigmoid", init_bias=config.init_bias))
        pictures: ImageProcessor | NaflexProcessor = ImageProcessor.from_hf(
            {"size": {"shortest_edge": vision.image_size}, "crop_size": vision.image_size}, CLIP_DEFAULTS
        )
    else:
        naflex = config.family == "siglip2"
        model = SigLIP(DualConfig(vision, text, vision.width, naflex=naflex, init_scale=scale, init_bias=config.init_bias))
        pictures = ImageProcessor((vision.image_size, vision.image_size))
        if naflex:
            pictures = NaflexProcessor(vision.patch_size, config.max_patches)
    model.processor = PairProcessor(pictures, tokenizer, config.family)
    return model


def sample_captions(sources: Sequence[Source | StreamSource], weights: Sequence[float] | None, count: int, seed: int) -> list[str]:
    """Captions of the first `count` samples that training will see; unusable samples are counted when the loader meets them."""
    order, out = Mixture(sources, weights, seed), []
    for _ in range(count):
        drawn = order.next()
        assert drawn is not None
        which, at = drawn
        try:
            sample = at if isinstance(at, Sample) else sources[which][at]  # pyright: ignore[reportIndexIssue]
            out += sample.texts
        except SampleError:
            continue
    return out


class PairTrainer(Trainer):
    """One contrastive run."""

    model: DualEncoder
    recipe: Recipe

    def _set_up(self) -> None:
        self.loader = self._loader_and_model()
        recipe = self.recipe
        for tower, settings in ((self.model.vision, recipe.model.vision), (self.model.text, recipe.model.text)):
            encoder = tower.get_submodule("encoder")
            assert isinstance(encoder, Encoder)
            encoder.checkpoint_activations = recipe.train.checkpoint_activations
            for block in encoder.layers:  # a loaded model has none: dropout is the run's setting, not the checkpoint's
                block.dropout = settings.dropout  # pyright: ignore[reportArgumentType]
        self.model.to(self.dtype).train()
        wrap(self.model, self.world, recipe.train.parallel)  # sharded weights go to the device part by part
        self.model.to(self.world.device)
        self.optimizer = optimizer_for(self.model, recipe.optim, recipe.train.precision)

    def _fixed(self, name: str) -> bool:
        """The model is the run's own from its first step on, but for dropout; `model.start` may have been moved. Another loss needs a
        scale, a bias and an optimizer's state of its own."""
        moved = name == "model.start" and self.recipe.model.start is not None
        return (
            super()._fixed(name)
            or name == "train.loss"
            or (name.startswith("model.") and not name.endswith(".dropout") and not moved)
        )

    def _loader_and_model(self) -> Loader:
        recipe, data = self.recipe, self.recipe.data
        side = recipe.model.vision.image_size
        sources = [open_source(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in data.train]

        def captions() -> list[str]:
            return sample_captions(sources, data.weights, recipe.model.tokenizer_samples, data.seed)

        if self.resumed_from is not None and recipe.model.start is None:
            self.model = load_model(self.folder / "initial")
        else:
            self.model = build_model(recipe.model, captions, recipe.train.loss)
            if recipe.model.start is None:
                initialise(self.model, recipe.train.seed)
                if self.world.main:
                    _save_over(self.model, self.folder / "initial")
        assert self.model.processor is not None
        if not any(isinstance(source, StreamSource) for source in sources):  # a stream would be read twice for it
            self._tell_of_cuts(sample_captions(sources, data.weights, CAPTIONS_LOOKED_AT, data.seed))
        return self._loader(sources, Fetcher(sources, self.model.processor, data.seed, data.crop_scale))

    def _tell_of_cuts(self, captions: list[str]) -> None:
        """Say so when captions do not fit the text tower's context, or the vocabulary: what is cut away or unknown cannot be learned."""
        tokenizer = self.model.processor.texts  # pyright: ignore[reportOptionalMemberAccess]
        unknown = tokenizer.unknown(captions)
        if unknown > CUT_SHARE and self.world.main:
            self._warn(
                f"{unknown:.0%} of the captions hold words that the tokenizer cannot spell"
                f"{'' if self.recipe.model.tokenizer else '; raise model.tokenizer_samples, or name a model.tokenizer'}"
            )
        cut = sum(length > tokenizer.context for length in tokenizer.lengths(captions)) / max(1, len(captions))
        if cut > CUT_SHARE and self.world.main:
            model = self.recipe.model
            advice = "raise model.text.context" if model.tokenizer else "raise model.text.context or model.vocabulary"
            self._warn(
                f"{cut:.0%} of the captions are longer than the text tower's context of {tokenizer.context} tokens and are cut"
                f"{'' if model.start else f'; {advice}'}"
            )

    def _train_step(self, fetched: Fetched, logging: bool) -> dict[str, Any]:
        """Forward, backward, update. The loss of a step is the sum over all ranks divided by the pairs of all ranks."""
        recipe, batch = self.recipe, fetched.batch.to(self.world.device)
        accuracy = chance = torch.zeros(())

        def loss(embeddings: Embeddings, whole: PairBatch) -> tuple[Tensor, Tensor]:
            nonlocal accuracy, chance
            total = self._loss(embeddings, whole)
            if logging:
                accuracy, chance = batch_accuracy(embeddings, whole)
            # gradients are averaged over ranks, so a rank's share is multiplied by their number
            return total.detach(), total / recipe.data.batch * self.world.size

        part = recipe.train.micro_batch
        if part is None or part >= len(batch):
            embeddings = self._forward(batch)
            value, objective = loss(embeddings, batch)
            self._check_finite(value, batch.keys)
            objective.backward()
        else:
            value = backward_in_parts(
                self._forward, batch, part, loss, on_part=lambda last: reduce_gradients(self.model, last), check=self._check_finite
            )
        sync_scalars(self.model, self.world)
        rate, norm = self._update(batch.keys)
        self.model.clamp_scale()
        if not logging:
            return {}
        values = {
            "loss": (self.world.sum(at_least_float32(value)) / recipe.data.batch).item(),
            "accuracy": (self.world.sum(accuracy.to(self.world.device)) / self.world.size).item(),
            "chance": (self.world.sum(chance.to(self.world.device)) / self.world.size).item(),
            "lr": rate,
            "gradient_norm": norm.item(),
            "scale": self.model.logit_scale.exp().item(),
        }
        if self.model.logit_bias is not None:
            values["bias"] = self.model.logit_bias.item()
        return values

    def _forward(self, batch: PairBatch) -> Embeddings:
        """The embeddings of a batch, or of a part of it: floats are made of no more pictures at a time than go through the towers."""
        assert self.model.processor is not None
        pictures = self.model.processor.images.normalised(batch.images)
        with self.autocast():
            return self.model(replace(batch, images=pictures))

    def _loss(self, e: Embeddings, batch: PairBatch) -> Tensor:
        options: dict[str, Any] = {"groups": batch.groups, "duplicates": self.recipe.train.duplicates, "ring": self.world.ring}
        if self.recipe.train.loss == "softmax":
            return softmax_loss(e.image, e.text, e.log_scale, **options)[0]
        assert e.bias is not None  # `build_model` gives a CLIP one
        return sigmoid_loss(e.image, e.text, e.log_scale, e.bias, **options)[0]

    def _note(self, values: dict[str, Any]) -> str:
        note = f"{values['samples_per_second']:.0f} img/s  loss {values['loss']:.3f}"
        if self.recipe.train.loss == "softmax":
            return f"{note} (chance {math.log(self.recipe.data.batch):.2f})"
        return f"{note}  right {values['accuracy']:.0%} (chance {values['chance']:.1%})"

    def _finish(self) -> DualEncoder:
        """The whole trained model on every rank, saved by the first."""
        if self.average is not None:
            self.model.load_state_dict({**self.model.state_dict(), **self.average})
        whole = _rebuilt(self.model)
        whole.load_state_dict(whole_state(self.model))
        whole.to(self.world.device).eval()
        if self.world.main:
            _save_over(whole, self.folder / "model")
        return whole


def _save_over(model: DualEncoder, folder: Path) -> None:
    """Save into a run's own folder, where an earlier run may have left a model in the other layout."""
    if other_layout(folder, layout_of(model)) is not None:
        shutil.rmtree(folder)
    save_model(model, folder)


def _rebuilt(model: DualEncoder) -> DualEncoder:
    """A plain model of the same config: FSDP changes the class of the one it wraps."""
    fresh = (CLIP if isinstance(model, CLIP) else SigLIP)(model.config)
    fresh.processor, fresh.source = model.processor, model.source
    return fresh


@torch.no_grad()
def batch_accuracy(e: Embeddings, batch: PairBatch, most: int = 512) -> tuple[Tensor, Tensor]:
    """Share of (up to `most`) pictures whose nearest text of the rank's batch says what its own says, and what a guess gets: captions
    that come several times are guessed sooner."""
    best = (e.image[:most] @ e.text.T).argmax(1)
    own = torch.arange(len(e.text), device=best.device) if batch.groups is None else batch.groups
    right = own[None] == own[: len(best), None]
    return right.gather(1, best[:, None]).float().mean(), right.float().mean()
