"""The tokenizer inside a GGUF file as the `tokenizer.json` it was made from: byte-level BPE with a known pre-tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ..errors import CheckpointError

CONTROL, USER_DEFINED = 3, 4
"""llama.cpp's token types for special tokens and for added words."""
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _pre_tokenizer(name: str):
    """What splits text before merges, by llama.cpp's name for it."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    if name in ("gpt-2", "default"):
        return level
    for names, words in ((("llama-bpe", "llama3"), _LLAMA3), (("qwen2",), _QWEN2)):
        if name in names:
            split = pre_tokenizers.Split(Regex(words), behavior="isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def files_from_gguf(fields: dict[str, Any], path: Path) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`, as a checkpoint directory would hold them.

    Raises:
        CheckpointError: a tokenizer of another kind.
    """
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items() if key.startswith("tokenizer.")}
    split = _pre_tokenizer(str(get.get("pre", "default")))
    if get.get("model") != "gpt2" or split is None:
        raise CheckpointError(
            f"{path}: a {get.get('model')!r} tokenizer with pre-tokenizer {get.get('pre')!r} is not read from GGUF (byte-level BPE with "
            f"smollm, gpt-2, llama-bpe or qwen2 is)"
        )
    tokens, kinds = get["tokens"], get["token_type"]
    merges = [tuple(merge.split(" ")) for merge in get["merges"]]
    try:
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    except Exception as error:  # the Rust constructor raises plain Exception
        raise CheckpointError(f"{path}: its tokenizer is damaged: {error}") from error
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        index = get.get(f"{theirs}_token_id")
        if index is not None:
            settings[ours] = tokens[int(index)]
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    template = fields.get("tokenizer.chat_template")
    if template:
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
    return files
