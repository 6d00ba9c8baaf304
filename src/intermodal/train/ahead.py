"""A look at the stages to come before the first of them trains: what would stop one at its start is found hours earlier."""

from __future__ import annotations

import copy
from collections.abc import Collection

from ..data.packing import TalkFetcher
from ..data.talks import open_talks
from ..errors import IntermodalError
from ..inputs.chat import ChatProcessor
from ..inputs.video import sampling_of
from ..models.generative import Generative
from . import lora
from .optim import rates_of
from .recipe import Stage, TalksConfig


def read_as(processor: ChatProcessor, data: TalksConfig) -> None:
    """Have conversations read as a stage's data section says."""
    processor.video = sampling_of(processor.video, data.video_fps, data.video_frames)
    if data.variables is not None:
        processor.variables = dict(data.variables)


def look_ahead(model: Generative, stage: Stage) -> None:
    """Check a later stage against the model with which the first one begins: its patterns, its adapters, a cache of the tower, and a few
    conversations of each source.

    Args:
        model: without adapters, as it is when a stage begins.

    Raises:
        IntermodalError: the stage could not begin; with its name.
    """
    try:
        names = [name for name, _ in model.named_parameters()]
        if stage.lora is not None:
            names = lora.names_with(names, lora.layers_of(model, stage.lora))
        rates = rates_of(names, stage.learn)
        if stage.cache_tower:
            refuse_learning_tower(model, rates)
        data, processor = stage.data, copy.copy(model.processor)
        assert processor is not None
        read_as(processor, data)
        side = data.side or model.picture_side
        sources = [open_talks(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in data.train]
        TalkFetcher(sources, processor, data.seed, data.tokens, model.config_text.context, None).audit(data.max_reject_share)
    except IntermodalError as error:
        raise type(error)(f"stage {stage.name}, which is still to come: {error}") from None


def refuse_learning_tower(model: Generative, learning: Collection[str]) -> None:
    """Raises IntermodalError: the tower's states are to be kept, and it learns, by adapters or by itself, or there is none."""
    tower = model.tower_parameters()
    learns = [
        name for name in learning if {name, name.replace(".base_layer.", "."), f"{name.split('.lora_')[0]}.weight"} & tower.keys()
    ]
    if learns or not tower:
        why = f"{learns[0]} learns" if learns else f"a {model.family} has none"
        raise IntermodalError(f"cache_tower keeps what a frozen tower says, and {why}")
