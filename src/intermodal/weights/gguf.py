"""GGUF files of the llama architecture, as llama.cpp writes them: de-quantised weights, config and tokenizer. Read only.

llama.cpp permutes the rows of q and k from the halves layout of rotary pairs to neighbouring pairs (its `convert_hf_to_gguf.py`,
`LlamaModel.permute`); reading undoes that. Needs the `gguf` package.
"""

from __future__ import annotations

import math
from dataclasses import replace
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


DIVISORS = "rope_freqs.weight"
"""Llama 3.1 and later: what each frequency is divided by."""
_SCALING = ("type", "factor", "original_context_length", "finetuned")
"""Of `rope.scaling.`, what is read; other settings change the angles. `finetuned` is a note."""
_PLAIN = {"attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
"""Settings that say what holds without them."""


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


def _opened(path: Path) -> Any:
    """The `gguf` package's reader of a file. Raises CheckpointError: the package is missing, or the file is damaged."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(f"{path}: reading GGUF needs a package: pip install 'intermodal[gguf]'") from error

    class Reader(GGUFReader):
        """It cuts the file for each of 50,000 tokens, and a cut of a plain array takes a quarter of one of a memory map."""

        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, mapped):
            self._data = mapped.view(np.ndarray)

    try:
        return Reader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file (cut short while copying?): {error}") from error


def read(path: Path) -> tuple[str, DecoderConfig, dict[str, Any], list[Rule], dict[str, Tensor], Any]:
    """(family, config, the same as a Hugging Face config, key table, weights by the file's keys, chat processor).

    Raises:
        CheckpointError: the package is missing, the file is damaged, the architecture or the kind of tokenizer is another one, or its
            rope is scaled in a way that is not built.
    """
    reader = _opened(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: GGUF architecture {architecture!r} is not read; llama is")
    get = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    heads, width = int(get["attention.head_count"]), int(get["embedding_length"])
    head_width = int(get.get("attention.key_length", get.get("rope.dimension_count", width // heads)))
    state = _tensors(reader, path)
    table = state.get("token_embd.weight", ())  # where it is missing, loading says so
    rows = len(table) or int(get.get("vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))))
    config = DecoderConfig(
        width=width,
        depth=int(get["block_count"]),
        heads=heads,
        kv_heads=int(get.get("attention.head_count_kv", heads)),
        head_width=head_width,
        mlp_width=int(get["feed_forward_length"]),
        vocab_size=rows,
        context=int(get["context_length"]),
        norm_eps=float(str(np.float32(get["attention.layer_norm_rms_epsilon"]))),
        rope=_rope(get, state.pop(DIVISORS, None), head_width, path),
        tied="output.weight" not in state,
    )
    from ..inputs.chat import ChatProcessor
    from .decoder import text_to_hf
    from .gguf_tokenizer import files_from_gguf

    raw = {**text_to_hf(config, "llama"), "model_type": "llama"}
    for name in ("bos", "eos"):
        token = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            raw[f"{name}_token_id"] = int(token)
    return "llama", config, raw, rules(config), state, ChatProcessor.from_files(files_from_gguf(fields, path, rows), raw)


def _tensors(reader: Any, path: Path) -> dict[str, Tensor]:
    """All tensors in float32 by the file's names.

    Raises:
        CheckpointError: one of a type that the package cannot de-quantise.
    """
    from gguf.quants import dequantize

    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        try:
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {tensor.name} of type {tensor.tensor_type.name} cannot be de-quantised: {error}"
            ) from error
        state[tensor.name] = values
    return state


def _rope(get: dict[str, Any], divisors: Tensor | None, head: int, path: Path) -> RopeConfig:
    """How llama.cpp turns positions into angles by these fields of a file (its `llama-model.cpp`, `load_hparams`): a factor without a
    type is linear, and may have its first name.

    Raises:
        CheckpointError: another kind of scaling, or settings of one that are not built.
    """
    plain = RopeConfig(theta=float(get.get("rope.freq_base", 10_000.0)))
    said = {key.removeprefix("rope.scaling."): value for key, value in get.items() if key.startswith("rope.scaling.")}
    kind, factor = said.get("type", "linear"), float(said.get("factor") or get.get("rope.scale_linear") or 1.0)
    unknown = [
        f"llama.rope.scaling.{key}={value}" for key, value in said.items() if key not in _SCALING and value != _PLAIN.get(key)
    ]
    if kind not in ("none", "linear", "yarn") or (unknown and kind != "none"):
        what = f"of type {kind!r}" + (f" with {', '.join(unknown)}" if unknown else "")
        raise CheckpointError(f"{path}: rope scaling {what} is not read from GGUF; none, linear and plain yarn are")
    scaled = kind == "yarn" or (kind == "linear" and factor != 1.0)
    if divisors is not None:
        if scaled:
            raise CheckpointError(f"{path}: its rope is scaled twice, by {kind} {factor} and by {DIVISORS}; one of them is read")
        return _divided(plain, divisors, head, path)
    if kind == "yarn":
        context = int(said.get("original_context_length") or get["context_length"])
        return replace(plain, kind="yarn", factor=factor, original_context=context)
    return replace(plain, kind="linear", factor=factor) if scaled else plain


def _divided(plain: RopeConfig, divisors: Tensor, head: int, path: Path) -> RopeConfig:
    """The llama3 scaling that frequencies divided by these come from. The converter writes the divisors alone: fast frequencies have 1,
    slow ones the factor, and those between say how long the context was, low_freq_factor 1 and high_freq_factor 4 being all models'.

    Raises:
        CheckpointError: no llama3 scaling divides so.
    """
    frequencies, _ = plain.frequencies(head)
    if divisors.shape != frequencies.shape or not bool((divisors > 0).all()):
        raise CheckpointError(f"{path}: {DIVISORS} {tuple(divisors.shape)} should be {len(frequencies)} numbers above 0")
    factor = float(divisors.max())
    made = plain if factor == 1.0 else replace(plain, kind="llama3", factor=factor)
    between = (divisors > 1.001) & (divisors < factor * 0.999)
    if bool(between.any()):
        place = int(between.nonzero()[0])
        share = (1 / float(divisors[place]) - 1 / factor) / (1 - 1 / factor)
        turns = made.low_freq_factor + share * (made.high_freq_factor - made.low_freq_factor)
        made = replace(made, original_context=round(turns * 2 * math.pi / float(frequencies[place])))
    if not torch.allclose(made.frequencies(head)[0] * divisors, frequencies, rtol=1e-3):
        raise CheckpointError(
            f"{path}: {DIVISORS} is no llama3 scaling of rope, the only one that is read as divisors of frequencies"
        )
    return made


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """(H * K, D) rows in neighbouring pairs -> in halves."""
    half = rows.shape[0] // heads // 2
    return rows.unflatten(0, (heads, half, 2)).transpose(1, 2).flatten(0, 2)
