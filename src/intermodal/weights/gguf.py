"""GGUF files of the llama architecture, as llama.cpp writes them: de-quantised weights, config and tokenizer. Read only.

llama.cpp permutes the rows of q and k from the halves layout of rotary pairs to neighbouring pairs (its `convert_hf_to_gguf.py`,
`LlamaModel.permute`); reading undoes that. Needs the `gguf` package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.decoder import DecoderConfig
from ..nn.rope import RopeConfig
from .rules import Rename, Rule

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Unpermute(Rule):
    """Rows of a projection in neighbouring rotary pairs -> in halves. Read only."""

    def __init__(self, theirs: str, ours: str, *, heads: int):
        super().__init__((theirs,), (ours,))
        object.__setattr__(self, "heads", heads)

    def load(self, tensors: list[Tensor]) -> list[Tensor]:
        return [unpermute(tensors[0], self.heads)]  # pyright: ignore[reportAttributeAccessIssue]


def rules(config: DecoderConfig) -> list[Rule]:
    """llama.cpp's names of the llama architecture."""
    layer, ours = "blk.{n}", "model.layers.{n}"
    return [
        *(Rename(f"{theirs}.{{rest}}", f"{name}.{{rest}}") for theirs, name in _TOP.items()),
        *(Rename(f"{layer}.{theirs}.{{rest}}", f"{ours}.{name}.{{rest}}") for theirs, name in _LAYER.items()),
        Unpermute(f"{layer}.attn_q.{{rest}}", f"{ours}.self_attn.q_proj.{{rest}}", heads=config.heads),
        Unpermute(f"{layer}.attn_k.{{rest}}", f"{ours}.self_attn.k_proj.{{rest}}", heads=config.kv_heads),
    ]


def read(path: Path) -> tuple[str, DecoderConfig, dict[str, Any], list[Rule], dict[str, Tensor], Any]:
    """(family, config, the same as a Hugging Face config, key table, weights by the file's keys, chat processor).

    Raises:
        CheckpointError: the package is missing, the file is damaged, or the architecture is another one.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(f"{path}: reading GGUF needs a package: pip install 'intermodal[gguf]'") from error
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file (cut short while copying?): {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: GGUF architecture {architecture!r} is not read; llama is")
    get = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    if get.get("rope.scaling.type") not in (None, "none"):
        raise CheckpointError(f"{path}: rope scaling {get['rope.scaling.type']!r} in GGUF is not read")
    names = {tensor.name for tensor in reader.tensors}
    heads, width = int(get["attention.head_count"]), int(get["embedding_length"])
    config = DecoderConfig(
        width=width,
        depth=int(get["block_count"]),
        heads=heads,
        kv_heads=int(get.get("attention.head_count_kv", heads)),
        head_width=int(get.get("attention.key_length", get.get("rope.dimension_count", width // heads))),
        mlp_width=int(get["feed_forward_length"]),
        vocab_size=int(get.get("vocab_size", len(fields["tokenizer.ggml.tokens"]))),
        context=int(get["context_length"]),
        norm_eps=float(str(np.float32(get["attention.layer_norm_rms_epsilon"]))),
        rope=RopeConfig(theta=float(get.get("rope.freq_base", 10_000.0))),
        tied="output.weight" not in names,
    )
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        try:
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {tensor.name} of type {tensor.tensor_type.name} cannot be de-quantised: {error}"
            ) from error
        state[tensor.name] = values
    from ..inputs.chat import ChatProcessor
    from .decoder import text_to_hf
    from .gguf_tokenizer import files_from_gguf

    raw = {**text_to_hf(config, "llama"), "model_type": "llama"}
    for name in ("bos", "eos"):
        token = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            raw[f"{name}_token_id"] = int(token)
    return "llama", config, raw, rules(config), state, ChatProcessor.from_files(files_from_gguf(fields, path), raw)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """(H * K, D) rows in neighbouring pairs -> in halves."""
    half = rows.shape[0] // heads // 2
    return rows.unflatten(0, (heads, half, 2)).transpose(1, 2).flatten(0, 2)
