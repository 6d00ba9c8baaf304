"""The tokenizer inside a GGUF file as the `tokenizer.json` it was made from: byte-level BPE with a known pre-tokenizer, or the BPE of
SentencePiece.

Sources: llama.cpp `llama-vocab.cpp` (what its names mean, what holds where a file is silent), SentencePiece `bpe_model.cc` (which pair is
merged next).
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""llama.cpp's token types: pieces of text, the unknown word, special tokens, added words. 5 is unused, 6 a byte."""
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""llama.cpp's names of the kinds of tokenizers that are read."""
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""llama.cpp's names of tokens with a task, and Hugging Face's."""
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""What llama.cpp takes for a SentencePiece vocabulary that does not name them."""
_SPACE = "\u2581"


@dataclass(frozen=True)
class _Vocabulary:
    """What a file says of its tokens, by their ids."""

    path: Path
    """The file, for messages."""
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    """Higher is merged earlier."""
    merges: list[tuple[str, str]]
    """The first ones are merged first; none where the file leaves them to the scores."""
    named: dict[str, int]
    """Ids of tokens with a task, by llama.cpp's names."""

    @property
    def ids(self) -> dict[str, int]:
        """Of tokens spelled alike, the last one has the name, as in llama.cpp. The others get names that no text leads to: without a gap
        among the ids, a token that is added later does not get one that is taken."""
        last = {token: index for index, token in enumerate(self.tokens)}
        return {token if last[token] == index else f"[DUPLICATE_{index}]": index for index, token in enumerate(self.tokens)}


