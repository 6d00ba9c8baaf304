"""A decoding step in one call of `decode.cpp`: on the CPU, operators of a few rows cost more than what they compute."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder, DecoderAttention, DecoderConfig, DecoderLayer, GatedMLP, HeadLayerNorm
from ..nn.cache import Cache
from ..nn.layers import ACTIVATIONS, Linear, RMSNorm
from .build import library

if TYPE_CHECKING:
    from ..models.generative import Generative

KNOWN = (Decoder, DecoderLayer, DecoderAttention, GatedMLP, HeadLayerNorm, Linear, RMSNorm, nn.Embedding, nn.ModuleList, nn.Linear)
"""Modules whose `forward` the kernel stands for; an adapter has one of its own."""
FUNCTIONS = {torch.float32: "decode_float32", torch.bfloat16: "decode_bfloat16"}


def _structure(name: str, *groups: tuple[str, Any]) -> type[Structure]:
    """A struct of `decode.cpp`, its fields in their order: names and the type of each group."""
    return type(name, (Structure,), {"_fields_": [(field, kind) for names, kind in groups for field in names.split()]})


_Linear = _structure("_Linear", ("weight bias", c_void_p), ("inputs outputs", c_int64))
_Layer = _structure(
    "_Layer",
    ("q k v o gate up down", _Linear),
    ("input_norm mlp_norm q_norm q_norm_bias k_norm k_norm_bias", c_void_p),
)
_Step = _structure(
    "_Step",
    ("rows width heads kv_heads head mlp_width depth swin slots capacity most threads", c_int64),
    ("eps", c_double),
    ("slot total x cos sin store", c_void_p),
    ("layers", POINTER(_Layer)),
    ("norm", c_void_p),
    ("output", _Linear),
    ("scores", c_void_p),
)


class DecodeStep:
    """One new token of each of some conversations through all layers and the output layer. It reads the model's weights where they stand,
    also after they have been written into. Adapters and hooks that come while it is in use are not seen: whoever generates makes it anew
    for each generation, and where `is_current` says no."""

    def __init__(self, model: Generative, kernels: ctypes.CDLL):
        self.rope, self.config, head = model.model.rope, model.config_text, model.head_weight
        self.dtype, self.vocabulary = head.dtype, head.shape[0]
        self.function = getattr(kernels, FUNCTIONS[self.dtype])
        self.parameters = [*model.model.parameters(), head]  # kept: the model may let go of them
        self.addresses = self._addresses()
        self.layers = (_Layer * self.config.depth)(*map(_layer, model.model.layers))
        self.norm, self.output = model.model.norm.weight.data_ptr(), _linear(head, None)

    @classmethod
    def of(cls, model: Generative) -> DecodeStep | None:
        """None where the plain operators must do: see `can_step`; or where there is no compiler."""
        kernels = library("decode") if can_step(model) else None
        return cls(model, kernels) if kernels else None

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters]

    def is_current(self) -> bool:
        """Whether the weights stand where they did: not after `to`, `share_memory` or another `data`."""
        return self.addresses == self._addresses()

    def __call__(self, x_ND: Tensor, positions_N: Tensor, cache: Cache) -> Tensor:
        """Embeddings (N, D) of the newest tokens of the conversations that `cache.begin` announced, one of each, at these places -> float32
        scores (N, V) of those that come after them. Their keys and values stand in the cache then; `commit` makes them count.

        Raises:
            MemoryError: there is none for what a step writes between its operators.
            TypeError: embeddings or a cache of another type than the weights, or on another device.
        """
        if not (x_ND.dtype == cache.dtype == self.dtype and x_ND.is_cpu and cache.store.is_cpu):
            raise TypeError(
                f"a step of {self.dtype} on the CPU, and embeddings of {x_ND.dtype}, a cache of {cache.dtype} on {cache.device}"
            )
        config, x_ND, here = self.config, x_ND.contiguous(), torch.device("cpu")  # whatever the default device
        cos, sin = (table.contiguous() for table in self.rope.tables(positions_N, self.dtype))
        slots_N, totals_N = (torch.tensor(numbers, dtype=torch.int64, device=here) for numbers in (cache.slots, cache.totals))
        scores_NV = torch.empty(len(x_ND), self.vocabulary, dtype=torch.float32, device=here)
        step = _Step(
            rows=len(x_ND), width=config.width, heads=config.heads, kv_heads=config.kv_heads, head=config.head_width,
            mlp_width=config.mlp_width, depth=config.depth, swin=config.swin_norm, slots=cache.store.shape[1], capacity=cache.capacity,
            most=cache.most, threads=torch.get_num_threads(), eps=config.norm_eps, slot=slots_N.data_ptr(), total=totals_N.data_ptr(),
            x=x_ND.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), store=cache.store.data_ptr(), layers=self.layers, norm=self.norm,
            output=self.output, scores=scores_NV.data_ptr(),
        )  # fmt: skip
        if self.function(ctypes.byref(step)):
            raise MemoryError(f"no memory for a decoding step of {len(x_ND)} conversations")
        return scores_NV


def _linear(weight: Tensor, bias: Tensor | None) -> Structure:
    return _Linear(weight.data_ptr(), None if bias is None else bias.data_ptr(), weight.shape[1], weight.shape[0])


def _layer(layer: nn.Module) -> Structure:
    assert isinstance(layer, DecoderLayer)  # a ModuleList's members are modules of any kind to a type checker
    attention, mlp = layer.self_attn, layer.mlp
    linears = dict(
        q=attention.q_proj, k=attention.k_proj, v=attention.v_proj, o=attention.o_proj,
        gate=mlp.gate_proj, up=mlp.up_proj, down=mlp.down_proj,
    )  # fmt: skip
    made: dict[str, Any] = {name: _linear(each.weight, each.bias) for name, each in linears.items()}
    norms = dict(input_norm=layer.input_layernorm, mlp_norm=layer.post_attention_layernorm)
    if attention.normed:
        norms |= dict(q_norm=attention.q_norm, k_norm=attention.k_norm)
    for name, norm in norms.items():
        made[name] = norm.weight.data_ptr()
        if isinstance(norm, HeadLayerNorm):
            made[f"{name}_bias"] = norm.bias.data_ptr()
    return _Layer(**made)


def can_step(model: Generative) -> bool:
    """Whether the kernel computes what this model's modules would: on the CPU, all weights of one type, float32 or bf16, in the shapes that
    the config says; no adapter, hook, exchanged `forward` or dropout; the activation is SiLU, and widths are multiples of 16."""
    config, decoder, head = model.config_text, model.model, model.lm_head
    modules = [*decoder.modules(), *([head] if head is not None else [])]
    watched = torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks
    if watched or not all(map(_is_plain, modules)) or len(decoder.layers) != config.depth:
        return False
    weights = [parameter.data for module in modules for parameter in module.parameters(recurse=False)]
    types = {weight.dtype for weight in weights}
    return (
        all(_is_as(config, layer, index) for index, layer in enumerate(decoder.layers))
        and all(type(weight) is Tensor and weight.layout == torch.strided for weight in weights)
        and all(weight.is_cpu and weight.is_contiguous() for weight in weights)
        and len(types) == 1
        and types <= set(FUNCTIONS)
        and model.head_weight.shape[1] == config.width
        and decoder.norm.weight.shape == (config.width,)
        and decoder.norm.eps == config.norm_eps
    )


def _is_plain(module: nn.Module) -> bool:
    return type(module) in KNOWN and "forward" not in vars(module) and not (module._forward_hooks or module._forward_pre_hooks)


def _is_as(config: DecoderConfig, layer: nn.Module, index: int) -> bool:
    """Whether a layer of plain modules has the shapes and settings of the config, which the kernel goes by."""
    assert isinstance(layer, DecoderLayer)
    attention, mlp, norms = layer.self_attn, layer.mlp, [layer.input_layernorm, layer.post_attention_layernorm]
    width, inside, keys = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    linears = [
        (attention.q_proj, (inside, width)),
        (attention.k_proj, (keys, width)),
        (attention.v_proj, (keys, width)),
        (attention.o_proj, (width, inside)),
        (mlp.gate_proj, (config.mlp_width, width)),
        (mlp.up_proj, (config.mlp_width, width)),
        (mlp.down_proj, (width, config.mlp_width)),
    ]
    pairs = [(linear.weight, shape) for linear, shape in linears]
    pairs += [(linear.bias, shape[:1]) for linear, shape in linears if linear.bias is not None]
    pairs += [(norm.weight, (width,)) for norm in norms]
    if config.qk_norm:
        norms += [attention.q_norm, attention.k_norm]
        pairs += [(norm.weight, (config.head_width,)) for norm in norms[2:]]
    if config.qk_layernorm:
        heads = (attention.q_norm, config.heads), (attention.k_norm, config.kv_heads)
        pairs += [(each, (count, config.head_width)) for norm, count in heads for each in (norm.weight, norm.bias)]
    return (
        attention.index == index
        and attention.normed == (config.qk_norm or config.qk_layernorm)
        and all(weight.shape == shape for weight, shape in pairs)
        and all(norm.eps == config.norm_eps for norm in norms)
        and mlp.activation is ACTIVATIONS["silu"]
        and not any(side % 16 for side in (width, config.head_width, inside, config.mlp_width))
        and not (layer.dropout and layer.training)
    )
