"""`load` and `save`: a directory of the field's own files in, the same out.

A family of checkpoints is a module of this package with the functions of `Codec`; which one reads a directory is decided by
`model_type` in its config.json.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, IntermodalError, nearest
from ..files import read_json
from ..inputs.text import in_transformers
from ..models.chameleon import ChameleonConfig
from ..models.clip import CLIP, DualEncoder
from ..models.decoder import DecoderConfig
from . import open_clip, vqgan
from .files import read_weights, write_weights
from .hub import model_folder
from .rules import Rule, check_against, convert, is_finite

_CODECS = {
    ".clip": ("clip", "siglip", "siglip2"),
    ".decoder": ("llama", "mistral", "qwen2", "qwen3"),
    ".llava": ("llava", "llava_next", "llava_onevision"),
    ".idefics2": ("idefics2",),
    ".qwen_vl": ("qwen",),
    ".vqgan": ("vqgan", "chameleon_vqgan"),
    ".chameleon": ("chameleon",),
    ".qwen2_vl": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = ("hf", "open_clip")
FAMILIES = {family: module for module, families in _CODECS.items() for family in families}


class Codec(Protocol):
    """What a family's module provides."""

    def from_hf(self, config: dict[str, Any]) -> Any:
        """config.json -> the model's config; raises CheckpointError for what is not built."""
        ...

    def rules(self, family: str, config: Any) -> list[Rule]:
        """The key table, used both ways; of several rules for one of our keys the first is written."""
        ...

    def build(self, family: str, config: Any) -> Any:
        """The module, its weights not yet set."""
        ...

    def processor(self, folder: Path, family: str, config: Any, raw: dict[str, Any]) -> Any:
        """What turns a person's input into the model's, from the directory's own files."""
        ...

    def family_of(self, model: Any) -> str: ...

    def to_hf(self, model: Any) -> dict[str, Any]:
        """The model -> config.json."""
        ...


def codec(family: str) -> Codec:
    return import_module(FAMILIES[family], __package__)  # pyright: ignore[reportReturnType]


