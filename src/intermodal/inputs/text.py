"""Texts to token ids for the contrastive encoders, from the checkpoint's own tokenizer files."""

from __future__ import annotations

import gzip
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..batch import Texts
from ..errors import CheckpointError
from ..files import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)
PACKED_MERGES = "bpe_simple_vocab_16e6.txt.gz"
"""The file that OpenAI's CLIP and open_clip keep their tokenizer in; saved as `vocab.json` and `merges.txt`."""


def canonicalise(text: str, *, lower: bool = True, underscore_to_space: bool = True) -> str:
    """SigLIP's text clean-up: `_` to a space, no punctuation, lower case, single spaces.

    Source: big_vision `evaluators/proj/image_text/prompt_engineering.py:94`. Transformers' `SiglipTokenizer` deletes `_` with the
    other punctuation instead of making it a space; `underscore_to_space=False` gives that, in a checkpoint by
    `"underscore_to_space": false` in its tokenizer_config.json.
    """
    if underscore_to_space:
        text = text.replace("_", " ")
    if lower:
        text = lower_case(text)
    return re.sub(r"\s+", " ", text.translate(str.maketrans("", "", string.punctuation))).strip()


def lower_case(text: str) -> str:
    """Lower case as the tokenizers library has it: each letter by itself (Python makes a word's last sigma another letter)."""
    return normalizers.Lowercase().normalize_str(text)


class Encoder(Protocol):
    """What a tokenizer back end gives: text -> ids, special tokens included."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def unknown_id(self) -> int | None: ...

    def __call__(self, texts: Sequence[str]) -> list[list[int]]: ...


class TextTokenizer:
    """Text -> packed ids, with a family's own rule for too long and too short texts.

    `pad_to` None packs texts as they are (CLIP); a number pads every text to exactly that many tokens (SigLIP). A text longer than
    `context` is cut; with `eos_last` the last id kept is overwritten by the end token, which CLIP pools at.
    """

    def __init__(
        self,
        encode: Encoder,
        *,
        context: int,
        pad_to: int | None,
        pad_id: int,
        eos_id: int,
        eos_last: bool,
        pad_left: bool = False,
        clean: Callable[[str], str] | None = None,
        files: dict[str, bytes] | None = None,
    ):
        self.encode, self.clean = encode, clean
        self.context, self.pad_to, self.pad_id, self.eos_id = context, pad_to, pad_id, eos_id
        self.eos_last, self.pad_left = eos_last, pad_left
        self.files = files or {}

    @property
    def vocabulary_size(self) -> int:
        return self.encode.vocabulary_size

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut and padded by the family's rule."""
        return [self._fit(ids) for ids in self._whole(texts)]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, before anything is cut or padded."""
        return [len(ids) for ids in self._whole(texts)]

    def unknown(self, texts: Sequence[str]) -> float:
        """The share of texts with a word that the vocabulary cannot spell."""
        unknown = self.encode.unknown_id
        return 0.0 if unknown is None or not texts else sum(unknown in ids for ids in self._whole(texts)) / len(texts)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return self.encode([self.clean(text) for text in texts] if self.clean else list(texts))

    def __call__(self, texts: Sequence[str]) -> Texts:
        return Texts.pack(self.ids(texts))

    def _fit(self, ids: list[int]) -> list[int]:
        if len(ids) > self.context:
            ids = ids[: self.context]
            if self.eos_last:
                ids[-1] = self.eos_id
        if self.pad_to and len(ids) < self.pad_to:
            padding = [self.pad_id] * (self.pad_to - len(ids))
            ids = padding + ids if self.pad_left else ids + padding
        return ids


def from_folder(folder: Path, family: str, *, context: int, eos_id: int, pad_id: int) -> TextTokenizer | None:
    """The tokenizer of a checkpoint directory, or None when it holds no tokenizer files.

    Args:
        folder: a directory with `tokenizer.json`, `vocab.json` + `merges.txt`, `spiece.model`, or CLIP's `bpe_simple_vocab_16e6.txt.gz`.
        family: "clip", "siglip" or "siglip2": the rule for padding and cutting.
        context: the text tower's context in tokens.
        eos_id, pad_id: from the model's config, where the tokenizer files do not name the tokens.

    Raises:
        CheckpointError: the files cannot be read, or need the `sentencepiece` package that is not installed.
    """
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
    if not files and (folder / PACKED_MERGES).exists():
        files = unpacked_merges(folder / PACKED_MERGES)
    settings = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    token_class = str(settings.get("tokenizer_class", ""))
    encode, token_id = _backend(folder, files, settings)
    if encode is None:
        return None
    siglip = family != "clip" and (token_class.startswith("SiglipTokenizer") or (not token_class and "spiece.model" in files))
    names = {"eos_token": "<|endoftext|>"} if family == "clip" else {"eos_token": "</s>", "pad_token": "</s>"} if siglip else {}
    named_eos, named_pad = (token_id(content(settings.get(name, names.get(name)))) for name in ("eos_token", "pad_token"))
    eos = eos_id if named_eos is None else named_eos
    clean: Callable[[str], str] | None = None
    if siglip:
        clean = partial(
            canonicalise,
            lower=bool(settings.get("do_lower_case", True)),
            underscore_to_space=bool(settings.get("underscore_to_space", True)),
        )
    elif family != "clip" and ("Gemma" in token_class or token_class.startswith("Siglip2")):
        clean = lower_case  # SigLIP 2 was trained on lower-cased text; plain Gemma files do not say so
    # Siglip2Tokenizer pads left by class default; a file that says something wins
    left = settings.get("padding_side", "left" if token_class.startswith("Siglip2") else "right") == "left"
    return TextTokenizer(
        encode,
        context=context,
        pad_to=None if family == "clip" else context,
        pad_id=pad_id if named_pad is None else named_pad,
        eos_id=eos,
        eos_last=family == "clip" or encode([""])[0][-1:] == [eos],  # a tokenizer that adds no end token is cut as it is
        pad_left=left,
        clean=clean,
        files=files,
    )


def content(token: Any) -> str | None:
    """A special token's text: the files write it as a string or as `{"content": ...}`."""
    return token.get("content") if isinstance(token, dict) else token


