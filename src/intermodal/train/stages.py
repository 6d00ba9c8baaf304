"""Training stitched models and decoders in stages: which parts learn, on which conversations, one stage after another."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from ..batch import TokenBatch
from ..config import to_dict
from ..data.loader import ATTEMPTS, DataError
from ..data.packing import Packs, TalkFetcher
from ..data.stream import StreamSource
from ..data.talks import TalkSource, open_talks
from ..errors import IntermodalError, SampleError
from ..inputs.chat import ChatProcessor
from ..inputs.codes import CodePlanner
from ..inputs.vision_cache import DiskCache, fingerprint
from ..losses_tokens import ScoreStatistics, by_modality, next_token_losses, targets
from ..models.chameleon import Chameleon
from ..models.generative import Generative
from ..models.vqvae import VQVAE
from ..parallel import checkpoint
from ..parallel.setup import World, shard_layers, start, whole_state
from ..weights.fresh_chameleon import fresh_chameleon
from ..weights.load import codec, load, load_encoder, save
from ..weights.stitch import fresh_decoder, stitch
from . import lora
from .ahead import look_ahead, read_as, refuse_learning_tower
from .attention_scores import attention_scores
from .learning import Unreached, keep_word_rows
from .loop import Trainer
from .model_folder import copy_model, save_model
from .optim import choose_learning, optimizer_of
from .ranks import idle_conversations, in_step, sum_gradients
from .recipe import NativeConfig, Stage, StagedRecipe, StitchConfig, TalksConfig
from .resume import staged_record, stages_done, write_record


def train_stages(
    recipe: StagedRecipe, run: str | Path, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> Generative:
    """Train every stage, each in a folder of its own under `run`; returns the last stage's model, which is also in `run/model`.

    Args:
        resume: stages that are done are skipped; the one that was interrupted goes on from its newest checkpoint, bit for bit.

    Raises:
        IntermodalError: the folder holds another run and `resume` is off, or one that began with another model, has done a stage with
            other settings, or one after a stage that is not done, and it is on; a source cannot be trained on, a pattern names no
            parameter, a rate is no multiple, the loss is not finite, or the run was interrupted (after saving).
    """
    if not recipe.stages:
        raise IntermodalError("the recipe has no stages")
    world, out, console = start(), Path(run), console or Console()
    folders = [out / f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages, 1)]
    if not resume and ((out / "model").exists() or any(map(checkpoint.latest, folders))):
        raise IntermodalError(f"{out} already holds a run; go on with --resume, or give another --out")
    tell = partial(console.print, style="yellow", markup=False) if world.main and not quiet else lambda line: None
    done = stages_done(folders) if resume else []
    record = staged_record(recipe, out, folders, done, tell) if resume else to_dict(recipe)
    before: Path | None = None
    ahead = [stage for stage, folder in zip(recipe.stages, folders, strict=True) if folder not in done][1:]
    for stage, folder in zip(recipe.stages, folders, strict=True):
        if folder not in done:
            going_on = resume and checkpoint.latest(folder) is not None
            if world.main and not quiet:
                learned = ", ".join(f"{pattern} x{factor:g}" for pattern, factor in stage.learn)
                console.print(f"stage {stage.name}: {learned}", markup=False)
            trainer = StageTrainer(recipe, stage, before, folder, world, going_on, console, quiet or not world.main, ahead)
            if world.main:  # only now: what could not be gone on with is not what the run is made of
                write_record(record, out)
            trainer.run()
            ahead = []
        before = folder / "model"
    assert before is not None
    if world.main:
        write_record(record, out)
        copy_model(before, out / "model")
    return load(before)


def build_model(config: StitchConfig | NativeConfig, sources: Sequence[TalkSource | StreamSource], seed: int = 0) -> Generative:
    """The model a recipe starts from: loaded, stitched from its parts, or native; `seed` draws what is fresh in it."""
    model = _built(config, sources, seed)
    if isinstance(config, StitchConfig) and config.template is not None:
        _set_template(model, Path(config.template).expanduser())
    return model


def _set_template(model: Generative, file: Path) -> None:
    if model.processor is None:
        raise IntermodalError(f"model.template={file}: the model has no tokenizer to go with it")
    try:
        model.processor.set_template(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise IntermodalError(f"model.template={file} cannot be read: {error}") from None


def _built(config: StitchConfig | NativeConfig, sources: Sequence[TalkSource | StreamSource], seed: int) -> Generative:
    if config.start is not None:
        model = load(config.start)
        if not isinstance(model, Generative):
            raise IntermodalError(f"{config.start} is a {type(model).__name__}: it cannot be trained on conversations")
        return model
    if isinstance(config, NativeConfig):
        vq = load(config.vq)
        if not isinstance(vq, VQVAE):
            raise IntermodalError(
                f"{config.vq} is a {type(vq).__name__}; model.vq wants a VQ-VAE (intermodal train recipes/vqvae.py)"
            )
        return fresh_chameleon(config.decoder, vq, spoken(sources, config.tokenizer_samples), config.vocabulary, seed)
    vision = load_encoder(config.vision)
    if config.language is None:
        language = fresh_decoder(config.decoder, spoken(sources, config.tokenizer_samples), config.vocabulary, seed)
    else:
        language = load(config.language)
    return stitch(vision, language, layer=config.layer, anyres=config.anyres, onevision=config.onevision, seed=seed)


def spoken(sources: Sequence[TalkSource | StreamSource], count: int) -> list[str]:
    """Every text in about `count` conversations, an equal part from each source, from its beginning."""
    out: list[str] = []
    for source in sources:
        part = -(-count // len(sources))
        for index in range(part if isinstance(source, StreamSource) else min(len(source), part)):
            try:
                messages = (source.next() if isinstance(source, StreamSource) else source[index]).messages
            except SampleError:
                continue
            for message in messages:
                content = message.get("content") or []
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                out += [part["text"] for part in parts if part.get("type") == "text"]
    return out


class StageTrainer(Trainer):
    """One stage. Over several ranks weights are whole on each and gradients are summed once a step, so ranks may hold any mix of media; or
    weights are sharded, and ranks go through every pack together (`in_step`)."""

    model: Generative

    def __init__(
        self,
        whole: StagedRecipe,
        stage: Stage,
        before: Path | None,
        folder: Path,
        world: World,
        resume: bool,
        console: Console,
        quiet: bool,
        ahead: Sequence[Stage] = (),
    ):
        """`ahead` are stages to come that nobody has looked at yet."""
        self.whole, self.before, self.ahead = whole, before, ahead
        self.unreached: Unreached | None = None
        self.told_of_gradients = False
        run = replace(stage, name=f"{whole.name}/{stage.name}")
        super().__init__(run, folder, world, resume, console, quiet)

    def _set_up(self) -> None:
        data: TalksConfig = self.recipe.data
        initial = self.folder / "initial"
        if self.before is not None:
            self.model = load(self.before)
        elif self.resumed_from is not None and initial.exists():
            self.model = load(initial)
        else:
            every = [
                open_talks(spec, seed=stage.data.seed, allow_urls=stage.data.allow_urls)
                for stage in self.whole.stages
                for spec in stage.data.train
            ]
            self.model = build_model(self.whole.model, every, self.recipe.train.seed)
            if self.world.main and self.whole.model.start is None:
                save(self.model, initial)
        if self.model.processor is None:
            half = (
                f"; if saving {self.before} was cut short, remove it and resume: it is saved anew"
                if self.before is not None
                else ""
            )
            raise IntermodalError(f"the model came without a tokenizer: there is nothing to read conversations with{half}")
        for stage in self.ahead:
            look_ahead(self.model, stage)
        read_as(self.model.processor, data)
        if self.recipe.lora is not None:
            lora.add(self.model, self.recipe.lora, self.recipe.train.seed)
        self.model.to(self.dtype).train()
        for module in self.model.modules():
            if hasattr(module, "checkpoint_activations"):
                module.checkpoint_activations = self.recipe.train.checkpoint_activations  # pyright: ignore[reportAttributeAccessIssue]
        for layer in self.model.model.layers:
            layer.dropout = self.recipe.dropout
        factors = choose_learning(self.model, self.recipe.learn)
        self.learned = set(factors)
        self.sharded = self.world.size > 1 and self.recipe.train.parallel == "fsdp"
        if self.sharded:
            self._shard()  # each layer's part goes to the device on its own: no device has to hold the whole model
        self.model.to(self.world.device)
        self.optimizer = optimizer_of(self.model, self.recipe.optim, factors, self.recipe.train.precision)
        if self.recipe.image_rows_only:
            keep_word_rows(self.model, self.optimizer)
        side = data.side or self.model.picture_side
        sources = [open_talks(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in data.train]
        longest = self.model.config_text.context
        processor = _for_workers(self.model.processor, self.world.device)
        fetcher = TalkFetcher(sources, processor, data.seed, data.tokens, longest, self._tower_cache())
        fetcher.audit(data.max_reject_share)
        self.loader = self._loader(sources, fetcher)

    def _shard(self) -> None:
        """Raises IntermodalError: a setting that needs whole weights."""
        learning = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        for wanted, what in (
            (self.recipe.image_rows_only, "image_rows_only"),
            (self.recipe.cache_tower, "cache_tower"),
            # FSDP gathers gradients on the way back through the layers, and there is none when only the last product learns
            (learning <= {"lm_head.weight"}, "a stage that learns the output layer alone"),
        ):
            if wanted:
                raise IntermodalError(f"stage {self.recipe.name}: {what} needs train.parallel=ddp")
        processor = self.model.processor
        assert processor is not None
        self.idle = idle_conversations(processor)
        vq = self.model.vqmodel if isinstance(self.model, Chameleon) else None  # data workers use it; it does not learn
        shard_layers(self.model, self.world, "hidden", vq)

    def _tower_cache(self) -> DiskCache | None:
        """Raises IntermodalError: the stage wants the tower's states kept while the tower learns."""
        if not self.recipe.cache_tower:
            return None
        refuse_learning_tower(self.model, self.learned)
        with self.autocast():
            self.model.vision_cache = DiskCache(self.folder.parent / "tower-cache", fingerprint(self.model.tower_parameters()))
        return self.model.vision_cache

    def _in_step(self, batches: Iterator[Packs]) -> Generator[Packs, None, None]:
        """As every trainer's, but for steps that hold no conversation on any rank, which streams can give: all of it rejects. The next one
        is drawn in its place.

        Raises:
            DataError: that went on for too long.
        """
        empty = 0
        for fetched in super()._in_step(batches):
            if self.world.any(bool(fetched.batches)):
                empty = 0
                yield fetched
            elif (empty := empty + 1) == ATTEMPTS:
                raise DataError(
                    f"stage {self.recipe.name}: {ATTEMPTS} steps in a row had no conversation to train on, at step {self.step + 1}: "
                    f"{self.folder}/rejects*.jsonl says why of each; raise data.tokens if they are too long, or mend the data"
                )

    def _train_step(self, fetched: Packs, logging: bool) -> dict[str, Any]:
        """The loss of a step is the sum over all packs of all ranks, divided once by their supervised tokens."""
        device = self.world.device
        tokens = sum(len(targets(batch)[0]) for batch in fetched.batches)
        count = self.world.sum(torch.tensor(float(tokens), device=device, dtype=self.dtype))
        total, bad, statistics = torch.zeros((), device=device, dtype=self.dtype), None, ScoreStatistics(device)
        codes, shares = self._image_ids(), torch.zeros(2, 2, device=device)
        batches, scale = fetched.batches, 1.0
        if self.sharded:
            batches, scale = in_step(batches, self.idle, self.world), float(self.world.size)  # FSDP takes the mean over the ranks
        for batch in batches:
            moved = batch.to(device)
            with self.autocast(), attention_scores(self.model.model, logging) as looked:
                hidden = self.model.hidden(moved)
                losses = next_token_losses(hidden, self.model.head_weight, moved, z_loss=self.recipe.z_loss)
                if logging:
                    statistics.add(hidden, self.model.head_weight, moved, looked.get("attention_score", 0.0))
            loss = losses.sum()
            if logging and codes is not None:
                shares += by_modality(losses.detach(), targets(moved)[1], codes)
            if (
                self.sharded and hidden.requires_grad
            ):  # on every rank the same parts must take part in backward, learned from or not
                loss = loss + 0 * (hidden.sum() + self.model.head_weight.sum())
            if loss.requires_grad:  # not where a pack met nothing that learns: words alone, and only the projector does
                (loss * (scale / count)).backward()
            total += loss.detach()
            bad = bad or (None if bool(torch.isfinite(loss.detach())) else batch)
        keys = [key for batch in fetched.batches for key in batch.keys]
        self._check_finite(total, bad.keys if bad is not None else keys)
        if not self.sharded:
            sum_gradients(self.model, self.world)
        self._look_for_gradients(fetched.batches)
        rate, norm = self._update(keys)
        if not logging:
            return {}
        length = sum(len(batch.ids) for batch in fetched.batches)
        return {
            "loss": (self.world.sum(total) / count).item(),
            "lr": rate,
            "gradient_norm": norm.item(),
            "supervised_tokens": int(count),
            "tokens": int(self.world.sum(torch.tensor(float(length), device=device))),
            "packs": len(fetched.batches),
            **self._modality_losses(shares, codes),
            **statistics.values(self.world),
        }

    def _look_for_gradients(self, batches: Sequence[TokenBatch]) -> None:
        """Tell once of what should learn and gets no gradient: at the first step in which some rank saw media, for words alone reach no
        tower and no projector; at the last step where none did. All ranks come to the same, so none waits for another.

        Raises:
            IntermodalError: nothing gets one.
        """
        if self.told_of_gradients:
            return
        if self.unreached is None:  # now that a checkpoint, if any, is restored
            self.unreached = Unreached(self.model, self.optimizer)
        self.unreached.look()
        sees = bool(self.model.tower)
        shown = self.world.any(any(batch.visual is not None for batch in batches)) if sees else True
        if shown or self.step + 1 == self.recipe.train.steps:
            self.told_of_gradients = True
            when = (
                f"in step {self.step + 1}{', which had pictures' if sees else ''}" if shown else "(nothing was shown to the model)"
            )
            told = self.unreached.report(self.recipe.name, when)
            if told and self.world.main:
                self.console.print(told, style="yellow", markup=False, soft_wrap=True)

    def _modality_losses(self, shares: Tensor, codes: Tensor | None) -> dict[str, float]:
        """Loss a token of words and of picture codes, over all packs of all ranks; nothing where the vocabulary has no codes."""
        if codes is None:
            return {}
        sums = self.world.sum(shares).tolist()
        return {name: total / count for name, (total, count) in zip(("loss_text", "loss_image"), sums, strict=True) if count}

    def _image_ids(self) -> Tensor | None:
        """Tokens that are picture codes, in a model whose vocabulary has them."""
        ids = self.model.config.image_tokens.ids if isinstance(self.model, Chameleon) else None
        return None if ids is None else torch.tensor(ids, device=self.world.device)

    def _note(self, values: dict[str, Any]) -> str:
        speed = values["samples_per_second"] * values["tokens"] / self.recipe.data.batch
        return f"{speed:,.0f} tokens/s  loss {values['loss']:.3f}"

    def _finish(self) -> Generative:
        if self.average is not None:
            self.model.load_state_dict({**self.model.state_dict(), **self.average})
        if self.sharded:
            self.model = self._rebuilt()
        self.model.float().eval()
        if self.recipe.lora is not None:
            if self.world.main:
                initial = self.folder / "initial"
                base = self.before or (initial if initial.exists() else self.whole.model.start)
                lora.save(self.model, self.recipe.lora, self.folder / "adapter", self.learned, base)
            lora.merge(self.model)
        if self.world.main:
            save_model(self.model, self.folder / "model")
        if self.world.size > 1:
            dist.barrier()
        return self.model

    def _rebuilt(self) -> Generative:
        """A plain model with the whole weights: FSDP changes the class of the one it shards."""
        state, family = whole_state(self.model), self.model.family
        with torch.device("meta"):
            plain: Generative = codec(family).build(family, self.model.config)
        if self.recipe.lora is not None:
            lora.add(plain, self.recipe.lora)
        plain.load_state_dict(state, assign=True)
        plain.processor, plain.source = self.model.processor, self.model.source
        if isinstance(plain, Chameleon):
            plain.bind()
        return plain


def _for_workers(processor: ChatProcessor, device: torch.device) -> ChatProcessor:
    """A processor whose VQ-VAE, if it has one, is on the CPU: data workers are forked, and CUDA does not survive that."""
    planner = processor.planner
    if device.type == "cpu" or not isinstance(planner, CodePlanner):
        return processor
    other = copy.copy(processor)
    other.planner = replace(planner, vq=copy.deepcopy(planner.vq).cpu() if planner.vq is not None else None)
    return other
