"""VQGAN checkpoints: ours (config.json + safetensors) and the authors' (`vqgan.yaml` + `vqgan.ckpt`, as Chameleon ships it). Key names are
the authors' in both; a GAN's and a loss's own weights are passed over."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..config import SettingError, checked, validated
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
    "tanh_out": "ddconfig.tanh_out",
}
"""Where the authors' yaml has our fields, under `model.params`."""
OWN_YAML = "intermodal"
"""The yaml's section beside `model`, which the authors' code does not read, for what their code has no setting for."""
_TRAINED_WITH = ("beta", "beta_on")


def from_hf(config: dict[str, Any]) -> VQConfig:
    """Our config.json, or the `vq_config` of a Hugging Face Chameleon (which has no decoder)."""
    if not isinstance(config, dict):
        raise CheckpointError(f"vq_config is {config!r}; it should be an object of the VQ-VAE's settings")
    if config.get("model_type") == "vqgan":
        if not isinstance(config.get("vq"), dict):
            raise CheckpointError(f"its vq section is {config.get('vq')!r}; it should be an object of the VQ-VAE's settings")
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config["vq"].items()}
        try:
            return validated(VQConfig(**fields), "vq.")
        except (TypeError, SettingError) as error:
            raise CheckpointError(f"its vq section does not fit: {error}") from error
    get = {**_HF_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    if get["in_channels"] != 3:
        raise CheckpointError(f"a VQ-VAE of {get['in_channels']} channels; pictures have 3")
    hints, vanilla = get_type_hints(VQConfig, include_extras=True), config.get("attn_type", "vanilla") == "vanilla"
    get["attn_resolutions"] = (get["attn_resolutions"] or ()) if vanilla else ()
    try:
        read = {ours: checked(get[theirs], hints[ours], f"vq_config.{theirs}") for ours, theirs in _IN_HF.items()}
    except SettingError as error:
        raise CheckpointError(str(error)) from error
    return VQConfig(mid_attention=vanilla, decoder=False, **read)


_IN_HF = {
    "resolution": "resolution",
    "width": "base_channels",
    "multipliers": "channel_multiplier",
    "res_blocks": "num_res_blocks",
    "attention": "attn_resolutions",
    "latent_channels": "latent_channels",
    "double_latent": "double_latent",
    "code_width": "embed_dim",
    "codes": "num_embeddings",
    "beta": "beta",
}
"""Where a Hugging Face Chameleon's `vq_config` has our fields. Its class reads `beta` where the file says one."""
_HF_DEFAULTS: dict[str, Any] = dict(
    embed_dim=256, num_embeddings=8192, double_latent=False, latent_channels=256, resolution=512, in_channels=3, base_channels=128,
    channel_multiplier=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=None, beta=0.25,
)  # fmt: skip


def in_hf_class(config: VQConfig) -> bool:
    """Whether Hugging Face's Chameleon class can build it: one switch turns all its attention off."""
    return (
        (config.stem, config.groups, config.channels, config.unit_codes) == (1, 32, 3, False)
        and (config.mid_attention or not config.attention)
    )  # fmt: skip


def to_vq_config(config: VQConfig, original: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ours -> the `vq_config` of a Hugging Face Chameleon; it has no place for `beta_on` and the decoder's `tanh_out`.

    Raises:
        CheckpointError: a shape that class cannot hold.
    """
    if not in_hf_class(config):
        raise CheckpointError(
            "Hugging Face's Chameleon holds VQ-VAEs of 3 channels with stem=1, groups=32, without unit_codes, and with mid_attention "
            "where there is any attention"
        )
    out = {**(original or {}), "in_channels": config.channels, "attn_type": "vanilla" if config.mid_attention else "none"}
    out |= {theirs: getattr(config, ours) for ours, theirs in _IN_HF.items() if ours != "beta"}
    out |= {"channel_multiplier": list(config.multipliers), "attn_resolutions": list(config.attention) or None}
    out.pop("beta", None)
    if config.beta != _HF_DEFAULTS["beta"]:
        out["beta"] = config.beta
    return out


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
        config = _from_yaml(raw["model"]["params"], raw.get(OWN_YAML) or {})
    except SettingError as error:
        raise CheckpointError(f"{folder / YAML}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / YAML} is not a VQGAN config: {error!r}") from error
    return "vqgan", config, raw, rules("vqgan", config), read_pickle(folder / CKPT)


def _from_yaml(params: dict[str, Any], own: dict[str, Any]) -> VQConfig:
    inner = {"tanh_out": False, "attn_type": "vanilla", **params["ddconfig"]}
    flat = {**params, **{f"ddconfig.{key}": value for key, value in inner.items()}}
    if inner["attn_type"] not in ("vanilla", "none"):
        raise SettingError(f"model.params.ddconfig.attn_type is {inner['attn_type']!r}; built are 'vanilla' and 'none'")
    vanilla = inner["attn_type"] == "vanilla"
    flat["ddconfig.attn_resolutions"] = (flat["ddconfig.attn_resolutions"] or ()) if vanilla else ()
    if flat.get("remap") is not None:
        raise SettingError(f"model.params.remap is {flat['remap']!r}: a codebook whose codes are numbered anew is not built")
    hints = get_type_hints(VQConfig, include_extras=True)
    read = {ours: checked(flat[theirs], hints[ours], f"model.params.{theirs}") for ours, theirs in _IN_YAML.items()}
    read |= {name: checked(own[name], hints[name], f"{OWN_YAML}.{name}") for name in _TRAINED_WITH if name in own}
    return VQConfig(mid_attention=vanilla, **read)


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
        "tanh_out": config.tanh_out,
    }
    params = {"embed_dim": config.code_width, "n_embed": config.codes, "ddconfig": inner}
    made: dict[str, Any] = {"model": {"params": params}}
    plain = VQConfig()
    if own := {name: getattr(config, name) for name in _TRAINED_WITH if getattr(config, name) != getattr(plain, name)}:
        made[OWN_YAML] = own
    (target / YAML).write_text(yaml.safe_dump(made, sort_keys=False))
    torch.save({"state_dict": dict(model.state_dict())}, target / CKPT)
    return target
