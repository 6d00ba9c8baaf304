"""GGUF files with a SentencePiece vocabulary (Llama 2, Vicuna, Mistral, TinyLlama), against SentencePiece itself and transformers."""

import io
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import gguf
import pytest
import sentencepiece
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from test_decoder import SHAPE, run, write_gguf
from tokenizers import Tokenizer

import intermodal
from intermodal.errors import CheckpointError
from intermodal.inputs.template import TemplateError
from intermodal.nn.attention import Segments
from intermodal.weights.gguf_tokenizer import files_from_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED = ("<|im_start|>", "<tool>")
SPECIAL = ("<unk>", "<s>", "</s>")
ROWS = 400
SENTENCE = "the cat sat on a mat and ate 42 rats; then it went home, où l'été est beau. über größe don't stop ---- 1999"
WORDS = SENTENCE.split()
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MISTRAL = "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
USUAL = st.sampled_from([*WORDS, " ", "  ", "    ", "\n", "\t", "▁", "🦊", "👩‍🚀", "日本", "ñ", "\r\n", "<", "0x0A", "<0x41>"])
texts = st.lists(st.one_of(USUAL, st.text(max_size=6)), max_size=12).map("".join)


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece model, and what a converter writes of it."""

    proto: bytes

    @cached_property
    def model(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.proto)

    def fields(self) -> dict:
        """As llama.cpp's `convert_hf_to_gguf.py` (`_create_vocab_sentencepiece`) names them."""
        model = self.model
        count = range(model.get_piece_size())
        tests = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, UNUSED: model.is_unused, BYTE: model.is_byte}
        kinds = [next((kind for kind, test in tests.items() if test(index)), NORMAL) for index in count]
        tokens = [model.id_to_piece(index) for index in count]
        kinds = [USER_DEFINED if token in ADDED else kind for token, kind in zip(tokens, kinds, strict=True)]
        return {"model": "llama", "pre": "default", "tokens": tokens, "scores": [model.get_score(index) for index in count],
                "token_type": kinds, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}  # fmt: skip


def train(**more) -> Pieces:
    random = Random(5)
    lines = [" " * random.choice((0, 0, 1, 3)) + " ".join(random.choices(WORDS, k=random.randint(2, 9))) for _ in range(400)]
    out = io.BytesIO()
    options = dict(model_type="bpe", vocab_size=ROWS, byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                   remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
                   user_defined_symbols=list(ADDED))  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **{**options, **more})
    return Pieces(out.getvalue())


@pytest.fixture(scope="module")
def pieces():
    return train()


def tokenizer_of(fields: dict, rows: int = ROWS) -> Tokenizer:
    files = files_from_gguf({f"tokenizer.ggml.{name}": value for name, value in fields.items()}, Path("tiny.gguf"), rows)
    return Tokenizer.from_str(files["tokenizer.json"].decode())


@pytest.fixture(scope="module")
def tokenizer(pieces):
    return tokenizer_of(pieces.fields())


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def apart(model: sentencepiece.SentencePieceProcessor, text: str, names=(*SPECIAL, *ADDED)) -> list[int]:
    """What llama.cpp does with special tokens and added words (`llama_vocab::impl::tokenize`): each part between them on its own."""
    out = []
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        out += [model.piece_to_id(part)] if part in names else model.encode(part)
    return out


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(6)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, "vocab_size": ROWS})).eval()
    for parameter in made.parameters():
        parameter.data += torch.randn_like(parameter) * 0.15
    return made


@pytest.fixture(scope="module")
def write(model, tmp_path_factory):
    """write(path, fields, template): the model with another vocabulary than `write_gguf` gives it."""
    plain = tmp_path_factory.mktemp("plain") / "plain.gguf"
    write_gguf(plain, model)
    reader = gguf.GGUFReader(plain)

    def make(path: Path, fields: dict, template: str = "") -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        for name, field in reader.fields.items():
            if name.startswith("llama."):
                writer.add_key_value(name, field.contents(), field.types[0])
        for name, value in fields.items():
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}[type(value)]
            add(f"tokenizer.ggml.{name}", value)
        if template:
            writer.add_chat_template(template)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@pytest.fixture(scope="module")
