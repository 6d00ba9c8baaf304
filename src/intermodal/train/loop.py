"""The one training loop: batches in, a run folder out. Everything that decides the result is in the recipe and the checkpoint."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..batch import PairBatch
from ..config import to_dict
from ..data.loader import Mixture, PairLoader, Rejects
from ..data.readers import open_source
from ..data.source import Sample, Source
from ..data.stream import StreamSource
from ..errors import IntermodalError, SampleError
from ..inputs import text as texts
from ..inputs.image import CLIP_DEFAULTS, ImageProcessor, NaflexProcessor
from ..inputs.processor import PairProcessor
from ..losses import sigmoid_loss, softmax_loss
from ..models.clip import CLIP, DualConfig, DualEncoder, Embeddings, SigLIP, initialise
from ..nn.layers import Encoder
from ..parallel import checkpoint
from ..parallel.setup import World, gradient_norm, reduce_gradients, start, sync_scalars, wrap
from ..weights.load import load_encoder as load_model
from ..weights.load import save as save_model
from .gradcache import backward_in_parts
from .metrics import Display, Metrics
from .optim import adamw, learning_rate, update_average
from .recipe import ModelConfig, Recipe


class Stopped(IntermodalError):
    """The run was asked to stop, saved its state and can go on."""


class NotFinite(IntermodalError):
    """The loss became NaN or infinite."""


def train(
    recipe: Recipe, run: str | Path, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> DualEncoder:
    """Train a recipe into the folder `run`; returns the trained model (whole, on its device, in eval mode).

    The folder holds `recipe.json`, `metrics.jsonl`, `rejects.jsonl`, `checkpoints/` and, at the end, `model/`: a Hugging Face directory.

    Args:
        resume: go on from the newest checkpoint in `run`, bit for bit where the number of ranks is the same.

    Raises:
        IntermodalError: the folder holds another run and `resume` is off, the data cannot be read, the loss is not finite, or the
            run was interrupted (after saving).
    """
    world = start()
    trainer = Trainer(recipe, Path(run), world, resume, console or Console(), quiet or not world.main)
    return trainer.run()


def build_model(config: ModelConfig, captions: Callable[[], list[str]]) -> DualEncoder:
    """The model a recipe asks for, with its processor: loaded, or fresh with a tokenizer of its own or counted from `captions()`."""
    if config.start is not None:
        return load_model(config.start)
    vision, text = config.vision, config.text
    family = "clip" if config.family == "clip" else "siglip"
    if config.tokenizer is not None:
        folder = Path(config.tokenizer).expanduser()
        tokenizer = texts.from_folder(folder, config.family, context=text.context, eos_id=text.eos_id, pad_id=text.pad_id)
        if tokenizer is None:
            raise IntermodalError(
                f"model.tokenizer={folder} holds no tokenizer files ({', '.join(texts.TOKENIZER_FILES[:3])}, ...)"
            )
    else:
        tokenizer = texts.fresh(texts.train_tokenizer(captions(), config.vocabulary), family, context=text.context)
    size, eos = tokenizer.vocabulary_size, tokenizer.eos_id
    text = replace(text, vocab_size=size, eos_id=eos, pad_id=tokenizer.pad_id, bos_id=min(text.bos_id, size - 1))
    if family == "clip":
        dual = DualConfig(vision, text, config.embed_width, init_scale=config.init_scale or 1 / 0.07)
        model: DualEncoder = CLIP(dual)
        pictures: ImageProcessor | NaflexProcessor = ImageProcessor.from_hf(
            {"size": {"shortest_edge": vision.image_size}, "crop_size": vision.image_size}, CLIP_DEFAULTS
        )
    else:
        dual = DualConfig(vision, text, vision.width, naflex=config.family == "siglip2", init_scale=config.init_scale or 10.0)
        dual = replace(dual, init_bias=config.init_bias)
        model = SigLIP(dual)
        pictures = ImageProcessor((vision.image_size, vision.image_size))
        if config.family == "siglip2":
            pictures = NaflexProcessor(vision.patch_size, config.max_patches)
    model.processor = PairProcessor(pictures, tokenizer, config.family)
    return model


def sample_captions(source: Source | StreamSource, count: int, seed: int) -> list[str]:
    """Captions of `count` samples in the order training will see them; unusable samples are counted when the loader meets them."""
    order, out = Mixture([source], seed=seed), []
    for _ in range(count):
        drawn = order.next()
        assert drawn is not None
        try:
            sample = drawn[1] if isinstance(drawn[1], Sample) else source[drawn[1]]  # pyright: ignore[reportIndexIssue]
            out += sample.texts
        except SampleError:
            continue
    return out


class Trainer:
    """One run. `run()` is the loop; everything else is set-up and its parts, in the order they are used."""

    def __init__(self, recipe: Recipe, folder: Path, world: World, resume: bool, console: Console, quiet: bool):
        self.recipe, self.folder, self.world, self.console, self.quiet = recipe, folder, world, console, quiet
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.resumed_from = checkpoint.latest(folder) if resume else None
        self._claim_folder(resume)
        torch.manual_seed(recipe.train.seed * 1009 + world.rank)
        self.loader = self._loader_and_model()
        for tower, settings in ((self.model.vision, recipe.model.vision), (self.model.text, recipe.model.text)):
            encoder = tower.get_submodule("encoder")
            assert isinstance(encoder, Encoder)
            encoder.checkpoint_activations = recipe.train.checkpoint_activations
            for block in encoder.layers:  # a loaded model has none: dropout is the run's setting, not the checkpoint's
                block.dropout = settings.dropout  # pyright: ignore[reportArgumentType]
        self.model.to(world.device).train()
        wrap(self.model, world, recipe.train.parallel)
        self.optimizer = adamw(self.model, recipe.optim)
        self.average: dict[str, Tensor] | None = None
        if recipe.optim.ema is not None:
            self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.step = 0
        if self.resumed_from is not None:
            meta = checkpoint.restore(self.resumed_from, world, self.model, self.optimizer, self.average)
            self.step = meta["step"]
            self.loader.restore(meta["data"])
        self.autocast = autocast_for(recipe.train.precision, world.device)
        self.asked_to_stop: str | None = None

    def run(self) -> DualEncoder:
        recipe, steps = self.recipe, self.recipe.train.steps
        metrics = Metrics(self.folder, resumed_at=self.step) if self.world.main else None
        display = Display(self.console, recipe.name, self.step, steps, recipe.data.batch, quiet=self.quiet)
        with self._stop_signals():
            try:
                clock, since = time.perf_counter(), self.step
                batches = iter(self.loader) if self.step < steps else iter(())
                for batch in batches:
                    logging = (self.step + 1) % recipe.train.log_every == 0 or self.step + 1 == steps
                    values = self._train_step(batch.to(self.world.device), logging)
                    self.step += 1
                    if logging:
                        seconds = time.perf_counter() - clock
                        values["images_per_second"] = (self.step - since) * recipe.data.batch / seconds
                        values["rejects"] = self.loader.rejects.rejected
                        clock, since = time.perf_counter(), self.step
                        if metrics is not None:
                            metrics.write(self.step, values)
                        display.step(self.step, {**values, "kind": recipe.train.loss})
                    stop = self.world.any(self.asked_to_stop is not None)
                    every = recipe.train.save_every
                    if stop or self.step == steps or (every and self.step % every == 0):
                        self._save()
                    if stop and self.step < steps:
                        raise Stopped(
                            f"stopped at step {self.step} of {steps} ({self.asked_to_stop or 'another rank'}), saved in {self.folder}; "
                            f"go on with the same command and --resume"
                        )
                    if self.step == steps:
                        break
            finally:
                display.close()
                if metrics is not None:
                    metrics.close()
        return self._finish()

    def _train_step(self, batch: PairBatch, logging: bool) -> dict[str, Any]:
        """Forward, backward, update. The loss of a step is the sum over all ranks divided by the pairs of all ranks."""
        recipe = self.recipe
        rate = learning_rate(recipe.optim, self.step, recipe.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        accuracy = torch.zeros(())

        def loss(embeddings: Embeddings, whole: PairBatch) -> tuple[Tensor, Tensor]:
            nonlocal accuracy
            total = self._loss(embeddings, whole)
            if logging:
                accuracy = batch_accuracy(embeddings, whole)
            # gradients are averaged over ranks, so a rank's share is multiplied by their number
            return total.detach(), total / recipe.data.batch * self.world.size

        part = recipe.train.micro_batch
        if part is None or part >= len(batch):
            embeddings = self._forward(batch)
            value, objective = loss(embeddings, batch)
            self._check_finite(value, batch)
            objective.backward()
        else:
            value = backward_in_parts(
                self._forward, batch, part, loss, on_part=lambda last: reduce_gradients(self.model, last), check=self._check_finite
            )
        sync_scalars(self.model, self.world)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = gradient_norm(parameters)
        if recipe.optim.clip_norm is not None:
            shrink = (recipe.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for parameter in parameters:
                parameter.grad.mul_(shrink.to(parameter.grad.device))  # pyright: ignore[reportOptionalMemberAccess]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_scale()
        if self.average is not None and recipe.optim.ema is not None:
            update_average(self.average, self.model, recipe.optim.ema)
        if not logging:
            return {}
        values = {
            "loss": (self.world.sum(value.float()) / recipe.data.batch).item(),
            "accuracy": (self.world.sum(accuracy.to(self.world.device)) / self.world.size).item(),
            "lr": rate,
            "gradient_norm": norm.item(),
            "scale": self.model.logit_scale.exp().item(),
        }
        if self.model.logit_bias is not None:
            values["bias"] = self.model.logit_bias.item()
        return values

    def _forward(self, batch: PairBatch) -> Embeddings:
        with self.autocast():
            return self.model(batch)

    def _loss(self, e: Embeddings, batch: PairBatch) -> Tensor:
        options: dict[str, Any] = {"groups": batch.groups, "duplicates": self.recipe.train.duplicates, "ring": self.world.ring}
        if self.recipe.train.loss == "softmax":
            return softmax_loss(e.image, e.text, e.log_scale, **options)[0]
        if e.bias is None:
            raise IntermodalError("the sigmoid loss needs a bias, which a CLIP model does not have; set train.loss=softmax")
        return sigmoid_loss(e.image, e.text, e.log_scale, e.bias, **options)[0]

    def _check_finite(self, value: Tensor, batch: PairBatch) -> None:
        if self.world.any(not bool(torch.isfinite(value))):
            keys = ", ".join(batch.keys[:8])
            raise NotFinite(
                f"the loss is {value.item()} at step {self.step + 1}; this rank's samples: {keys}"
                f"{f' and {len(batch.keys) - 8} more' if len(batch.keys) > 8 else ''}. The weights before it are in the newest "
                f"checkpoint; look at the samples, lower optim.lr, or set train.precision=fp32"
            )

    def _loader_and_model(self) -> PairLoader:
        recipe, data = self.recipe, self.recipe.data
        side = recipe.model.vision.image_size
        sources = [open_source(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in data.train]

        def captions() -> list[str]:
            return sample_captions(sources[0], recipe.model.tokenizer_samples, data.seed)

        if self.resumed_from is not None and recipe.model.start is None:
            self.model = load_model(self.folder / "initial")
        else:
            self.model = build_model(recipe.model, captions)
            if recipe.model.start is None:
                initialise(self.model, recipe.train.seed)
                if self.world.main:
                    save_model(self.model, self.folder / "initial")
        assert self.model.processor is not None
        rejects = Rejects(self.folder / "rejects.jsonl" if self.world.main else None, data.max_reject_share)
        for source in sources:
            for key, reason in getattr(source, "problems", []):
                rejects.note(key, reason)
                if self.world.main:
                    self.console.print(f"[yellow]{key}: {reason}[/yellow]")
        return PairLoader(
            Mixture(sources, data.weights, data.seed),
            self.model.processor,
            batch=data.batch,
            rank=self.world.rank,
            ranks=self.world.size,
            workers=data.workers,
            prefetch=data.prefetch,
            crop_scale=data.crop_scale,
            rejects=rejects,
        )

    def _claim_folder(self, resume: bool) -> None:
        """Refuse to overwrite a run by accident; write the recipe."""
        file = self.folder / "recipe.json"
        if not resume and checkpoint.latest(self.folder) is not None:
            raise IntermodalError(f"{self.folder} already holds a run; go on with --resume, or give another --out")
        if resume and self.resumed_from is None:
            raise IntermodalError(f"{self.folder} holds no checkpoint to resume from")
        if self.world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(to_dict(self.recipe), indent=2) + "\n")
            if not resume:
                (self.folder / "rejects.jsonl").unlink(missing_ok=True)
        if self.world.size > 1:
            torch.distributed.barrier()

    def _save(self) -> None:
        meta = {"data": self.loader.state(), "recipe": to_dict(self.recipe)}
        checkpoint.save(self.folder, self.step, self.world, self.model, self.optimizer, self.average, meta, self.recipe.train.keep)

    def _finish(self) -> DualEncoder:
        """The whole trained model on every rank, saved by the first."""
        from torch.distributed.tensor import DTensor

        state = {**self.model.state_dict(), **(self.average or {})}
        state = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
        whole = _rebuilt(self.model)
        whole.load_state_dict(state)
        whole.to(self.world.device).eval()
        if self.world.main:
            save_model(whole, self.folder / "model")
        return whole

    @contextmanager
    def _stop_signals(self):
        """Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

        def ask(number: int, frame: Any) -> None:
            if self.asked_to_stop is not None:
                raise KeyboardInterrupt
            self.asked_to_stop = signal.Signals(number).name

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _rebuilt(model: DualEncoder) -> DualEncoder:
    """A plain model of the same config: FSDP changes the class of the one it wraps."""
    fresh = (CLIP if isinstance(model, CLIP) else SigLIP)(model.config)
    fresh.processor, fresh.source = model.processor, model.source
    return fresh


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """bf16 autocast or nothing. "auto" asks the processor: without bf16 instructions, bf16 products are several times slower."""
    if precision == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if fast else "fp32"
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def batch_accuracy(e: Embeddings, batch: PairBatch, most: int = 512) -> Tensor:
    """Share of (up to `most`) pictures whose nearest text of the rank's batch says what its own says."""
    best = (e.image[:most] @ e.text.T).argmax(1)
    if batch.groups is None:
        return (best == torch.arange(len(best), device=best.device)).float().mean()
    return (batch.groups[best] == batch.groups[:most]).float().mean()
