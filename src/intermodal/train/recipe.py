"""What a training run is made of. A recipe file defines `recipe(tiny=False) -> Recipe`; any field can be set by its dotted path."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate

from ..config import NotNegative, Positive, SettingError, not_all_zero, smallest_first, validated
from ..errors import IntermodalError, nearest
from ..inputs.template import beside_messages_tools_reply_and_add_generation_prompt
from ..models.vqvae import VQConfig
from .model_settings import ModelConfig, NativeConfig, StitchConfig

Share = Annotated[float, Gt(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Amount = Annotated[float, Ge(0), Lt(float("inf"))]
Seed = Annotated[int, Ge(0), Lt(2**32)]

Weights = Annotated[tuple[Amount, ...], Predicate(not_all_zero)]
Variables = Annotated[dict[str, Any], Predicate(beside_messages_tools_reply_and_add_generation_prompt)]


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...] = ("scenes:core",)
    """Sources: `scenes:core`, `scenes:all`, `sprites:core`, `tuxpaint`, a folder of pictures, .tar shards, .parquet, .jsonl, .csv;
    `{000..009}` and `*` expand."""
    weights: Weights | None = None
    """How often each source is drawn; by size when left out."""
    batch: Positive = 256
    """Pairs a step over all ranks."""
    workers: NotNegative = 1
    """Processes that decode pictures and make tokens; 0 does it in the training process, which tries those of an `hf:` stream anyway."""
    prefetch: Positive = 4
    """Batches that each worker keeps ready: the rank's whole share in bytes, 0.15 MB a picture of 224 px."""
    seed: Seed = 0
    crop_scale: Annotated[tuple[Share, Share], Predicate(smallest_first)] | None = None
    """Random crop of this share of the area before resizing (open_clip trains with 0.9 to 1.0)."""
    allow_urls: bool = False
    """Fetch pictures named by http(s) addresses."""
    max_reject_share: Annotated[float, Ge(0), Le(1)] = 0.05
    """Stop when more than this share of the samples that all ranks have read is unusable, or of a source's files are cut short."""
    split_streams: bool = True
    """Each rank reads its own part of a stream (`hf:`). Else every rank reads and decodes all of it and keeps its slice of a batch: ranks
    then see the batches that one alone would, and a run can go on on another number of them."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon makes the updates of linear layers and convolutions orthogonal (`optim.Muon`): fewer steps to the same loss, each a little
    dearer."""
    lr: Amount = 1e-3
    matrix_lr_factor: Amount = 1.0
    """Muon only: rate of the orthogonal updates, as a multiple."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: Amount = 1e-6
    weight_decay: Amount = 0.1
    """Not applied to vectors and scalars: norms, biases, positions' rows are matrices and do decay, the scale does not."""
    warmup: NotNegative = 50
    """Steps of linear warm-up, then a cosine to `final_lr_share`."""
    final_lr_share: Amount = 0.0
    scalar_lr_factor: Amount = 1.0
    """Contrastive only: rate of the loss's scale and bias, as a multiple. In a run of a few hundred steps they are otherwise still near
    their start."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    ema: Annotated[float, Gt(0), Lt(1)] | None = None
    """Decay of the exponential moving average of the weights; None keeps none. What is exported is then the average."""


@dataclass(frozen=True)
class LoopConfig:
    """What every objective's loop asks for."""

    steps: Positive = 300
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """auto: bf16 autocast where the processor multiplies bf16 in hardware, else fp32. Master weights are fp32, and with fp64, which is
    for telling a difference between two runs from rounding, they, the gradients and the loss are float64; what is exported is fp32."""
    checkpoint_activations: bool = False
    threads: Positive | None = None
    seed: Seed = 0
    log_every: Positive = 10
    save_every: Positive | None = None
    """Steps between checkpoints; the last step is always saved."""
    rollback: Annotated[float, Gt(0)] | None = None
    """When a logged loss (a VQ-VAE's reconstruction error) is this many times the median of those before it, or not finite, go back to the
    newest checkpoint, past the data that led there (PaLM, section 5.1); a run gives up after five times. Needs `save_every`."""
    keep: Positive = 2
    """How many checkpoints stay on disk."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Across ranks: whole weights on each, or sharded weights, gradients and optimizer state."""


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    duplicates: Literal["negative", "positive", "ignore"] = "negative"
    """What two different samples with the same caption are to each other."""
    micro_batch: Positive | None = None
    """Pairs of one forward on one rank (gradient caching); None takes the rank's whole share at once."""


