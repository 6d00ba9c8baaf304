"""Qwen's first tokenizer file, `qwen.tiktoken`, as the `tokenizer.json` it stands for: byte pairs by rank, then special tokens.

Source: the checkpoint's own `tokenization_qwen.py`; the byte alphabet is GPT-2's.
"""

from __future__ import annotations

import base64
import binascii
import json
from itertools import pairwise

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import CheckpointError

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{index}|>" for index in range(205)),
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<img>",
    "</img>",
    "<imgpad>",
)
"""In the order of their ids, which follow the ranks."""


def tokenizer_files(data: bytes) -> dict[str, bytes]:
    """`qwen.tiktoken` -> `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        CheckpointError: a line is not a base64 token and its rank, or the ranks leave gaps.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"qwen.tiktoken, line {number} is not a base64 token and its rank: {line[:40]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"qwen.tiktoken: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    alphabet = byte_alphabet()

    def spelled(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [
        tuple(map(spelled, pair))
        for token, _ in sorted(ranks.items(), key=lambda entry: entry[1])
        if len(token) > 1 and (pair := last_merge(token, ranks))
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))  # pyright: ignore[reportArgumentType]
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings, indent=2).encode()}


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that merging by rank leaves of a token before its own merge; None where it is not reached by pairs."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        known = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not known:
            return None
        _, at = min(known)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
