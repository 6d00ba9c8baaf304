"""CLIP, SigLIP and SigLIP 2: two towers, one space.

Papers: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023, section 3), SigLIP 2 (Tschannen et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Images, PairBatch, Texts
from ..errors import InputError
from ..nn.layers import at_least_float32
from .text import ClipTextTower, SiglipTextTower, TextConfig
from .vit import ClipVisionTower, NaflexVisionTower, SiglipVisionTower, VisionConfig

if TYPE_CHECKING:
    from ..inputs.processor import PairProcessor


@dataclass(frozen=True)
class DualConfig:
    """A dual encoder. `naflex` and the class name decide the towers; the towers' own configs hold everything else."""

    vision: VisionConfig
    text: TextConfig
    embed_width: int
    """Width of the shared space."""
    naflex: bool = False
    init_scale: float = 1 / 0.07
    """Factor on the cosine at the start of training, stored as its logarithm."""
    init_bias: float = -10.0
    """Added to every logit at the start of training (sigmoid loss only)."""
    with_bias: bool = False
    """CLIP only: a bias is learned, for the sigmoid loss (open_clip's `--siglip`). SigLIP always learns one."""


@dataclass
class Embeddings:
    """What a dual encoder gives a loss: unit vectors (B, E) of each side, the log scale and, for the sigmoid loss, the bias."""

    image: Tensor
    text: Tensor
    log_scale: Tensor
    bias: Tensor | None


class DualEncoder(nn.Module):
    """Base of CLIP and SigLIP: encode each side, normalise, compare."""

    vision: nn.Module
    text: nn.Module
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    processor: PairProcessor | None
    max_log_scale: ClassVar[float | None] = None
    """Upper bound of the log scale, applied by the optimizer step and never in forward, where it would stop its gradient."""

    def __init__(self, config: DualConfig):
        super().__init__()
        self.config = config
        self.processor = None
        self.source: dict[str, Any] = {}

    def encode_images(self, images: Images) -> Tensor:
        """Images of B pictures -> (B, E), not normalised."""
        raise NotImplementedError("use CLIP or SigLIP")

    def encode_texts(self, texts: Texts) -> Tensor:
        """N packed texts -> (N, E), not normalised."""
        raise NotImplementedError("use CLIP or SigLIP")

    def forward(self, batch: PairBatch) -> Embeddings:
        image = F.normalize(at_least_float32(self.encode_images(batch.images)), dim=-1)
        text = F.normalize(at_least_float32(self.encode_texts(batch.texts)), dim=-1)
        return Embeddings(image, text, self.logit_scale, self.logit_bias)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale in its published range; call it after the optimizer step."""
        if self.max_log_scale is not None:
            self.logit_scale.clamp_(0, self.max_log_scale)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any], batch_size: int = 64) -> Tensor:
        """Pictures (PIL, a path, bytes) -> (N, E) float32 unit vectors on the CPU."""
        return self._embed(images, self._processor().images, self.encode_images, batch_size)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts -> (N, E) float32 unit vectors on the CPU."""
        return self._embed(texts, self._processor().texts, self.encode_texts, batch_size)

    @torch.no_grad()
    def logits(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """(N images, M texts) float32 scores: scaled cosines, plus the bias where there is one: apply a sigmoid there, never a softmax."""
        cosine = self.embed_images(images) @ self.embed_texts(texts).T
        scores = cosine * self.logit_scale.float().exp().cpu()
        return scores if self.logit_bias is None else scores + self.logit_bias.float().cpu()

    def _processor(self) -> PairProcessor:
        if self.processor is None:
            raise InputError("this model has no processor: set `model.processor`, or load a directory that holds tokenizer files")
        return self.processor

    def _embed(self, items: Sequence[Any], prepare, encode, batch_size: int) -> Tensor:
        if isinstance(items, str | bytes) or not isinstance(items, Sequence):
            raise TypeError(f"expected a list of items, got {type(items).__name__}; put a single one in a list")
        was_training = self.training
        self.eval()
        device, rows = self.logit_scale.device, []
        for start in range(0, len(items), batch_size):
            batch = prepare(items[start : start + batch_size]).to(device)
            rows.append(F.normalize(encode(batch).float(), dim=-1).cpu())
        self.train(was_training)
        return torch.cat(rows) if rows else torch.empty(0, self.config.embed_width)


class CLIP(DualEncoder):
    """Softmax contrastive encoder. Logits = exp(logit_scale) * cosine; the scale is kept within [1, 100] after each step.

    With `config.with_bias` its logits have a bias too and it is trained with the sigmoid loss, the scale kept in the same range, as
    open_clip does it.
    """

    max_log_scale = math.log(100)

    def __init__(self, config: DualConfig):
        super().__init__(config)
        self.vision = ClipVisionTower(config.vision)
        self.text = ClipTextTower(config.text)
        self.visual_projection = nn.Linear(config.vision.width, config.embed_width, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embed_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.init_bias))) if config.with_bias else None

    @torch.no_grad()
    def add_bias(self, scale: float, bias: float) -> None:
        """Make a CLIP that softmax has trained ready for the sigmoid loss: a bias, and the scale back at its start.

        A scale of 100, where softmax ends, would make every wrong pair an error of the sigmoid's.
        """
        self.config = replace(self.config, with_bias=True, init_scale=scale, init_bias=bias)
        self.logit_scale.fill_(math.log(scale))
        self.logit_bias = nn.Parameter(self.logit_scale.new_tensor(bias))

    def encode_images(self, images: Images) -> Tensor:
        return self.visual_projection(self.vision(images))

    def encode_texts(self, texts: Texts) -> Tensor:
        return self.text_projection(self.text(texts))


