"""What every model with a decoder and an output layer can do: score a conversation, reply, stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..batch import States, TokenBatch, Visual
from ..inputs.messages import with_tools
from ..inputs.vision_cache import Tower
from ..nn.cache import Cache
from ..nn.layers import linear
from .decoder import Decoder, DecoderConfig, DeepStack

if TYPE_CHECKING:
    from ..generate.engine import Event, Reply
    from ..inputs.chat import ChatProcessor
    from ..inputs.vision_cache import VisionCache

Tools = Sequence[dict[str, Any]] | None


def counting(layer: nn.Module) -> dict[str, float]:
    """peft's adapters that come on top of a layer's weight, with their factors: not what is switched off or already merged into it."""
    peft: Any = layer
    if not hasattr(layer, "active_adapters") or peft.disable_adapters:
        return {}
    factors = getattr(layer, "scaling", {})  # a module that peft trains whole has none
    return {name: factors[name] for name in peft.active_adapters if name in factors and name not in peft.merged_adapters}


class Generative(nn.Module):
    """Base of `LanguageModel` and the stitched models. Subclasses with eyes say how they `see` and `connect`."""

    model: Decoder
    lm_head: nn.Linear | None
    family: str
    config: Any
    processor: ChatProcessor | None
    source: dict[str, Any]
    tower: tuple[str, ...] = ()
    """What the tower's parameters are called, and after "-" what of it is the connector."""
    vision_cache: VisionCache | None = None
    """Where the tower's states of items with a key are kept."""

    def _init_decoder(self, config: DecoderConfig) -> None:
        self.model = Decoder(config)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.source, self.processor = {}, None

    @property
    def config_text(self) -> DecoderConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def picture_side(self) -> int:
        """Pixels of a side of pictures that are made for it: what its eyes take, or 64 where they take any size."""
        config: Any = self.config
        return getattr(config, "side", None) or getattr(getattr(config, "vision", None), "image_size", 64)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) of the output layer, with what an adapter on it adds: the loss is made from the weight, not by the layer's own forward."""
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        weight, head = self.lm_head.weight, cast(Any, self.lm_head)
        for adapter in counting(head):
            weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
        return weight

    def embed(self, batch: TokenBatch) -> tuple[Tensor, DeepStack | None]:
        """A pack's input to the decoder: (T, D), and what is added after its first layers."""
        x_TD = self.model.embed_tokens(batch.ids)
        if batch.visual is None or batch.visual_rows is None:
            return x_TD, None
        features_VD, deep = self.connect(self.states(batch.visual), batch.visual)
        x_TD = x_TD.index_copy(0, batch.visual_rows, features_VD.to(x_TD.dtype))
        return x_TD, DeepStack(batch.visual_rows, deep) if deep else None

    def see(self, visual: Visual) -> States:
        """What the vision tower says of `visual.pixels`, before the connector: rows as in `Visual.rows`."""
        raise NotImplementedError(f"a {type(self).__name__} has no vision tower")

    def connect(self, states: States, visual: Visual) -> tuple[Tensor, list[Tensor]]:
        """The tower's states of all items -> the decoder's tokens (V, D), and one such tensor for each DeepStack layer."""
        raise NotImplementedError(f"a {type(self).__name__} has no vision tower")

    def tower_parameters(self) -> Tower:
        """Everything that `see` depends on."""
        inside = tuple(name for name in self.tower if not name.startswith("-"))
        outside = tuple(name[1:] for name in self.tower if name.startswith("-"))

        def belongs(name: str) -> bool:
            return name.startswith(inside) and not name.startswith(outside)

        parameters, adapters = {}, {}
        for path, module in self.named_modules():  # once, and what is cheap in each: a server asks before every reply
            if belongs(f"{path}."):
                parameters |= {f"{path}.{name}": p for name, p in module._parameters.items() if p is not None}
                if hasattr(type(module), "active_adapters"):  # of an instance, nn.Module looks in three places before it says no
                    adapters[path] = counting(module)
        return Tower(parameters, adapters)

    def states(self, visual: Visual) -> States:
        """The tower's states of all items: of those known already from there, of the others by looking. New ones with a key are kept."""
        if not any(states is not None for states in visual.known):
            return self._look(visual)
        new = visual.unknown()
        looked: list[States] = []
        if len(new.rows()):
            states = self._look(new)
            looked = list(zip(*(state.split(new.rows()) for state in states), strict=True))
        found = iter(looked)
        items = [next(found) if states is None else states for states in visual.known]
        return tuple(torch.cat(layer) for layer in zip(*items, strict=True))

    def _look(self, visual: Visual) -> States:
        """What the tower says, laid out as states from a cache are: a bf16 product of a view (LLaVA's, without the class token) rounds
        otherwise, and a resumed run would not be the uninterrupted one."""
        states = tuple(state.contiguous() for state in self.see(visual))
        self._keep(states, visual)
        return states

    def _keep(self, states: States, visual: Visual) -> None:
        if self.vision_cache is not None and visual.keys:
            parts = zip(*(state.detach().split(visual.rows()) for state in states), strict=True)
            for key, item in zip(visual.keys, parts, strict=True):
                self.vision_cache.put(key, item)

    def hidden(self, batch: TokenBatch, cache: Cache | None = None) -> Tensor:
        """A pack -> normalised hidden states (T, D)."""
        x_TD, deepstack = self.embed(batch)
        return self.model(x_TD, batch.segments, batch.positions, cache=cache, deepstack=deepstack)

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> scores (T, V)."""
        return linear(hidden_TD, self.head_weight)

    def forward(self, batch: TokenBatch) -> Tensor:
        """A pack -> scores (T, V)."""
        return self.unembed(self.hidden(batch))

    @torch.no_grad()
    def logits(self, messages: Sequence[dict[str, Any]], *, tools: Tools = None) -> Tensor:
        """(T, V) float32 scores of one whole conversation, teacher-forced."""
        return self(self.processor(messages, tools=tools).to(self.device)).float()  # pyright: ignore[reportOptionalCall]

    def generate(self, messages: Sequence[dict[str, Any]], *, tools: Tools = None, **settings: Any) -> Reply:
        """Reply to one conversation; settings are those of `generate.sample.Sampling`.

        Args:
            tools: JSON schemas of what the model may call, for its chat template. A call comes as text, in the model's own form.
        """
        return self.generate_batch([messages], tools=tools, **settings)[0]

    def generate_batch(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        *,
        tools: Tools = None,
        slots: int = 16,
        progress: bool = False,
        **settings: Any,
    ) -> list[Reply]:
        """Reply to many conversations, `slots` of them at a time; each as if it were alone. `tools` are for all of them."""
        from ..generate.engine import replies
        from ..generate.sample import sampling_of

        if tools:
            conversations = [with_tools(messages, tools) for messages in conversations]
        return replies(self, conversations, sampling_of(settings), slots=slots, progress=progress)

    def stream(self, messages: Sequence[dict[str, Any]], *, tools: Tools = None, **settings: Any) -> Iterator[Event]:
        """Pieces of text as they come, pictures as they grow (`Partial`), then the `Reply`."""
        from ..generate.engine import stream
        from ..generate.sample import sampling_of

        return stream(self, with_tools(messages, tools), sampling_of(settings))


class LanguageModel(Generative):
    """A decoder with its output layer: text in, text out."""

    def __init__(self, config: DecoderConfig, family: str = "llama"):
        super().__init__()
        self.config, self.family = config, family
        self._init_decoder(config)