@dataclass(frozen=True)
class Recipe:
    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class TalksConfig:
    train: tuple[str, ...] = ("captions:scenes:core",)
    """Sources of conversations, as `data.talks.open_talks` reads them."""
    weights: Weights | None = None
    """How often each source is drawn; by size when left out."""
    batch: Positive = 64
    """Conversations a step over all ranks."""
    tokens: Positive = 4096
    """Most tokens of one forward: a step's conversations are packed into as few packs of this size as they fit in."""
    workers: NotNegative = 1
    prefetch: Positive = 4
    seed: Seed = 0
    side: int | None = None
    """Pixels of a side for sources that draw their pictures; None takes the tower's size, or 64 where it takes any."""
    allow_urls: bool = False
    """Fetch pictures of captions that are named by http(s) addresses."""
    max_reject_share: Annotated[float, Ge(0), Le(1)] = 0.05
    split_streams: bool = True
    """As in `DataConfig`."""
    video_fps: Annotated[float, Gt(0)] | None = None
    """Frames a second that are read of videos given by path; None is the family's rule."""
    video_frames: Positive | None = None
    """So many frames of each video, instead."""
    variables: Variables | None = None
    """What every conversation tells the chat template, {"enable_thinking": false}, to train on and, being saved with the model, in its
    replies; `data.variables.enable_thinking=false` sets one. None leaves the model's own, as the stage before has saved them, and {} takes
    them away."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on linear layers (arXiv 2106.09685), through peft."""

    targets: tuple[str, ...] = ("model.layers.*_proj",)
    """Patterns of layer names. The adapters' own parameters are then `*lora_*` in a stage's `learn`."""
    rank: Positive = 16
    alpha: float = 32.0
    """The adapter counts alpha / rank."""
    dropout: Decay = 0.0


@dataclass(frozen=True)
class Stage:
    """Which parameters learn, at which rate, on what."""

    name: str
    learn: tuple[tuple[str, Amount], ...]
    """(pattern of parameter names, multiple of `optim.lr`): `("projector.*", 1.0)`. The last pattern that fits a parameter counts; what
    none fits, or a rate of 0 names, is frozen."""
    data: TalksConfig = field(default_factory=TalksConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0))
    train: LoopConfig = field(default_factory=LoopConfig)
    image_rows_only: bool = False
    """Of the embedding and output tables that learn, only the rows of picture codes and their marks do (Anole, arXiv 2407.06135): what a
    native model says about words stays as it is, to the bit."""
    z_loss: Amount = 0.0
    """Weight of log Z squared in the loss; Chameleon's authors use 1e-5."""
    dropout: Decay = 0.0
    """Of what attention and MLP add in the decoder's layers; Chameleon 7B trained with 0.1."""
    cache_tower: bool = False
    """Keep what the frozen tower says of each picture on disk, in the run's `tower-cache/`: a picture that comes again, in another epoch or
    a later stage, is neither prepared nor looked at again."""
    lora: LoraConfig | None = None
    """Train adapters on these layers. At the end they are in `adapter/`, and merged into the stage's `model/`."""


@dataclass(frozen=True)
class StagedRecipe:
    """A model of conversations, stitched or native, trained stage after stage."""

    name: str
    model: StitchConfig | NativeConfig
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class CodebookConfig:
    """How a VQ-VAE's codes move, beside the loss."""

    ema: Decay | None = 0.99
    """Codes are exponential averages of their latents (VQ-VAE, appendix A.1), and the loss has the commitment alone, times `model.beta`,
    whatever `model.beta_on` says; None learns them by gradient."""
    revive: Positive | None = 100
    """A code unused for this many steps takes a latent of the step; None lets it die."""
    entropy: Amount = 0.0
    """Weight of the entropy term (MAGVIT-2): sure assignments, even use."""
    alarm: Amount = 0.02
    """Warn when the perplexity falls below this share of the codes."""


@dataclass(frozen=True)
class VQTrainConfig(LoopConfig):
    reconstruction: Literal["l1", "l2"] = "l2"
    quantisation: Amount = 1.0
    """Weight of the quantisation loss."""
    perceptual: str | None = None
    """A CLIP or SigLIP directory whose tower says how alike two pictures look (LPIPS in form); None leaves the term out."""
    perceptual_weight: Amount = 1.0


