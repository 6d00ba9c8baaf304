"""The first Qwen-VL. transformers has no such class: the oracle is the checkpoint's own formulas, written here in plain torch over its
own key names, with transformers' Qwen2 for the decoder (the same layer with a fused q/k/v and other names)."""

import base64
import json
import math

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
import transformers
from files_as_met import check_left_over, copied
from packed import check_packed_equals_separate
from PIL import Image
from safetensors.torch import load_file, save_file
from too_long import check_too_long
from vision_cached import check_cached_equals_uncached, check_keys

import intermodal
from intermodal.errors import CheckpointError
from intermodal.inputs.media import Clip, MediaError
from intermodal.models.qwen_vl import sine_cosine
from intermodal.nn.attention import Segments
from intermodal.weights.tiktoken import SPECIAL, SPLIT, tokenizer_files

WIDTH, HEADS, LAYERS, TOWER, TOWER_HEADS, SIDE, PATCH = 256, 2, 2, 48, 3, 42, 7
WORDS = [b"th", b"the", b" th", b" the", b"an", b"and", b"in", b"ing", b" \xc3", b"\xc3\xa9", b"  ", b"pic", b"ic", b" pic"]
RANKS = {bytes([byte]): byte for byte in range(256)} | {word: 256 + index for index, word in enumerate(WORDS)}
FIRST = len(RANKS)  # id of the first special token
IMAGE_START = FIRST + SPECIAL.index("<img>")
CONFIG = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": 192, "vocab_size": FIRST + len(SPECIAL), "seq_length": 1000, "kv_channels": 128,
    "visual": {"width": TOWER, "layers": 2, "heads": TOWER_HEADS, "mlp_ratio": 2.51, "image_size": SIDE, "patch_size": PATCH,
               "output_dim": WIDTH, "image_start_id": IMAGE_START},
}  # fmt: skip


