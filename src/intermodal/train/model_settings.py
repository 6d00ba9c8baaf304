"""The models that recipes start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from ..config import Positive
from ..models.decoder import DecoderConfig
from ..models.text import TextConfig
from ..models.vit import VisionConfig


@dataclass(frozen=True)
class ModelConfig:
    """A dual encoder from scratch, or one to go on from."""

    family: Literal["clip", "siglip", "siglip2"] = "siglip"
    start: str | None = None
    """A directory or hub id to start from; the tower settings below are then read from it."""
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(192, 6, 3, 768, image_size=64, patch_size=8))
    text: TextConfig = field(default_factory=lambda: TextConfig(192, 3, 3, 768, vocab_size=1024, context=24, eos_id=1))
    embed_width: Positive = 192
    """CLIP only; SigLIP embeds in the vision tower's width."""
    init_scale: Annotated[float, Gt(0), Lt(float("inf"))] | None = None
    """Factor on the cosine at the start; None takes 1/0.07 for CLIP with the softmax loss, else 10."""
    init_bias: Annotated[float, Gt(float("-inf")), Lt(float("inf"))] = -10.0
    """SigLIP, and CLIP with the sigmoid loss. -10 is the paper's for a batch of 32,768; a small one learns sooner from about
    -log(batch)."""
    tokenizer: str | None = None
    """A directory or hub id whose tokenizer files a fresh model takes (CLIP's, say); None counts one from the captions."""
    vocabulary: Positive = 1024
    """Size of the tokenizer counted from the captions, once it has all their letters."""
    tokenizer_samples: Positive = 4096
    """How many samples' captions it is counted from."""
    max_patches: Positive = 256
    """NaFlex only: most patches of a picture."""


@dataclass(frozen=True)
class StitchConfig:
    """A stitched model to go on from, or the parts of a new one."""

    start: str | None = None
    """A directory or hub id of a stitched model; of the fields below only `template` is then read."""
    vision: str = "runs/demo/model"
    """The CLIP or SigLIP model that gives its tower."""
    language: str | None = None
    """The decoder's directory or GGUF file; None makes a fresh one of the shape below."""
    layer: int | None = None
    """Which hidden state of the tower is read; None takes LLaVA's choice for the tower's kind."""
    template: str | None = None
    """A file with the chat template to train with, and to save, in place of the model's own. A released LLaVA 1.5 needs one: its own
    ends no reply, so nothing would be learned of when to stop."""
    anyres: tuple[tuple[int, int], ...] = ()
    """Grids of tiles, (down, across), that a picture may be cut into (LLaVA-NeXT); none gives LLaVA 1.5's one square."""
    onevision: bool = False
    """Make a LLaVA-OneVision, which reads clips too; its grids are the published ones where `anyres` names none."""
    decoder: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(
            width=128, depth=4, heads=4, kv_heads=4, head_width=32, mlp_width=384, vocab_size=0, context=512
        )
    )
    """Shape of a fresh decoder; its vocabulary is counted from the data."""
    vocabulary: Positive = 512
    tokenizer_samples: Positive = 2048
    """How many conversations a fresh tokenizer is counted from, over all sources of all stages."""


@dataclass(frozen=True)
class NativeConfig:
    """An early-fusion model to go on from, or a new one: one decoder over words and picture codes."""

    start: str | None = None
    """A directory of a Chameleon; the fields below are then not read."""
    vq: str = "runs/vqvae/model"
    """The VQ-VAE that makes and draws the codes."""
    decoder: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(
            width=192, depth=4, heads=6, kv_heads=6, head_width=32, mlp_width=512, vocab_size=0, context=512, qk_layernorm=True
        )
    )
    """Its vocabulary is counted from the data, and the codes are added."""
    vocabulary: Positive = 512
    tokenizer_samples: Positive = 2048