def theirs(pieces, write, tmp_path_factory):
    """transformers' own tokenizer of the same file."""
    file = write(tmp_path_factory.mktemp("theirs") / "tiny.gguf", pieces.fields())
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_a_file_loads_and_says_what_the_model_says(model, pieces, write, tmp_path):
    """Logits and greedy tokens are transformers' with the same weights, from the file and from what is saved of it."""
    ours = intermodal.load(write(tmp_path / "tiny.gguf", pieces.fields(), CHATML))
    asked = [{"role": "user", "content": "the cat  sat, où? 🦊"}]
    prompt = ours.processor(asked, reply=True).ids
    assert prompt.tolist() == apart(pieces.model, ours.processor.conversation(asked, reply=True).text)
    with torch.no_grad():
        expected = model(prompt[None]).logits[0]
        torch.testing.assert_close(run(ours, prompt, Segments([len(prompt)])), expected, atol=1e-5, rtol=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(prompt[None]).logits[0], expected, atol=1e-5, rtol=1e-5)
    ours.processor.end_ids = ()
    model.generation_config.eos_token_id = None
    wanted = model.generate(
        prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    reply = ours.generate(asked, max_new_tokens=24)
    assert reply.ids == wanted[0, len(prompt) :].tolist()
    assert "".join(list(ours.stream(asked, max_new_tokens=24))[:-1]) == reply.text
    intermodal.save(ours, tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(prompt[None]).logits[0], expected, atol=1e-5, rtol=1e-5)


def test_what_is_saved_is_the_same_tokenizer_in_transformers(pieces, write, tmp_path):
    ours = intermodal.load(write(tmp_path / "tiny.gguf", pieces.fields() | {"add_eos_token": True}, CHATML))
    intermodal.save(ours, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("", "the cat", "  two\n spaces 🦊", "a</s>b<tool> c"):
        assert theirs(text)["input_ids"] == ours.processor.encode(text, special=True)
        assert theirs(text)["input_ids"] == [1, *apart(pieces.model, text), 2]
        ids = ours.processor.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.processor.decode(ids)
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token) == ("<s>", "</s>", "<unk>")
    assert len(theirs) == ROWS
    again = intermodal.load(tmp_path / "hf")
    assert again.processor.encode("  the cat") == ours.processor.encode("  the cat")


@settings(deadline=None, max_examples=500)
@given(text=texts)
def test_ids_and_texts_are_those_of_sentencepiece(pieces, tokenizer, text):
    if any(name in text for name in (*SPECIAL, *ADDED)):
        return
    expected = pieces.model.encode(text)
    assert ids_of(tokenizer, text) == expected
    assert tokenizer.decode(expected) == pieces.model.decode(expected) == text.replace("▁", " ")


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(st.one_of(texts, st.sampled_from([*SPECIAL, *ADDED])), max_size=6))
def test_special_tokens_and_added_words_are_found_as_written(pieces, tokenizer, parts):
    text = "".join(parts)
    assert ids_of(tokenizer, text) == apart(pieces.model, text)


@settings(deadline=None, max_examples=200)
@given(text=texts)
def test_transformers_reads_the_same_ids(pieces, theirs, tokenizer, text):
    """It differs where SentencePiece does too: it puts no space before one that begins a text, nor after special tokens."""
    text = text.lstrip(" ▁")
    for name in (*SPECIAL, *ADDED):
        text = text.replace(name, "")
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids_of(tokenizer, text) == expected
    assert tokenizer.decode(expected) == theirs.decode(expected)
    assert tokenizer.encode(text).ids == theirs(text)["input_ids"] == [1, *expected]
    assert tokenizer.encode(text, "the cat").ids == theirs(text, "the cat")["input_ids"]


def test_special_tokens_are_those_of_transformers(theirs, tokenizer):
    text = "the cat</s><s>sat on<tool>a mat<|im_start|> and<unk>"
    ours = [index for index in ids_of(tokenizer, text) if index < 3 or tokenizer.id_to_token(index) in ADDED]
    assert ours == [index for index in theirs(text, add_special_tokens=False)["input_ids"] if index < 3 or index in ours]
    assert [tokenizer.id_to_token(index) for index in ours] == ["</s>", "<s>", "<tool>", "<|im_start|>", "<unk>"]
    assert tokenizer.decode(ids_of(tokenizer, text)) == "the cat sat on<tool> a mat<|im_start|>  and"


@pytest.mark.parametrize(
    ("said", "begin", "end"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True, "eos_token_id": 4}, [], [4]),
    ],
)
def test_what_begins_and_ends_a_text(pieces, said, begin, end):
    tokenizer = tokenizer_of(pieces.fields() | said)
    for text in ("", "the cat"):
        assert tokenizer.encode(text).ids == [*begin, *pieces.model.encode(text), *end]
    one = pieces.model.encode("the cat")
    assert tokenizer.encode("the cat", "the cat").ids == [*begin, *one, *end, *begin, *one, *end]


