"""A decoding step in one call of `decode.cpp`: on the CPU, operators of a few rows cost more than what they compute."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder, DecoderAttention, DecoderConfig, DecoderLayer, GatedMLP, HeadLayerNorm
from ..nn.cache import Cache
from ..nn.layers import Linear, RMSNorm
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
    also after they have been written into, and keeps those alive that the model has exchanged for others."""

    def __init__(self, model: Generative, kernels: ctypes.CDLL):
        self.decoder, self.config, head = model.model, model.config_text, model.head_weight
        self.function = getattr(kernels, FUNCTIONS[head.dtype])
        self.vocabulary, self.held = head.shape[0], [parameter.data for parameter in model.model.parameters()]
        self.layers = (_Layer * self.config.depth)(*map(_layer, self.decoder.layers))
        self.norm, self.output = self.decoder.norm.weight.data_ptr(), self._linear(head)

    def _linear(self, weight: Tensor) -> Structure:
        self.held.append(weight.detach())
        return _Linear(weight.data_ptr(), None, weight.shape[1], weight.shape[0])

    @classmethod
    def of(cls, model: Generative) -> DecodeStep | None:
        """None where the plain operators must do: see `can_step`; or where there is no compiler."""
        kernels = library("decode") if can_step(model) else None
        return cls(model, kernels) if kernels else None

    def __call__(self, x_ND: Tensor, positions_N: Tensor, cache: Cache) -> Tensor:
        """Embeddings (N, D) of the newest tokens of the conversations that `cache.begin` announced, one of each, at these places -> float32
        scores (N, V) of those that come after them. Their keys and values stand in the cache then; `commit` makes them count."""
        config, x_ND = self.config, x_ND.contiguous()
        cos, sin = (table.contiguous() for table in self.decoder.rope.tables(positions_N, x_ND.dtype))
        slots_N, totals_N = torch.tensor(cache.slots), torch.tensor(cache.totals)
        scores_NV = torch.empty(len(x_ND), self.vocabulary)
        step = _Step(
            rows=len(x_ND), width=config.width, heads=config.heads, kv_heads=config.kv_heads, head=config.head_width,
            mlp_width=config.mlp_width, depth=config.depth, swin=config.swin_norm, slots=cache.store.shape[1], capacity=cache.capacity,
            most=cache.most, threads=torch.get_num_threads(), eps=config.norm_eps, slot=slots_N.data_ptr(), total=totals_N.data_ptr(),
            x=x_ND.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), store=cache.store.data_ptr(), layers=self.layers, norm=self.norm,
            output=self.output, scores=scores_NV.data_ptr(),
        )  # fmt: skip
        self.function(ctypes.byref(step))
        return scores_NV


def _layer(layer: nn.Module) -> Structure:
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    linears = dict(
        q=attention.q_proj, k=attention.k_proj, v=attention.v_proj, o=attention.o_proj,
        gate=mlp.gate_proj, up=mlp.up_proj, down=mlp.down_proj,
    )  # fmt: skip
    made: dict[str, Any] = {
        name: _Linear(
            each.weight.data_ptr(), None if each.bias is None else each.bias.data_ptr(), each.in_features, each.out_features
        )
        for name, each in linears.items()
    }
    norms = dict(input_norm=layer.input_layernorm, mlp_norm=layer.post_attention_layernorm)
    if attention.normed:
        norms |= dict(q_norm=attention.q_norm, k_norm=attention.k_norm)
    for name, norm in norms.items():
        made[name] = norm.weight.data_ptr()
        if isinstance(norm, HeadLayerNorm):
            made[f"{name}_bias"] = norm.bias.data_ptr()
    return _Layer(**made)


def can_step(model: Generative) -> bool:
    """Whether the kernel computes what this model's modules would: on the CPU, all weights of one type, float32 or bf16; no adapter, hook
    or dropout; the activation is SiLU, and widths are multiples of 16."""
    config: DecoderConfig = model.config_text
    modules = [*model.model.modules(), *([model.lm_head] if model.lm_head is not None else [])]
    if any(type(module) not in KNOWN or module._forward_hooks or module._forward_pre_hooks for module in modules):
        return False
    weights = [parameter.data for module in modules for parameter in module.parameters(recurse=False)]
    plain = all(type(weight) is Tensor and weight.is_cpu and weight.is_contiguous() for weight in weights)
    types = {weight.dtype for weight in weights}
    widths = (config.width, config.head_width, config.heads * config.head_width, config.mlp_width)
    dropping = model.training and any(layer.dropout for layer in model.model.layers if isinstance(layer, DecoderLayer))
    return (
        plain
        and len(types) == 1
        and types <= set(FUNCTIONS)
        and config.activation == "silu"
        and not any(width % 16 for width in widths)
        and not dropping
    )