@dataclass(frozen=True)
class AdversarialConfig:
    """A critic of patches beside a VQ-VAE (VQGAN, section 3.1)."""

    weight: Amount = 0.0
    """Of the painter's term, after it has been balanced with the likeness; 0 trains no critic."""
    start: NotNegative = 500
    """The step from which on it counts: before, there is little to criticise."""
    width: Positive = 32
    """A multiple of 4, so that its norms' groups divide the channels."""
    layers: Positive = 2
    """Convolutions that halve the side."""


@dataclass(frozen=True)
class VQRecipe:
    """A VQ-VAE on pictures."""

    name: str
    start: str | None = None
    """A trained VQ-VAE to go on from; of `model` only `resolution`, the side of the pictures, is then read."""
    held_out: tuple[str, ...] | None = None
    """Sources never trained on that are measured at the end; None takes the test side of the drawn ones in `data.train`."""
    model: VQConfig = field(default_factory=VQConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: VQTrainConfig = field(default_factory=VQTrainConfig)


def load_recipe(path: str | Path, *, tiny: bool = False) -> Any:
    """Run a recipe file's `recipe(tiny=...)`: a `Recipe`, or a `StagedRecipe`.

    Raises:
        IntermodalError: no such file, no such function, or it returned something else.
        SettingError: the file fails, with its line; a setting that does not exist or is of the wrong type.
    """
    file = Path(path)
    if not file.is_file():
        raise IntermodalError(f"no recipe at {file}; the ones that come with the project are in recipes/")
    spec = importlib.util.spec_from_file_location(f"intermodal_recipe_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, "recipe", None)
        if function is None:
            raise IntermodalError(f"{file} defines no function `recipe(tiny=False)`")
        made = function(tiny=tiny)
    except SyntaxError as error:
        raise SettingError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except IntermodalError:
        raise
    except Exception as error:  # a recipe is the user's Python: it can raise anything
        raise SettingError(_where(file, module, error)) from error
    if not isinstance(made, Recipe | StagedRecipe | VQRecipe):
        raise IntermodalError(f"recipe() in {file} returned a {type(made).__name__}, not a Recipe, StagedRecipe or VQRecipe")
    try:
        return validated(made)
    except SettingError as error:
        raise SettingError(f"{file}: {error}") from error


def _where(file: Path, module: Any, error: Exception) -> str:
    """The recipe's line where something else failed, what it was, and the nearest field where a setting does not exist."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == module.__file__]
    place = f"{file}{f':{lines[-1]}' if lines else ''}"
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    settings = {**globals(), **vars(module)}.get(unknown[1]) if unknown else None
    if unknown and dataclasses.is_dataclass(settings):
        known = [field.name for field in dataclasses.fields(settings)]
        return f"{place}: {unknown[1]} has no setting {unknown[2]!r}{nearest(unknown[2], known)}; it has {', '.join(known)}"
    return f"{place}: {type(error).__name__}: {error}"


def tiny_version(recipe: Recipe) -> Recipe:
    """The same recipe at a size that trains three steps in a second, for tests."""
    model = recipe.model
    shrunk = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
    return replace(
        recipe,
        model=replace(
            model,
            vision=replace(model.vision, **shrunk, image_size=32, patch_size=8),
            text=replace(model.text, **shrunk),
            embed_width=32,
            vocabulary=256,
            tokenizer_samples=64,
            max_patches=16,
        ),
        data=replace(recipe.data, batch=8, workers=0),
        optim=replace(recipe.optim, warmup=1),
        train=replace(recipe.train, steps=3, log_every=1, micro_batch=None, save_every=None),
    )


def tiny_stages(recipe: StagedRecipe) -> StagedRecipe:
    """The same for a recipe of stages."""
    decoder = replace(recipe.model.decoder, width=32, depth=2, heads=2, kv_heads=2, head_width=16, mlp_width=48)
    stages = tuple(
        replace(
            stage,
            data=replace(stage.data, batch=8, workers=0, tokens=512),
            optim=replace(stage.optim, warmup=1),
            train=replace(stage.train, steps=3, log_every=1, save_every=None),
        )
        for stage in recipe.stages
    )
    return replace(recipe, model=replace(recipe.model, decoder=decoder, tokenizer_samples=64), stages=stages)
