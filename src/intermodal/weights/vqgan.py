"""VQGAN checkpoints: ours (config.json + safetensors) and the authors' (`vqgan.yaml` + `vqgan.ckpt`, as Chameleon ships it). Key names are
the authors' in both; a GAN's and a loss's own weights are passed over."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, IntermodalError
from ..models.vqvae import VQVAE, VQConfig
from .rules import Ignore, Rename, Rule, check_against, convert

YAML, CKPT = "vqgan.yaml", "vqgan.ckpt"


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
    import yaml

    where = Path(folder)
    for name in (YAML, CKPT):
        if not (where / name).is_file():
            raise CheckpointError(f"{where} holds no {name}: Chameleon's tokenizer folder has {YAML} and {CKPT}")
    try:
        params = yaml.safe_load((where / YAML).read_text())["model"]["params"]
        inner = params["ddconfig"]
        config = VQConfig(
            resolution=inner["resolution"],
            channels=inner["in_channels"],
            width=inner["ch"],
            multipliers=tuple(inner["ch_mult"]),
            res_blocks=inner["num_res_blocks"],
            attention=tuple(inner["attn_resolutions"]),
            latent_channels=inner["z_channels"],
            double_latent=inner["double_z"],
            code_width=params["embed_dim"],
            codes=params["n_embed"],
        )
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where / YAML} is not a VQGAN config: {error!r}") from error
    try:
        # weights_only: a pickle may otherwise run code
        state = torch.load(where / CKPT, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here
        raise CheckpointError(f"{where / CKPT} cannot be read as weights alone: {error}") from error
    return _filled(config, state.get("state_dict", state), str(where / CKPT))


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