def files_from_gguf(fields: dict[str, Any], path: Path, rows: int) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`, as a checkpoint directory would hold them.

    Args:
        fields: all of the file's metadata.
        rows: how many embeddings the model has; tokens beyond them, which it could not read, are left out.

    Raises:
        CheckpointError: a tokenizer of another kind, or a damaged one.
    """
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items() if key.startswith("tokenizer.")}
    kind = _kind(get, path)
    vocabulary = _vocabulary(get, path, rows, _SENTENCEPIECE_IDS if kind == SENTENCEPIECE else {})
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {ours: vocabulary.tokens[vocabulary.named[name]] for name, ours in _NAMES.items() if name in vocabulary.named}
    try:
        if kind == SENTENCEPIECE:
            added = {f"add_{end}_token": bool(get.get(f"add_{end}_token", end == "bos")) for end in ("bos", "eos")}
            settings |= added
            ends = [settings.get(f"{end}_token") if added[f"add_{end}_token"] else None for end in ("bos", "eos")]
            tokenizer = _sentencepiece(vocabulary, *ends, prefix=bool(get.get("add_space_prefix", True)))
        else:
            tokenizer = _byte_level(vocabulary, _pre_tokenizer(_pre(get)))
    except Exception as error:  # the Rust constructors raise plain Exception
        raise CheckpointError(f"{path}: its tokenizer is damaged: {error}") from error
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    template = fields.get("tokenizer.chat_template")
    if template:
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
    return files


def _pre(get: dict[str, Any]) -> str:
    return str(get.get("pre", "default"))


def _kind(get: dict[str, Any], path: Path) -> str:
    """`BYTE_LEVEL` or `SENTENCEPIECE`. Raises CheckpointError: it is another kind, or a byte-level one without its splits or merges."""
    kind = get.get("model")
    byte_level = kind == BYTE_LEVEL
    if kind != SENTENCEPIECE and not (byte_level and _pre_tokenizer(_pre(get))):
        pre = f" with tokenizer.ggml.pre {get.get('pre')!r}" if byte_level else ""
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model {kind!r}{pre} is not read from GGUF; {SENTENCEPIECE!r} (SentencePiece's BPE) and {BYTE_LEVEL!r} "
            "(byte-level BPE with smollm, gpt-2, llama-bpe or qwen2) are: for this model take its Hugging Face directory"
        )
    if byte_level and "merges" not in get:
        raise CheckpointError(
            f"{path}: its byte-level BPE has no tokenizer.ggml.merges: convert the model anew, with its merges.txt"
        )
    return kind


def _vocabulary(get: dict[str, Any], path: Path, rows: int, named: dict[str, int]) -> _Vocabulary:
    """The first `rows` tokens of a file.

    Args:
        get: its fields, by what follows `tokenizer.ggml.`.
        named: ids of tokens with a task where the file has none.

    Raises:
        CheckpointError: there are no tokens, a list of what they are is of another length, or one with a task is not among them.
    """
    tokens = get.get("tokens")
    if not tokens:
        raise CheckpointError(f"{path}: it holds no tokens (tokenizer.ggml.tokens): convert the model anew, with its vocabulary")
    kinds, scores = get.get("token_type", [NORMAL] * len(tokens)), get.get("scores", [0.0] * len(tokens))
    for name, values in (("token_type", kinds), ("scores", scores)):
        if len(values) != len(tokens):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{name} is of {len(values)} tokens, tokenizer.ggml.tokens of {len(tokens)}"
            )
    known = min(len(tokens), rows)
    ids = {name: index for name, index in named.items() if index < known}
    for name in _NAMES:
        index = get.get(f"{name}_token_id")
        if index is not None and 0 <= int(index) < known:
            ids[name] = int(index)
        elif index is not None and name != "padding":  # files say -1, or one more than there are, where nothing pads
            raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id is {index}, and the model knows {known} tokens")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in get.get("merges", ()))]
    return _Vocabulary(path, tokens[:known], kinds[:known], scores[:known], merges, ids)


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


def _byte_level(vocabulary: _Vocabulary, split: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer, vocabulary, special={token for token, kind in _kinds(vocabulary) if kind == CONTROL})
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary, bos: str | None, eos: str | None, *, prefix: bool) -> Tokenizer:
    """SentencePiece's BPE in the form of Llama 2's own `tokenizer.json`: one space before all text and, as llama.cpp has it, before what
    follows a special token or an added word; characters without a piece are bytes, or the unknown token where there are no bytes.

    Args:
        bos, eos: what begins and ends all text where special tokens are asked for.
        prefix: whether texts get the space, which decoding takes away.
    """
    special = {token for token, kind in _kinds(vocabulary) if kind in (UNKNOWN, CONTROL)}
    special |= {vocabulary.tokens[index] for index in vocabulary.named.values()}
    merges = vocabulary.merges or _merges(vocabulary, special)
    unknown = vocabulary.tokens[vocabulary.named["unknown"]]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces] if prefix else [spaces])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _add(tokenizer, vocabulary, special)
    begin, end = [bos] if bos else [], [eos] if eos else []
    if begin or end:
        again = [f"{token}:1" for token in begin], [f"{token}:1" for token in end]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *again[0], "$B:1", *again[1]],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*begin, *end}],
        )
    return tokenizer


def _kinds(vocabulary: _Vocabulary) -> zip[tuple[str, int]]:
    return zip(vocabulary.tokens, vocabulary.kinds, strict=True)


def _add(tokenizer: Tokenizer, vocabulary: _Vocabulary, special: set[str]) -> None:
    """Tokens that are found in texts as they are written, before merges: special ones and added words."""
    words = [token for token, kind in _kinds(vocabulary) if token in special or kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=token in special) for token in dict.fromkeys(words)])


def _merges(vocabulary: _Vocabulary, special: set[str]) -> list[tuple[str, str]]:
    """The pairs whose joined piece SentencePiece would take, the first ones first: by the piece's score; of one score, those with the
    longer left part, then right part, as transformers' `generate_merges` orders them.

    Scores that are all one are none: llama.cpp's converter writes -1000 where it has only a `tokenizer.json` (gguf-py `vocab.py`,
    `LlamaHfVocab`). The pieces' ids are in the order of their merges then.
    """
    ids = vocabulary.ids
    plain = (token for token, kind in _kinds(vocabulary) if kind == NORMAL and token not in special)
    pieces = {token: ids[token] for token in plain}
    scored = len({vocabulary.scores[index] for index in pieces.values()}) > 1
    found: list[tuple[tuple[float, int, int], tuple[str, str]]] = []
    for token, index in pieces.items():
        score = vocabulary.scores[index] if scored else -index
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found += [((-score, -len(a), -len(b)), (a, b)) for a, b in pairs if a in pieces and b in pieces]
    _tell_of_ties(vocabulary.path, {a + b: key[0] for key, (a, b) in found})
    return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]


def _tell_of_ties(path: Path, scores: dict[str, float]) -> None:
    """Warn where pieces that are merged share a score (vocabularies that were joined of two). SentencePiece then merges what is further
    left; `tokenizers` has ranks of pairs alone, no two alike."""
    tied = sum(count for count in Counter(scores.values()).values() if count > 1)
    if tied:
        warnings.warn(
            f"{path}: {tied} of the {len(scores)} pieces that its tokenizer merges share their score with others; words where two of them "
            "overlap are cut as transformers cuts them, and may be otherwise than by SentencePiece and llama.cpp. The model's Hugging Face "
            "directory has the merges themselves",
            stacklevel=2,
        )