def _backend(folder: Path, files: dict[str, bytes], settings: dict[str, Any]):
    if "tokenizer.json" in files:
        try:
            fast = Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the Rust parser raises plain Exception
            raise CheckpointError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    elif {"vocab.json", "merges.txt"} <= files.keys():
        fast = clip_tokenizer(folder, files)
    elif "spiece.model" in files:
        return _sentencepiece(folder)
    else:
        return None, lambda token: None
    fast.no_truncation()
    fast.no_padding()
    return FastEncoder(fast), lambda token: fast.token_to_id(token) if token else None


class FastEncoder:
    """`tokenizers` back end. A class, so that data workers can pickle it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @property
    def vocabulary_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def unknown_id(self) -> int | None:
        token = getattr(self.tokenizer.model, "unk_token", None)
        return (
            None if token in (None, END) else self.tokenizer.token_to_id(token)
        )  # CLIP names its end token, and spells everything

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]


START, END = "<|startoftext|>", "<|endoftext|>"


def unpacked_merges(path: Path) -> dict[str, bytes]:
    """`vocab.json` and `merges.txt` from CLIP's one compressed list of merges.

    Ids follow from it: every byte as a letter, the same at a word's end, the merges, start and end.
    Source: open_clip `tokenizer.py`, `bytes_to_unicode` and `SimpleTokenizer.__init__`.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not CLIP's list of merges: {error}") from error
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges = lines[1 : 49408 - 2 * len(letters) - 1]  # of its 262,000 lines; the first names a version
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges), START, END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