def test_without_a_space_before_texts():
    pieces = train(add_dummy_prefix=False)
    tokenizer = tokenizer_of(pieces.fields() | {"add_space_prefix": False})
    for text in ("", "the cat", " the cat", "  a\n b", " 🦊"):
        assert ids_of(tokenizer, text) == pieces.model.encode(text)
        assert tokenizer.decode(pieces.model.encode(text)) == pieces.model.decode(pieces.model.encode(text)) == text


def test_without_bytes_a_strange_character_is_unknown():
    """A run of them is one unknown token."""
    pieces = train(byte_fallback=False, vocab_size=150)
    tokenizer = tokenizer_of(pieces.fields())
    for text in ("the cat", "the 日本 cat🦊", "\n", "日\n本 日"):
        assert ids_of(tokenizer, text) == pieces.model.encode(text)
    assert ids_of(tokenizer, "the 日本").count(0) == 1


def random_model(random: Random, scores) -> Pieces:
    """Pieces of a few letters that no training would choose, so that merges get into each other's way."""
    letters = ["▁", *random.choice(("ab", "abc"))]
    words = {"".join(random.choices(letters, k=random.randint(2, 5))) for _ in range(random.randint(3, 25))}
    tokens = [*letters, *sorted(words)]
    random.shuffle(tokens)
    made = sentencepiece_model_pb2.ModelProto()
    made.trainer_spec.model_type, made.trainer_spec.byte_fallback = 2, True
    made.normalizer_spec.name, made.normalizer_spec.remove_extra_whitespaces = "identity", False
    listed = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    listed += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    for token, score, kind in [*listed, *((token, scores(index), NORMAL) for index, token in enumerate(tokens))]:
        made.pieces.add(piece=token, score=score, type=kind)
    return Pieces(made.SerializeToString())


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32), plain=st.booleans())
def test_any_vocabulary_of_distinct_scores_is_merged_as_sentencepiece_merges(seed, plain):
    """Scores in the order of the ids may be missing from the file: llama.cpp's converter writes one number for all."""
    random = Random(seed)
    pieces = random_model(random, lambda index: -float(index))
    fields = pieces.fields()
    if plain:
        fields["scores"] = [-1000.0] * len(fields["scores"])
    tokenizer = tokenizer_of(fields)
    for _ in range(20):
        text = "".join(random.choices("aabbc ", k=random.randint(0, 16)))
        assert ids_of(tokenizer, text) == pieces.model.encode(text)


