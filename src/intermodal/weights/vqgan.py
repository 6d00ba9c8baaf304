"""VQGAN checkpoints: ours (config.json + safetensors) and the authors' (`vqgan.yaml` + `vqgan.ckpt`, as Chameleon ships it). Key names are
the authors' in both; a GAN's and a loss's own weights are passed over."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..config import SettingError, checked
from ..errors import CheckpointError, IntermodalError
from ..models.vqvae import VQVAE, VQConfig
from .files import read_pickle
from .rules import Ignore, Rename, Rule, check_against, convert

YAML, CKPT = "vqgan.yaml", "vqgan.ckpt"
_IN_YAML = {
    "code_width": "embed_dim",
    "codes": "n_embed",
    "resolution": "ddconfig.resolution",
    "channels": "ddconfig.in_channels",
    "width": "ddconfig.ch",
    "multipliers": "ddconfig.ch_mult",
    "res_blocks": "ddconfig.num_res_blocks",
    "attention": "ddconfig.attn_resolutions",
    "latent_channels": "ddconfig.z_channels",
    "double_latent": "ddconfig.double_z",
}
"""Where the authors' yaml has our fields, under `model.params`."""


def from_hf(config: dict[str, Any]) -> VQConfig:
    """Our config.json, or the `vq_config` of a Hugging Face Chameleon (which has no decoder)."""
    if config.get("model_type") == "vqgan":
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config["vq"].items()}
        try:
            return VQConfig(**fields)
        except TypeError as error:
            raise CheckpointError(f"its vq section does not fit: {error}") from error
    get = {**_HF_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    if get["in_channels"] != 3:
        raise CheckpointError(f"a VQ-VAE of {get['in_channels']} channels; pictures have 3")
    return VQConfig(
        resolution=get["resolution"],
        width=get["base_channels"],
        multipliers=tuple(get["channel_multiplier"]),
        res_blocks=get["num_res_blocks"],
        attention=tuple(get["attn_resolutions"] or ()) if get["attn_type"] == "vanilla" else (),
        mid_attention=get["attn_type"] == "vanilla",
        latent_channels=get["latent_channels"],
        double_latent=get["double_latent"],
        code_width=get["embed_dim"],
        codes=get["num_embeddings"],
        decoder=False,
    )


_HF_DEFAULTS: dict[str, Any] = dict(
    embed_dim=256, num_embeddings=8192, double_latent=False, latent_channels=256, resolution=512, in_channels=3, base_channels=128,
    channel_multiplier=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=None, attn_type="vanilla",
)  # fmt: skip


def to_vq_config(config: VQConfig, original: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ours -> the `vq_config` of a Hugging Face Chameleon.

    Raises:
        CheckpointError: a shape that class cannot hold.
    """
    if config.stem != 1 or config.unit_codes or config.groups != 32:
        raise CheckpointError("Hugging Face's Chameleon holds VQ-VAEs with stem=1, groups=32 and without unit_codes")
    return {
        **(original or {}),
        "resolution": config.resolution,
        "in_channels": config.channels,
        "base_channels": config.width,
        "channel_multiplier": list(config.multipliers),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": list(config.attention) or None,
        "attn_type": "vanilla" if config.mid_attention else "none",
        "latent_channels": config.latent_channels,
        "double_latent": config.double_latent,
        "embed_dim": config.code_width,
        "num_embeddings": config.codes,
    }


def rules(family: str, config: VQConfig) -> list[Rule]:
    ours = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
    return [Ignore("loss.{rest}"), Ignore("model_ema.{rest}"), *(Rename(f"{part}.{{rest}}", f"{part}.{{rest}}") for part in ours)]


def build(family: str, config: VQConfig) -> VQVAE:
    return VQVAE(config)


def processor(folder: Path, family: str, config: VQConfig, raw: dict[str, Any]) -> None:
    return None


def family_of(model: VQVAE) -> str:
    return model.family


def to_hf(model: VQVAE) -> dict[str, Any]:
    return {"model_type": "vqgan", "vq": asdict(model.config)}


def read_authors(folder: str | Path) -> VQVAE:
    """The authors' `vqgan.yaml` and `vqgan.ckpt` (a directory that holds both).

    Raises:
        CheckpointError: a file is missing or damaged, or a key does not fit.
    """
    _, config, _, _, state = read(Path(folder))
    return _filled(config, state, str(Path(folder) / CKPT))


def read(folder: Path) -> tuple[str, VQConfig, dict[str, Any], list[Rule], dict[str, Tensor]]:
    """The same, the model not yet built: family, config, their config, key table and their tensors. Raises as `read_authors`."""
    import yaml

    for name in (YAML, CKPT):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: Chameleon's tokenizer folder has {YAML} and {CKPT}")
    try:
        raw = yaml.safe_load((folder / YAML).read_text(encoding="utf-8"))
        config = _from_yaml(raw["model"]["params"])
    except SettingError as error:
        raise CheckpointError(f"{folder / YAML}: model.params.{error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / YAML} is not a VQGAN config: {error!r}") from error
    return "vqgan", config, raw, rules("vqgan", config), read_pickle(folder / CKPT)


def _from_yaml(params: dict[str, Any]) -> VQConfig:
    flat = {**params, **{f"ddconfig.{key}": value for key, value in params["ddconfig"].items()}}
    flat["ddconfig.attn_resolutions"] = flat["ddconfig.attn_resolutions"] or ()
    hints = get_type_hints(VQConfig, include_extras=True)
    return VQConfig(**{ours: checked(flat[theirs], hints[ours], theirs) for ours, theirs in _IN_YAML.items()})


def _filled(config: VQConfig, state: dict[str, Tensor], where: str) -> VQVAE:
    try:
        table = rules("vqgan", config)
        native = convert(state, table)
        with torch.device("meta"):
            model = VQVAE(config)
        check_against(native, model, where, table, state.keys())
    except IntermodalError as error:
        raise CheckpointError(f"{where}: {error}") from error
    model.load_state_dict({key: value.float() for key, value in native.items()}, assign=True)
    return model.eval()


def write_authors(model: VQVAE, folder: str | Path) -> Path:
    """Write `vqgan.yaml` and `vqgan.ckpt`.

    Raises:
        CheckpointError: a shape the authors' code cannot build, or no decoder.
    """
    import yaml

    config, target = model.config, Path(folder)
    if config.stem != 1 or config.unit_codes or config.groups != 32 or model.decoder is None or not config.mid_attention:
        raise CheckpointError("the authors' VQGAN has a decoder, stem=1, groups=32, attention in the middle and no unit_codes")
    target.mkdir(parents=True, exist_ok=True)
    inner = {
        "double_z": config.double_latent,
        "z_channels": config.latent_channels,
        "resolution": config.resolution,
        "in_channels": config.channels,
        "out_ch": config.channels,
        "ch": config.width,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": list(config.attention),
        "dropout": 0.0,
    }
    params = {"embed_dim": config.code_width, "n_embed": config.codes, "ddconfig": inner}
    (target / YAML).write_text(yaml.safe_dump({"model": {"params": params}}, sort_keys=False))
    torch.save({"state_dict": dict(model.state_dict())}, target / CKPT)
    return target