def load(source: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu", image_size: int | None = None) -> Any:
    """A model with its processor from a directory, a GGUF file or a Hugging Face hub id. Its class follows from config.json.

    Args:
        source: a directory in Hugging Face's layout, open_clip's, or the VQGAN authors' (`vqgan.yaml`, `vqgan.ckpt`); a `.gguf` file of the
            llama architecture; a `.pt` file that open_clip has trained (`epoch_N.pt`), with the model's `open_clip_config.json` beside it;
            or a hub id to download.
        dtype: of the weights, by name or as a torch dtype.
        image_size: resample a dual encoder's vision positions for square pictures of this side (bicubic; not for NaFlex).

    Raises:
        CheckpointError: says which file or key is wrong.
        IntermodalError: a dtype that there is not, or that weights cannot have.
    """
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise IntermodalError(f"weights have no type {dtype!r}{nearest(str(dtype), DTYPES)}; known are {', '.join(DTYPES)}")
    found = _read(source)
    family, handler = found.family, codec(found.family)
    try:
        native = convert(found.state, found.rules)
    except CheckpointError as error:
        raise CheckpointError(f"{found.where}: {error}") from error
    try:
        with torch.device("meta"):
            model = handler.build(family, found.config)
    except (IntermodalError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # torch's own too: a width of -1, say
        raise CheckpointError(f"{found.where}: its config cannot be built: {error}") from error
    check_against(native, model, str(found.where), found.rules, found.state.keys())
    model.source = {"config": found.raw, "folder": str(found.where)}
    processor = found.processor or handler.processor(found.folder, family, found.config, found.raw)
    if image_size is not None:
        from .clip import resized

        model, native, processor = resized(model, native, processor, family, image_size)
    assign(model, native, kind, device)
    model.processor = processor
    if isinstance(model, DualEncoder):
        from .clip import tell_of_size

        tell_of_size(model, found.where)
    if hasattr(model, "bind"):
        model.bind()  # pyright: ignore[reportCallIssue]
    return model.eval()


def load_encoder(source: str | Path, **settings: Any) -> Any:
    """`load` for what has image and text embeddings.

    Raises:
        CheckpointError: the model is of another kind.
    """
    model = load(source, **settings)
    if not isinstance(model, DualEncoder):
        raise CheckpointError(
            f"{source} is a {type(model).__name__}: it has no embeddings to compare; give a CLIP or SigLIP directory{_tower_of(model)}"
        )
    return model


def _tower_of(model: Any) -> str:
    """For who wants to stitch: whether the tower of a model without embeddings can be taken."""
    from ..models.qwen2_vl import QwenVL

    if isinstance(model, QwenVL):
        return " (the tower of this one is taken only by `intermodal stitch --connector=merger`)"
    if getattr(model, "tower", ()):
        return " (no connector of `intermodal stitch` takes the tower of this one: name the model that the tower is from)"
    return ""


def assign(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> None:
    """Give a model built on the meta device its weights, floating-point ones in `dtype`.

    Raises:
        CheckpointError: values beyond what float16 holds.
    """
    placed = {
        key: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype, copy=True)
        for key, value in state.items()
    }
    lost = [key for key, value in placed.items() if value.dtype == torch.float16 and not is_finite(value)]
    if lost:
        raise CheckpointError(
            f"{', '.join(lost[:3])}: values beyond 65,504, the most that float16 holds; take bfloat16 ({len(lost)} such)"
        )
    model.load_state_dict(placed, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def save(model: Any, folder: str | Path, *, layout: str | None = None, shard_bytes: int = 5_000_000_000) -> Path:
    """Write a directory that transformers (or open_clip, with `layout="open_clip"`) loads with equal logits.

    Args:
        layout: "hf" or "open_clip". None is "hf" for all but a CLIP with a bias, which transformers does not have and open_clip does.

    Raises:
        CheckpointError: the layout cannot hold this model; the folder holds a model in the other layout. Readers would go on taking that
            one, and whose files they are is not known here, so none is removed.
    """
    layout = layout or layout_of(model)
    if layout not in LAYOUTS:
        raise CheckpointError(f"unknown layout {layout!r}: {' or '.join(LAYOUTS)}{nearest(layout, LAYOUTS)}")
    target = Path(folder)
    other = other_layout(target, layout)
    if other is not None:
        raise CheckpointError(
            f"{other} belongs to a model in another layout than {layout!r}, and would be read in place of the one saved: save into an "
            "empty folder, or remove that model first"
        )
    target.mkdir(parents=True, exist_ok=True)
    if layout == "open_clip":
        if not isinstance(model, DualEncoder):
            raise CheckpointError(f"open_clip's layout holds CLIP and SigLIP models, not a {type(model).__name__}: use layout='hf'")
        open_clip.write(model, target)
    else:
        handler = codec_of(model)
        config = handler.to_hf(model)
        state = convert(model.state_dict(), handler.rules(handler.family_of(model), model.config), saving=True)
        write_weights(state, target, shard_bytes=shard_bytes)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if model.processor is not None:
        model.processor.save(target, **({"layout": layout} if layout != "hf" else {}))
        _tell_of_tokenizer(model, layout)
    return target


def _tell_of_tokenizer(model: Any, layout: str) -> None:
    """Warn where transformers' Auto classes would read the texts with another tokenizer than the saved one, without an error."""
    if layout != "hf" or not isinstance(model, DualEncoder) or model.processor is None or model.processor.tokenizer is None:
        return
    if not in_transformers(model.processor.tokenizer.files, codec_of(model).family_of(model)):
        warnings.warn(
            "transformers' AutoTokenizer and AutoProcessor build SigLIP 2's own Gemma tokenizer for a siglip2 folder, whatever it holds: "
            "read this one with PreTrainedTokenizerFast.from_pretrained (docs/contrastive.md)",
            stacklevel=3,
        )


def other_layout(folder: Path, layout: str) -> Path | None:
    """The config file of a model that the folder holds in the layout that is not this one."""
    file = folder / ("config.json" if layout == "open_clip" else open_clip.CONFIG)
    return file if file.exists() else None


def layout_of(model: Any) -> str:
    """The layout that holds a model whole: transformers', or open_clip's for a CLIP with a bias."""
    return "open_clip" if isinstance(model, CLIP) and model.logit_bias is not None else "hf"


def codec_of(model: Any) -> Codec:
    """The codec that writes a model: a dual encoder's family follows from its class, other models carry it."""
    if isinstance(model, DualEncoder):
        return codec("clip")
    return codec(model.family)


@dataclass(frozen=True)
class _Found:
    """A checkpoint as it lies on disk."""

    where: Path
    """The directory or file, for messages."""
    folder: Path
    """Where its tokenizer and processor files are."""
    family: str
    config: Any
    raw: dict[str, Any]
    """Its config file as it is."""
    rules: list[Rule]
    state: dict[str, Tensor]
    """Weights by the checkpoint's own keys."""
    processor: Any = None
    """Where the weights file holds the tokenizer too (GGUF)."""


def _read(source: str | Path) -> _Found:
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from . import gguf

        return _Found(path, path.parent, *gguf.read(path))
    if path.suffix in open_clip.TRAINED and path.is_file():
        return _Found(path, path.parent, *open_clip.read_trained(path))
    folder = model_folder(source)
    if not (folder / "config.json").exists():
        if (folder / open_clip.CONFIG).exists():
            return _Found(folder, folder, *open_clip.read(folder))
        if (folder / vqgan.YAML).exists() and (folder / vqgan.CKPT).exists():
            return _Found(folder, folder, *vqgan.read(folder))
    raw = read_json(folder / "config.json")
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {family!r} is not one of {', '.join(FAMILIES)}{nearest(family, FAMILIES)}"
        )
    try:
        config = codec(family).from_hf(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a setting that is missing or of another kind
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {type(error).__name__}: {error}") from error
    state = read_weights(folder)
    config = _drawing_as_in_file(_tied_as_in_file(config, raw, state), folder, state)
    return _Found(folder, folder, family, config, raw, codec(family).rules(family, config), state)


def _tied_as_in_file(config: Any, raw: dict[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The config, its output layer the embedding table where the file has no other and `text_config` alone says so: released OneVision
    directories say false at the top (transformers PR 43617)."""
    text = getattr(config, "text", None)
    if not isinstance(text, DecoderConfig) or text.tied or any(key.endswith("lm_head.weight") for key in state):
        return config
    tied = (raw.get("text_config") or {}).get("tie_word_embeddings")
    return replace(config, text=replace(text, tied=True)) if tied else config


def _drawing_as_in_file(config: Any, folder: Path, state: Mapping[str, Tensor]) -> Any:
    """The config, without a VQ decoder where the file has nothing of one, which is told: transformers saves only the keys that it knows."""
    lost = isinstance(config, ChameleonConfig) and config.vq.decoder and not any("vqmodel.decoder." in key for key in state)
    if not lost:
        return config
    warnings.warn(
        f"{folder}: config.json says that this model draws, and the weights hold no VQ decoder: it was lost, as when transformers saves "
        "such a directory anew. Pictures are read and not drawn; `intermodal convert DIR NEW --vq-decoder VQ` restores the decoder from "
        "the VQ-VAE (or the authors' tokenizer folder) that the model was made with",
        stacklevel=4,
    )
    return replace(config, vq=replace(config.vq, decoder=False))