def clip_tokenizer(folder: Path, files: dict[str, bytes]) -> Tokenizer:
    """CLIP's byte-level BPE from `vocab.json` and `merges.txt`, the layout without `tokenizer.json`.

    Lower-cased, pieces end in `</w>`, start and end tokens added (open_clip `tokenizer.py`; Hugging Face `tokenization_clip.py`).
    """
    start, end = START, END
    try:
        vocab = json.loads(files["vocab.json"])
        lines = files["merges.txt"].decode().split("\n")
        merges = [(left, right) for left, right in (line.split(" ") for line in lines if line and not line.startswith("#version"))]
    except ValueError as error:
        raise CheckpointError(f"{folder}: vocab.json and merges.txt are not a tokenizer: {error}") from error
    missing = [token for token in (start, end) if token not in vocab]
    if missing:
        raise CheckpointError(f"{folder / 'vocab.json'} lacks CLIP's special tokens {missing}")
    tokenizer = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _sentencepiece(folder: Path):
    try:
        import sentencepiece
    except ImportError as error:
        raise CheckpointError(
            f"{folder} holds spiece.model and no tokenizer.json: `pip install 'intermodal[sentencepiece]'` to read it"
        ) from error
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))

    def token_id(token: str | None) -> int | None:
        found = model.piece_to_id(token) if token else model.unk_id()
        return None if found == model.unk_id() else found

    return SentencePieceEncoder(model), token_id


class SentencePieceEncoder:
    """`spiece.model` back end: pieces, then the end token."""

    def __init__(self, model):
        self.model = model

    @property
    def vocabulary_size(self) -> int:
        return self.model.get_piece_size()

    @property
    def unknown_id(self) -> int | None:
        return self.model.unk_id()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self.model.encode(text), self.model.eos_id()] for text in texts]


def spelled(tokenizer: Tokenizer, text: str, marks: Collection[int]) -> list[str]:
    """Which of these tokens a plain text spells, so that it would be read as the token itself: their names, in order.

    An unknown word, which becomes the token of unknown words, spells nothing.
    """
    found = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    names = [(token, text[start:stop].strip()) for token, (start, stop) in zip(found.ids, found.offsets, strict=True)]
    return [name for token, name in names if token in marks and (token != unknown or name == tokenizer.id_to_token(token))]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A small lower-casing tokenizer for a model made from scratch; ids 0 and 1 are `<unk>` and `</s>`.

    WordPiece over every character seen and the most frequent words. It is counted, not trained: the `tokenizers` trainers give other
    ids at each call, and two ranks, or two runs of one recipe, must agree.
    """
    # ideographs stand alone, as words do elsewhere: a sentence without spaces would be one word, and mostly an unknown one
    alone = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), alone])
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    letters = sorted({letter for word in counts for letter in word})
    pieces = ["<unk>", "</s>", *letters, *(f"##{letter}" for letter in letters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces += words[: max(0, vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def fresh(tokenizer: Tokenizer, family: str, *, context: int) -> TextTokenizer:
    """A tokenizer from `train_tokenizer` with a family's rules and the files that let transformers load it."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    eos = tokenizer.get_vocab()["</s>"]
    return TextTokenizer(
        FastEncoder(tokenizer),
        context=context,
        pad_to=None if family == "clip" else context,
        pad_id=eos,
        eos_id=eos,
        eos_last=True,
        files={
            "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
            "tokenizer_config.json": _for_tower(settings, family, context),
        },
    )


def borrowed(tokenizer: TextTokenizer, family: str) -> TextTokenizer:
    """Another model's tokenizer in a fresh one: the files that are kept say what transformers has to do for the new text tower."""
    files = dict(tokenizer.files)
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = _for_tower(json.loads(files["tokenizer_config.json"]), family, tokenizer.context)
    tokenizer.files = files
    return tokenizer


def _for_tower(settings: dict[str, Any], family: str, context: int) -> bytes:
    """A tokenizer_config.json for a text tower of this context. SigLIP's reads its padding as text, and transformers' own processors would
    mask it with the attention mask that a tokenizer gives where `model_input_names` does not leave it out."""
    names = {} if family == "clip" else {"model_input_names": ["input_ids"]}
    return json.dumps({**settings, "model_max_length": context, **names}, indent=2).encode()


def in_transformers(files: dict[str, bytes], family: str) -> bool:
    """Whether transformers' Auto classes read a dual encoder's tokenizer files as they are.

    For `siglip2` they build a `Siglip2Tokenizer`, Gemma's BPE, whatever class the files name (`tokenization_auto.py`,
    `MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`), so that any other tokenizer's ids are other ones there.
    """
    if family != "siglip2" or "tokenizer.json" not in files:
        return True
    named = str(json.loads(files.get("tokenizer_config.json", b"{}")).get("tokenizer_class", ""))
    return named.startswith(("Gemma", "Siglip2"))