def weights():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, around=0.0, scale=None):
        std = shape[-1] ** -0.5 if scale is None else scale
        return around + torch.empty(shape).normal_(0, std, generator=generator)

    out = {"transformer.wte.weight": draw(CONFIG["vocab_size"], WIDTH), "lm_head.weight": draw(CONFIG["vocab_size"], WIDTH)}
    out["transformer.ln_f.weight"] = draw(WIDTH, around=1, scale=0.1)
    for n in range(LAYERS):
        h = f"transformer.h.{n}."
        out |= {h + f"ln_{i}.weight": draw(WIDTH, around=1, scale=0.1) for i in (1, 2)}
        out |= {h + "attn.c_attn.weight": draw(3 * WIDTH, WIDTH), h + "attn.c_attn.bias": draw(3 * WIDTH, scale=0.1)}
        out |= {h + "attn.c_proj.weight": draw(WIDTH, WIDTH), h + "mlp.c_proj.weight": draw(WIDTH, 96)}
        out |= {h + f"mlp.w{i}.weight": draw(96, WIDTH) for i in (1, 2)}
    v, mlp = "transformer.visual.", int(TOWER * 2.51)
    out |= {v + "conv1.weight": draw(TOWER, 3, PATCH, PATCH, scale=0.1), v + "positional_embedding": draw(256, TOWER)}
    out |= {v + "proj": draw(WIDTH, WIDTH)}
    norms = {"ln_pre": TOWER, "ln_post": WIDTH, "attn_pool.ln_q": WIDTH, "attn_pool.ln_kv": WIDTH}
    for n in range(2):
        b = f"transformer.resblocks.{n}."
        norms |= {b + "ln_1": TOWER, b + "ln_2": TOWER}
        for name, rows, columns in (("attn.in_proj", 3 * TOWER, TOWER), ("attn.out_proj", TOWER, TOWER),
                                    ("mlp.c_fc", mlp, TOWER), ("mlp.c_proj", TOWER, mlp)):  # fmt: skip
            out |= {v + b + name + ".weight": draw(rows, columns), v + b + name + ".bias": draw(rows, scale=0.1)}
    for name, width in norms.items():
        out |= {v + name + ".weight": draw(width, around=1, scale=0.1), v + name + ".bias": draw(width, scale=0.1)}
    pool = v + "attn_pool."
    out |= {
        pool + "pos_embed": sine_cosine(16, WIDTH),
        pool + "query": draw(256, WIDTH),
        pool + "kv_proj.weight": draw(WIDTH, TOWER),
    }
    out |= {pool + "attn.in_proj_weight": draw(3 * WIDTH, WIDTH), pool + "attn.in_proj_bias": draw(3 * WIDTH, scale=0.1)}
    out |= {pool + "attn.out_proj.weight": draw(WIDTH, WIDTH), pool + "attn.out_proj.bias": draw(WIDTH, scale=0.1)}
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("qwen-vl")
    save_file(weights(), made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "qwen.tiktoken").write_bytes(b"".join(base64.b64encode(t) + f" {r}\n".encode() for t, r in RANKS.items()))
    (made / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    (made / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": FIRST}))
    return made


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tower(state, pixels):
    """visual.py: VisionTransformer.forward, one picture at a time."""
    v = {key.removeprefix("transformer.visual."): value for key, value in state.items() if key.startswith("transformer.visual.")}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], v[f"{name}.weight"], v[f"{name}.bias"], 1e-6)

    def resized(table, side):
        square = table.reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
        return F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(0, 2)

    x = F.conv2d(pixels, v["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    side = math.isqrt(x.shape[1])
    x = norm(x + resized(v["positional_embedding"], side), "ln_pre")
    for n in range(2):
        b = f"transformer.resblocks.{n}."
        mixed = F.linear(norm(x, b + "ln_1"), v[b + "attn.in_proj.weight"], v[b + "attn.in_proj.bias"])
        q, k, value = mixed.view(*x.shape[:2], TOWER_HEADS, 3 * (TOWER // TOWER_HEADS)).split(TOWER // TOWER_HEADS, dim=-1)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(TOWER // TOWER_HEADS)
        seen = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        x = x + F.linear(seen, v[b + "attn.out_proj.weight"], v[b + "attn.out_proj.bias"])
        inner = F.gelu(F.linear(norm(x, b + "ln_2"), v[b + "mlp.c_fc.weight"], v[b + "mlp.c_fc.bias"]))
        x = x + F.linear(inner, v[b + "mlp.c_proj.weight"], v[b + "mlp.c_proj.bias"])
    pool = torch.nn.MultiheadAttention(WIDTH, WIDTH // 128)
    pool.load_state_dict(
        {key.removeprefix("attn_pool.attn."): value for key, value in v.items() if key.startswith("attn_pool.attn.")}
    )
    keys = norm(F.linear(x, v["attn_pool.kv_proj.weight"]), "attn_pool.ln_kv").transpose(0, 1)
    query = norm(v["attn_pool.query"], "attn_pool.ln_q") + v["attn_pool.pos_embed"]
    out = pool(query[:, None].repeat(1, len(x), 1), keys + resized(v["attn_pool.pos_embed"], side)[:, None], keys)[0]
    return norm(out.transpose(0, 1), "ln_post") @ v["proj"]


def decoder(state):
    """transformers' Qwen2 with the same numbers under its own names."""
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=CONFIG["vocab_size"], hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, rms_norm_eps=1e-6, max_position_embeddings=700, use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).eval()  # fmt: skip
    own = {"model.embed_tokens.weight": state["transformer.wte.weight"], "lm_head.weight": state["lm_head.weight"]}
    own["model.norm.weight"] = state["transformer.ln_f.weight"]
    for n in range(LAYERS):
        h, m = f"transformer.h.{n}.", f"model.layers.{n}."
        own |= {
            m + "input_layernorm.weight": state[h + "ln_1.weight"],
            m + "post_attention_layernorm.weight": state[h + "ln_2.weight"],
        }
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", state[h + f"attn.c_attn.{kind}"].chunk(3), strict=True):
                own[m + f"self_attn.{part}_proj.{kind}"] = value
        own |= {
            m + "self_attn.o_proj.weight": state[h + "attn.c_proj.weight"],
            m + "mlp.up_proj.weight": state[h + "mlp.w1.weight"],
        }
        own |= {m + "mlp.gate_proj.weight": state[h + "mlp.w2.weight"], m + "mlp.down_proj.weight": state[h + "mlp.c_proj.weight"]}
    model.load_state_dict(own)
    return model


def user(*parts):
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    return {"role": "user", "content": [{"type": kind, kind: part} for kind, part in zip(kinds, parts, strict=True)]}


CASES = {
    "no image": [user("How are you?"), {"role": "assistant", "content": "Fine."}],
    "one image": [user(picture(90, 61, 1), "What is it?"), {"role": "assistant", "content": "Noise."}],
    "three images of odd sizes": [
        user(picture(3, 200, 4), "and", picture(57, 41, 5), picture(100, 7, 6), "?"),
        {"role": "assistant", "content": "Three."},
    ],
    "two turns": [
        user(picture(42, 42, 2), "Who?"),
        {"role": "assistant", "content": "Ann."},
        user("And", picture(9, 100, 3), "here?"),
        {"role": "assistant", "content": "Bob."},
    ],
}


def theirs(state, batch):
    embedded = state["transformer.wte.weight"][batch.ids]
    if batch.visual is not None:
        features = torch.cat(list(tower(state, batch.visual.pixels)))
        starts = (batch.ids == IMAGE_START).nonzero().flatten().tolist()
        for index, start in enumerate(starts):  # modeling_qwen.py: everything between <img> and </img>
            stop = start + batch.ids[start:].tolist().index(IMAGE_START + 1)
            embedded[start + 1 : stop] = features[256 * index : 256 * (index + 1)]
    with torch.no_grad():
        return decoder(state)(inputs_embeds=embedded[None]).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_logits(folder, case):
    ours, state = intermodal.load(folder), weights()
    batch = ours.processor(CASES[case])
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(state, batch), atol=1e-4, rtol=0)
    learned = ours.processor.decode(batch.ids[batch.supervised].tolist(), special=True)
    assert learned == "<|im_end|>".join(m["content"] for m in CASES[case] if m["role"] == "assistant") + "<|im_end|>"


def test_pixels(folder):
    """torchvision's Resize on a PIL picture is PIL's; then ToTensor and Normalize."""
    planner = intermodal.load(folder).processor.planner
    image = picture(123, 45, 4)
    mean, std = (
        np.array(values, np.float32) for values in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    expected = (np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255 - mean) / std
    got = planner.pixels([image], [planner.plan(image, 1)])[0]
    np.testing.assert_allclose(got.permute(1, 2, 0), expected, atol=1e-6)


def test_text_is_the_authors_chat_format(folder):
    processor = intermodal.load(folder).processor
    conversation = processor.conversation(CASES["two turns"][:3], reply=True)
    assert conversation.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <img><imgpad></img>\nWho?<|im_end|>\n<|im_start|>assistant\nAnn.<|im_end|>\n"
        "<|im_start|>user\nAndPicture 2: <img><imgpad></img>\nhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert conversation.ids.count(IMAGE_START + 2) == 512
    box = processor.planner.frame((200, 100), processor.planner.plan(picture(200, 100, 0), 1)).write((50, 20, 100, 60), "dog")
    assert box == "<ref>dog</ref><box>(250,200),(500,600)</box>"
    with pytest.raises(MediaError, match="no videos"):
        processor.planner.plan(Clip(np.zeros((2, 9, 9, 3), np.uint8), (0.0, 1.0), 1.0), 1)


def test_token_ids_equal_tiktoken():
    from tokenizers import Tokenizer

    data = b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in RANKS.items())
    ours = Tokenizer.from_str(tokenizer_files(data)["tokenizer.json"].decode())
    special = {token: FIRST + index for index, token in enumerate(SPECIAL)}
    oracle = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=RANKS, special_tokens=special)
    for text in (
        "the thing and the picture",
        "café  naïve 123 you're",
        "a\n\n b\r\n",
        "日本 the ing",
        "<|im_start|>user\nthe<img></img>",
        "",
    ):
        assert ours.encode(text).ids == oracle.encode(text, allowed_special="all")
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    for damaged in (b"!! 0\n", b"YQ== x\n", b"YQ== 1\n"):
        with pytest.raises(CheckpointError, match=r"qwen\.tiktoken"):
            tokenizer_files(damaged)


def test_sine_cosine_table():
    """visual.py, get_2d_sincos_pos_embed: columns first, sines before cosines."""
    table = sine_cosine(5, 8)
    omega = 1 / 10000 ** (np.arange(2) / 2)
    for row in range(5):
        for column in range(5):
            turns = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            np.testing.assert_allclose(table[row * 5 + column], np.concatenate(turns), atol=1e-6)


def test_round_trip(folder, tmp_path):
    ours = intermodal.load(folder)
    intermodal.save(ours, tmp_path)
    again, state = load_file(tmp_path / "model.safetensors"), weights()
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again[key], value), key
    assert {**CONFIG, **json.loads((tmp_path / "config.json").read_text())} == json.loads((tmp_path / "config.json").read_text())
    back = intermodal.load(tmp_path)
    batch = back.processor(CASES["one image"])
    assert batch.ids.tolist() == ours.processor(CASES["one image"]).ids.tolist()
    with torch.no_grad():
        assert torch.equal(back(batch), ours(batch))


def test_generation(folder):
    ours = intermodal.load(folder)
    ours.processor.end_ids = ()
    prompts = [CASES["one image"][:1], CASES["no image"][:1], CASES["two turns"][:3]]
    single = [ours.generate(p, max_new_tokens=6).ids for p in prompts]
    assert [reply.ids for reply in ours.generate_batch(prompts, max_new_tokens=6)] == single
    state, ids = weights(), ours.processor(prompts[0], reply=True)
    for expected in ours.generate(prompts[0], max_new_tokens=64).ids:
        assert int(theirs(state, ids)[-1].argmax()) == expected
        ids.ids = torch.cat([ids.ids, torch.tensor([expected])])


def test_pictures_that_the_assistant_shows_are_read_and_its_words_are_learned(folder):
    """Their number and frame are the template's, not the assistant's."""
    model = intermodal.load(folder, dtype="float64")
    shown = {"type": "image", "image": picture(30, 40, 7)}
    words = [{"type": "text", "text": text} for text in ("the ", " thing")]
    talk = [user("Which?"), {"role": "assistant", "content": [words[0], shown, words[1], shown]}]
    conversation = model.processor.conversation(talk)
    model.processor.audit(conversation)
    learned = [token for token, on in zip(conversation.ids, conversation.supervised, strict=True) if on]
    assert model.processor.decode(learned, special=True) == "the  thing<|im_end|>"
    check_packed_equals_separate(model, [talk, CASES["one image"]])


def test_files_in_bf16_in_shards_and_with_the_buffer_of_the_release(folder, tmp_path):
    """Scores are those of the published formulas over the same numbers."""
    messages, state = CASES["two turns"], weights()
    bf16 = copied(folder, tmp_path / "bf16")
    halved = {key: value.bfloat16() for key, value in state.items()}
    save_file(halved, bf16 / "model.safetensors")
    ours = intermodal.load(bf16)
    batch = ours.processor(messages)
    with torch.no_grad():
        expected = theirs({key: value.float() for key, value in halved.items()}, batch)
        torch.testing.assert_close(ours(batch), expected, atol=1e-4, rtol=0)
    intermodal.save(intermodal.load(bf16, dtype="bfloat16"), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == halved.keys()
    assert all(torch.equal(again[key], value) for key, value in halved.items())
    intermodal.save(intermodal.load(folder), tmp_path / "shards", shard_bytes=500_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(intermodal.load(tmp_path / "shards")(batch), intermodal.load(folder)(batch))
    check_left_over(folder, messages, ["transformer.rotary_emb.inv_freq"], tmp_path / "left")


@torch.no_grad()
def test_cached_equals_uncached(folder):
    """Keys and values: every token of a conversation with pictures, read in parts and one by one, scores as in one reading; and many
    replies at once are those of each alone without any cache."""
    model = intermodal.load(folder)
    for case in ("two turns", "three images of odd sizes", "no image"):
        batch = model.processor(CASES[case])
        expected = model(batch)
        whole, deep = model.embed(batch)
        assert deep is None
        for sizes in ([5, *[1] * (len(batch.ids) - 5)], [300, 1, len(batch.ids) - 301], [len(batch.ids) - 1, 1]):
            if min(sizes) < 1:
                continue
            cache, at, got = model.model.cache(1), 0, []
            for size in sizes:
                segments = Segments([size])
                cache.begin([0], segments)
                got.append(
                    model.unembed(model.model(whole[at : at + size], segments, batch.positions[at : at + size], cache=cache))
                )
                cache.commit()
                at += size
            torch.testing.assert_close(torch.cat(got), expected, atol=1e-5, rtol=1e-4)
    model.processor.end_ids = ()
    prompts = [CASES[case][:-1] for case in ("one image", "two turns", "no image")]
    for prompt, reply in zip(prompts, model.generate_batch(prompts, max_new_tokens=16, slots=2), strict=True):
        model.vision_cache = None
        batch = model.processor(prompt, reply=True)
        for token in reply.ids:
            assert int(model.unembed(model.hidden(batch)[-1:])[0].argmax()) == token
            batch.ids = torch.cat([batch.ids, torch.tensor([token])])
            batch.positions, batch.segments = torch.arange(len(batch.ids)), Segments([len(batch.ids)])


def test_a_cache_of_the_tower_changes_nothing(folder, tmp_path):
    model = intermodal.load(folder)
    talks = [CASES[case] for case in ("one image", "three images of odd sizes", "two turns")]
    check_cached_equals_uncached(model, talks, tmp_path)
    check_keys(model.processor, picture(40, 50, 1), picture(40, 50, 2))


def test_packed_equals_separate(folder):
    check_packed_equals_separate(intermodal.load(folder, dtype="float64"), CASES.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": None}, "text-only first Qwen"),
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"hidden_size": 384}, "output_dim"),
        ({"visual": {**CONFIG["visual"], "n_queries": 200}}, "square grid"),
    ],
)
def test_what_is_not_built_is_refused(folder, tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        intermodal.load(tmp_path)


def test_too_long_counts_what_is_shown(folder, monkeypatch):
    check_too_long(intermodal.load(folder), CASES["three images of odd sizes"], user("And then?"), monkeypatch)
