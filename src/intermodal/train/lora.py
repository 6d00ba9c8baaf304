"""Low-rank adapters on any part of a model, through peft: put in, saved beside the model, merged."""

from __future__ import annotations

import fnmatch
import json
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import from_dict
from ..errors import CheckpointError, IntermodalError
from ..files import read_json, write_whole
from .recipe import LoraConfig

ADAPTER = "adapter_model.safetensors"
PEFT_SETTINGS = "adapter_config.json"
SETTINGS = "lora.json"
"""The recipe's own, with its patterns of layers."""
PREFIX = "base_model.model."
"""Before every key of peft's file."""


def add(model: nn.Module, config: LoraConfig, seed: int = 0) -> list[str]:
    """Put adapters on the linear layers that the patterns fit, in place; returns those layers' names.

    An adapter starts as zero: the model computes what it did. The parameters are called `....lora_A.default.weight` and `lora_B`; give
    them a rate with the pattern `*lora_*`.

    Raises:
        IntermodalError: a pattern fits no linear layer, or peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise IntermodalError("LoRA needs peft: pip install 'intermodal[lora]'") from None
    names = layers_of(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # every rank draws the same adapters
        peft.inject_adapter_in_model(_peft_config(config, names), model)
    return names


def layers_of(model: nn.Module, config: LoraConfig) -> list[str]:
    """The linear layers that get an adapter. Raises IntermodalError: a pattern fits none."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: dict[str, None] = {}
    for pattern in config.targets:
        fitting = fnmatch.filter(linear, pattern)
        if not fitting:
            leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(linear)}
            raise IntermodalError(
                f"no linear layer fits {pattern!r}; there are {', '.join(leaves[leaf] for leaf in sorted(leaves))}"
            )
        chosen |= dict.fromkeys(fitting)
    return list(chosen)


def names_with(names: Sequence[str], layers: Sequence[str]) -> list[str]:
    """What a model's parameters are called when those layers have adapters."""
    adapted = set(layers)
    split = [name.rpartition(".") for name in names]
    inside = [f"{layer}.base_layer.{leaf}" if layer in adapted else f"{layer}.{leaf}".lstrip(".") for layer, _, leaf in split]
    return [*inside, *(f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB")]


def state(model: nn.Module, learned: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The adapters' own weights, and those that learned beside them."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if ".lora_" in name or name in learned}


def save(model: nn.Module, config: LoraConfig, folder: Path, learned: Collection[str] = (), base: str | Path | None = None) -> None:
    """Write the adapters and whatever learned beside them, in peft's form under this library's parameter names: a few megabytes where
    only adapters learned, as much as the whole model where all of it did.

    `peft.PeftModel.from_pretrained(model, folder)` takes all of it: what is no adapter it puts in the base model's place, as it does with
    trained embedding tables.

    Args:
        learned: parameters that learned, by name; without them the base with its adapters would not be the model that was trained.
        base: the model that they go with.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({_in_peft(name): value for name, value in state(model, learned).items()}, folder / ADAPTER, metadata={"format": "pt"})
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    written = _peft_config(config, names)
    written.base_model_name_or_path, written.inference_mode = None if base is None else str(base), True
    written.save_pretrained(str(folder))  # adapter_config.json
    write_whole(folder / SETTINGS, json.dumps(asdict(config), indent=2) + "\n")


def load(model: nn.Module, folder: Path) -> LoraConfig:
    """Put saved adapters, and what learned beside them, on the model they were trained on, in place.

    Raises:
        CheckpointError: the folder holds no adapters, those of a model of another shape, or those that another library wrote.
    """
    from safetensors.torch import load_file

    if not (folder / ADAPTER).exists():
        raise CheckpointError(f"{folder} holds no adapters ({ADAPTER})")
    config = _settings(folder)
    add(model, config)
    saved = {_in_model(key): value for key, value in load_file(folder / ADAPTER).items()}
    wanted = state(model, saved)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in wanted.items()}:
        other = sorted(saved.keys() ^ wanted.keys())[:3] or "other shapes"
        raise CheckpointError(f"{folder}: the adapters are of another model ({other})")
    model.load_state_dict(saved, strict=False)
    return config


def _settings(folder: Path) -> LoraConfig:
    if (folder / SETTINGS).exists():
        return from_dict(LoraConfig, read_json(folder / SETTINGS))
    older = read_json(folder / PEFT_SETTINGS)
    if older.pop("library", None) != "intermodal":
        raise CheckpointError(
            f"{folder} holds adapters that were not written here (no {SETTINGS}): put them on with peft.PeftModel.from_pretrained, whose "
            "target_modules must then name this library's layers"
        )
    warnings.warn(
        f"{folder} was written when only adapters were kept: if anything else learned in that stage, it is in the stage's model/ alone",
        stacklevel=3,
    )
    return from_dict(LoraConfig, {name: value for name, value in older.items() if name != "peft_type"})


def _in_peft(name: str) -> str:
    """A parameter's key in peft's file, which leaves the adapter's name out."""
    return PREFIX + re.sub(r"(\.lora_[AB])\.default\.", r"\1.", name)


def _in_model(key: str) -> str:
    return re.sub(r"(\.lora_[AB])\.(?!default\.)", r"\1.default.", key.removeprefix(PREFIX))


def _peft_config(config: LoraConfig, names: Sequence[str]) -> Any:
    """peft's settings for adapters on exactly these layers."""
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # annotated int, used as a factor
        lora_dropout=config.dropout,
        target_modules="|".join(re.escape(name) for name in names),
    )


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to the weight it sits on and take it away, in place: plain layers that compute the same."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        module.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.get_base_layer())