@pytest.mark.parametrize("seed", [1, 3, 6, 9])
def test_scores_that_are_alike_are_told(tmp_path, write, seed):
    """SentencePiece merges what is further left then, which `tokenizers` cannot: it is what transformers does."""
    random = Random(seed)
    fields = random_model(random, lambda index: -float(index // 12)).fields()
    with pytest.warns(UserWarning, match=r"tiny\.gguf: \d+ of the \d+ pieces .* share their score"):
        tokenizer = tokenizer_of(fields)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=write(tmp_path / "tied.gguf", fields).name)
    for _ in range(100):
        text = "b" + "".join(random.choices("aabbc ", k=random.randint(0, 16)))
        assert ids_of(tokenizer, text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_merges_of_the_file_go_before_scores(pieces, tokenizer):
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    fields = pieces.fields()
    fields["scores"] = Random(7).sample(range(ROWS), ROWS)
    assert ids_of(tokenizer_of(fields | {"merges": merges}), SENTENCE) == pieces.model.encode(SENTENCE)
    assert ids_of(tokenizer_of(fields), SENTENCE) != pieces.model.encode(SENTENCE)


def test_where_a_file_is_silent(pieces, tokenizer):
    """Without the ids of special tokens they are 0, 1 and 2, without types all tokens are plain ones (llama.cpp, `llama-vocab.cpp`)."""
    fields = {name: value for name, value in pieces.fields().items() if name in ("model", "tokens", "scores")}
    silent = tokenizer_of(fields)
    text = "  the cat</s>🦊 ñ"
    assert silent.encode(text).ids == tokenizer.encode(text).ids == [1, *apart(pieces.model, text)]


def test_all_unknown_words_are_special(pieces):
    """Some converters give the type to more tokens than the one; llama.cpp finds them all as they are written."""
    fields = pieces.fields()
    tokenizer = tokenizer_of(fields | {"token_type": [UNKNOWN if kind == USER_DEFINED else kind for kind in fields["token_type"]]})
    assert ids_of(tokenizer, "the<tool> cat") == apart(pieces.model, "the<tool> cat")
    assert tokenizer.decode(ids_of(tokenizer, "the<tool>cat")) == "the cat"


def test_more_tokens_than_embeddings(pieces, tokenizer, write, tmp_path):
    """A converter pads the list of tokens: what the model has no embedding of is no token, also where a text spells it."""
    more = {"tokens": ["<pad>", "<extra>"], "token_type": [UNUSED, CONTROL], "scores": [-10000.0, -1000.0]}
    fields = {name: value + more.get(name, []) if name in more else value for name, value in pieces.fields().items()}
    ours = intermodal.load(write(tmp_path / "tiny.gguf", fields, CHATML))
    assert ours.config.vocab_size == ours.processor.tokenizer.get_vocab_size() == ROWS
    text = "the <extra> cat<pad>"
    assert ours.processor.encode(text) == ids_of(tokenizer, text) == pieces.model.encode(text)
    assert ours.logits([{"role": "user", "content": text}]).shape[1] == ROWS


def test_fewer_tokens_than_embeddings(write, tmp_path):
    pieces = train(vocab_size=360)
    ours = intermodal.load(write(tmp_path / "tiny.gguf", pieces.fields(), CHATML))
    assert ours.config.vocab_size == ROWS
    assert ours.processor.encode("  the cat 🦊") == pieces.model.encode("  the cat 🦊")
    assert ours.processor.decode([ROWS - 1, *pieces.model.encode("the cat")]) == "the cat"


def test_of_tokens_spelled_alike_the_last_one_counts(pieces):
    fields = pieces.fields()
    the = pieces.model.piece_to_id("▁the")
    lists = {name: [*fields[name], fields[name][the]] for name in ("tokens", "token_type", "scores")}
    tokenizer = tokenizer_of(fields | lists, ROWS + 1)
    assert ids_of(tokenizer, "the cat") == [ROWS if index == the else index for index in pieces.model.encode("the cat")]
    assert tokenizer.decode(ids_of(tokenizer, "the cat")) == "the cat"
    tokenizer.add_special_tokens(["<image>"])
    assert tokenizer.token_to_id("<image>") == ROWS + 1


@pytest.mark.parametrize("template", [CHATML, MISTRAL])
def test_the_loss_mask_holds_what_the_assistant_says(pieces, write, tmp_path, template):
    ours = intermodal.load(write(tmp_path / "tiny.gguf", pieces.fields(), template))
    says = {"the  cat?": "user", "it sat on 🦊, ñ!": "assistant", "and then": "user", "home": "assistant"}
    conversation = ours.processor.conversation([{"role": role, "content": text} for text, role in says.items()])
    ours.processor.audit(conversation)
    assert conversation.ids == apart(pieces.model, conversation.text)
    said = [index for index, learned in zip(conversation.ids, conversation.supervised, strict=True) if learned]
    spelled = ours.processor.decode(said, special=True).split("</s>")
    assert [part.strip() for part in spelled] == ["it sat on 🦊, ñ!", "home", ""]


def test_without_a_template_there_is_no_talk(pieces, write, tmp_path):
    ours = intermodal.load(write(tmp_path / "tiny.gguf", pieces.fields()))
    with pytest.raises(TemplateError, match="came without a chat template"):
        ours.generate([{"role": "user", "content": "the cat"}])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        *(({"model": name}, rf"tokenizer\.ggml\.model '{name}' is not read .*'llama' .*'gpt2' .*Hugging Face directory")
          for name in ("bert", "t5", "rwkv", "no_vocab")),
        ({"model": "gpt2", "pre": "tekken"}, r"model 'gpt2' with tokenizer\.ggml\.pre 'tekken' is not read .* qwen2\) are"),
        ({"model": "gpt2", "pre": "smollm"}, r"byte-level BPE has no tokenizer\.ggml\.merges"),
        ({"tokens": None}, r"holds no tokens \(tokenizer\.ggml\.tokens\)"),
        ({"scores": [0.0]}, rf"tokenizer\.ggml\.scores is of 1 tokens, tokenizer\.ggml\.tokens of {ROWS}"),
        ({"token_type": [1, 1]}, r"tokenizer\.ggml\.token_type is of 2 tokens"),
        ({"eos_token_id": ROWS}, rf"eos_token_id is {ROWS}, and the model knows {ROWS} tokens"),
        ({"merges": ["t h e"]}, "its tokenizer is damaged: .*"),
        ({"merges": ["the"]}, "its tokenizer is damaged: .*"),
    ],
)  # fmt: skip
def test_what_is_refused(pieces, said, message):
    fields = {name: value for name, value in (pieces.fields() | said).items() if value is not None}
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: .*{message}"):
        tokenizer_of(fields)


def test_a_padding_token_that_is_none_is_passed_over(pieces, tokenizer):
    """Files say -1, written as an unsigned number, where nothing pads; llama.cpp warns and goes on."""
    assert tokenizer_of(pieces.fields() | {"padding_token_id": 2**32 - 1}).to_str() == tokenizer.to_str()
