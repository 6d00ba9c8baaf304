"""Low-rank adapters on any part of a model, through peft: put in, saved beside the model, merged."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, IntermodalError
from ..files import read_json
from .recipe import LoraConfig

ADAPTER = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


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
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: dict[str, None] = {}
    for pattern in config.targets:
        fitting = fnmatch.filter(linear, pattern)
        if not fitting:
            raise IntermodalError(
                f"no linear layer fits {pattern!r}; there are {', '.join(sorted({n.rsplit('.', 1)[-1] for n in linear}))}"
            )
        chosen |= dict.fromkeys(fitting)
    names = list(chosen)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # annotated int, used as a factor
        lora_dropout=config.dropout,
        target_modules="|".join(re.escape(name) for name in names),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # every rank draws the same adapters
        peft.inject_adapter_in_model(settings, model)
    return names


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' own weights."""
    return {name: value.detach().contiguous() for name, value in model.state_dict().items() if ".lora_" in name}


def save(model: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Write the adapters alone: a few megabytes, under this library's parameter names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state(model), folder / ADAPTER)
    (folder / SETTINGS).write_text(json.dumps({"peft_type": "LORA", "library": "intermodal", **asdict(config)}, indent=2) + "\n")


def load(model: nn.Module, folder: Path) -> LoraConfig:
    """Put saved adapters on the model they were trained on, in place.

    Raises:
        CheckpointError: the folder holds no adapters, or those of a model of another shape.
    """
    from safetensors.torch import load_file

    from ..config import from_dict

    if not (folder / ADAPTER).exists():
        raise CheckpointError(f"{folder} holds no adapters ({ADAPTER})")
    values: dict[str, Any] = {k: v for k, v in read_json(folder / SETTINGS).items() if k not in ("peft_type", "library")}
    config = from_dict(LoraConfig, values)
    add(model, config)
    saved, wanted = load_file(folder / ADAPTER), state(model)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in wanted.items()}:
        other = sorted(saved.keys() ^ wanted.keys())[:3] or "other shapes"
        raise CheckpointError(f"{folder}: the adapters are of another model ({other})")
    model.load_state_dict(saved, strict=False)
    return config


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