class SigLIP(DualEncoder):
    """Sigmoid contrastive encoder, fixed size or NaFlex. Logits = exp(logit_scale) * cosine + logit_bias; no clamp.

    The vision tower pools into the shared space as it is; the text tower ends in a linear head with bias.
    """

    def __init__(self, config: DualConfig):
        super().__init__(config)
        if config.embed_width != config.vision.width:
            raise InputError(f"SigLIP embeds in the vision tower's width {config.vision.width}, not {config.embed_width}")
        self.vision = (NaflexVisionTower if config.naflex else SiglipVisionTower)(config.vision)
        self.text = SiglipTextTower(config.text)
        self.text_head = nn.Linear(config.text.width, config.embed_width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.init_bias)))

    def encode_images(self, images: Images) -> Tensor:
        return self.vision(images)

    def encode_texts(self, texts: Texts) -> Tensor:
        return self.text_head(self.text(texts))


@torch.no_grad()
def initialise(model: DualEncoder, seed: int = 0) -> DualEncoder:
    """Fill a fresh model with its starting weights, the same for a seed on every machine.

    Linear layers are normal with std 1/sqrt(fan in) (residual outputs smaller by 1/sqrt(2 depth)), norms one and zero. Token embeddings
    have std 1 and positions half of that: as loud as the patches they are added to, so that places and words differ from the first step
    (from 0.02, the field's habit for long runs, a short run is spent on making them so: LOG.md). Scale and bias are as the config says:
    1/0.07 for CLIP, (10, -10) for SigLIP and for a CLIP with a bias (PITFALLS D6: transformers' zeros start a batch of 32,768 at a loss
    of 22,713 instead of 11.5).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float) -> None:
        parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            depth = model.config.vision.depth if name.startswith("vision") else model.config.text.depth
            residual = name.endswith(("out_proj", "fc2"))
            normal(module.weight, module.in_features**-0.5 * ((2 * depth) ** -0.5 if residual else 1.0))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 1.0)
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("class_embedding", "probe"):
            normal(parameter, parameter.shape[-1] ** -0.5)
        elif leaf == "position_embedding":
            normal(parameter, 0.5)
    model.logit_scale.fill_(math.log(model.config.init_scale))
    if model.logit_bias is not None:
        model.logit_bias.fill_(model.config.init_bias)
    return model
