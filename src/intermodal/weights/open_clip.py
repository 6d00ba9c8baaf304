"""open_clip's own checkpoint layout for ViT models: `open_clip_config.json` and its weights file.

CLIP towers (`visual.` and top-level text keys, or `text.` with a custom text tower) and SigLIP towers (a timm trunk and a
non-causal text tower).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, IntermodalError
from ..files import read_json
from ..models.clip import DualConfig, DualEncoder
from .clip import family_of
from .files import read_pickle, read_weights, write_weights
from .open_clip_config import bias_cfg, clip_config, siglip_config, to_config, trunk_name
from .open_clip_keys import clip_rules, siglip_rules
from .rules import Rule, convert

CONFIG = "open_clip_config.json"
STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
TRAINED = (".pt", ".pth")
"""How the files end that open_clip's training writes (`checkpoints/epoch_N.pt`)."""

Described = tuple[str, DualConfig, dict[str, Any], list[Rule], dict[str, Tensor]]
"""Family, config, their config, key table and their tensors."""


def read(folder: Path) -> Described:
    """A directory with `open_clip_config.json` and its weights."""
    return _described(str(folder), _config_file(folder / CONFIG), read_weights(folder, STEMS))


def read_trained(path: Path) -> Described:
    """A file that open_clip's training has written. Such a file does not say which model it is of: the model's config stands beside it.

    Raises:
        CheckpointError: no config beside it; what it holds is another kind of model.
    """
    config = path.parent / CONFIG
    if not config.exists():
        raise CheckpointError(
            f"{path} does not say which model it is of: copy open_clip's model_configs/NAME.json of that model to {config} "
            "(and its tokenizer's files, for texts)"
        )
    return _described(str(path), _config_file(config), read_pickle(path))


def _config_file(path: Path) -> dict[str, Any]:
    """`open_clip_config.json`: as published, or one of open_clip's own `model_configs`, which is the inner part alone."""
    raw = read_json(path)
    return raw if "model_cfg" in raw else {"model_cfg": raw}


def _described(where: str, raw: dict[str, Any], state: dict[str, Tensor]) -> Described:
    try:
        if "visual.trunk.pos_embed" in state:
            config = siglip_config(raw, state)
            return "siglip", config, raw, siglip_rules(config), _scalars(state)
        if "visual.class_embedding" not in state:
            raise CheckpointError("only open_clip's ViT towers are read (no visual.class_embedding or visual.trunk.pos_embed)")
        config = clip_config(raw, state)
        return "clip", config, raw, clip_rules(config, "text.token_embedding.weight" in state), _scalars(state)
    except KeyError as error:
        raise CheckpointError(f"{where} lacks the tensor {error.args[0]}") from None
    except IntermodalError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _scalars(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scale and bias as scalars: files keep them as () or (1,)."""
    single = {key: state[key].reshape(()) for key in ("logit_scale", "logit_bias") if key in state and state[key].numel() == 1}
    return {**state, **single}


def write(model: DualEncoder, folder: Path) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`, a directory for open_clip's `local-dir:` and hub models.

    Raises:
        CheckpointError: a NaFlex model, which open_clip keeps in another tower class; a setting or size that its config cannot say.
    """
    family = family_of(model)
    if family == "siglip2":
        raise CheckpointError("open_clip's ViT layout does not hold NaFlex models; use layout='hf'")
    loaded = model.source.get("config", {})
    raw = copy.deepcopy(loaded) if "model_cfg" in loaded else to_config(model, family)
    vision_cfg, side = raw["model_cfg"]["vision_cfg"], model.config.vision.image_size
    if family == "siglip" and vision_cfg["image_size"] != side:  # resampled since it was loaded
        vision_cfg["timm_model_name"] = trunk_name(model.config.vision)
    vision_cfg["image_size"] = side
    if model.logit_bias is not None and raw["model_cfg"].get("init_logit_bias") is None:
        raw["model_cfg"] |= bias_cfg(model)  # trained with a bias from a config that has none, here or by open_clip's --siglip
    custom = family == "siglip" or bool(raw["model_cfg"].get("custom_text"))
    rules = siglip_rules(model.config) if family == "siglip" else clip_rules(model.config, custom)
    write_weights(convert(model.state_dict(), rules, saving=True), folder, stem="open_clip_model")
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
