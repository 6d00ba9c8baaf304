"""What an `open_clip_config.json` may not say: settings of models that are not built here, told before a tensor is looked at."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError


def refuse(cfg: dict[str, Any], section: str, allowed: dict[str, tuple]) -> None:
    """Raise for settings that would change the model's answers and that our towers do not have.

    Raises:
        CheckpointError: one that is set to something else than the values allowed.
    """
    for name, values in allowed.items():
        if cfg.get(name) and cfg[name] not in values:
            raise CheckpointError(f"open_clip {section}.{name}={cfg[name]!r} is not built here; known: {values}")


def check_towers(model: dict[str, Any]) -> None:
    """Raise for a `model_cfg` of another kind of model, even where its tensors happen to fit one of ours.

    Raises:
        CheckpointError: it has no towers, or one that is built from other code than open_clip's own transformers and timm's SigLIP trunks.
    """
    towers: dict[str, Any] = {}
    for name in ("vision_cfg", "text_cfg"):
        towers[name] = tower = model.get(name)
        if not isinstance(tower, dict):
            raise CheckpointError(
                f"open_clip_config.json: model_cfg.{name} is {tower!r}; it says how the tower is built, as in open_clip's own "
                "model_configs/NAME.json of this model: copy it from there"
            )
    if model.get("multimodal_cfg"):
        raise CheckpointError("open_clip_config.json: model_cfg.multimodal_cfg is of a CoCa, whose text decoder is not built here")
    if towers["text_cfg"].get("hf_model_name"):
        raise CheckpointError(
            f"open_clip_config.json: text_cfg.hf_model_name={towers['text_cfg']['hf_model_name']!r}: a text tower of transformers' is "
            "not built here; open_clip's own are"
        )
    for name, key in (("vision_cfg", "layers"), ("vision_cfg", "width"), ("text_cfg", "layers"), ("text_cfg", "width")):
        value = towers[name].get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            kind = (
                ": a ResNet, which is not built here; ViT towers are" if isinstance(value, list) else ": a whole number is wanted"
            )
            raise CheckpointError(f"open_clip_config.json: {name}.{key} is {value!r}{kind}")
