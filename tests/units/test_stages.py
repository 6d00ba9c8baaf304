"""Conversations as data, stitched models made, trained in stages and read back."""

import json
import random
import shutil
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch.multiprocessing import ProcessRaisedException
from typer.testing import CliRunner

import intermodal
from intermodal.batch import TokenBatch
from intermodal.cli.app import app
from intermodal.config import SettingError, override
from intermodal.data.loader import DataError
from intermodal.data.packing import TalkFetcher, bins
from intermodal.data.questions import questions
from intermodal.data.readers import SourceError
from intermodal.data.scenes import SceneConfig, Scenes
from intermodal.data.talks import FileTalks, messages_of, open_talks
from intermodal.errors import IntermodalError, SampleError
from intermodal.losses_tokens import next_token_loss, targets
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import LanguageModel
from intermodal.train import stages as staged
from intermodal.train.contrastive import train
from intermodal.train.learning import patterns
from intermodal.train.loop import NotFinite
from intermodal.train.recipe import LoraConfig, load_recipe
from intermodal.train.stages import train_stages
from intermodal.weights.stitch import fresh_decoder, stitch

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from ranks import on_ranks

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    out = tmp_path_factory.mktemp("tower")
    train(load_recipe(RECIPES / "siglip.py", tiny=True), out, quiet=True)
    return str(out / "model")


@pytest.fixture(scope="module")
def recipe(tower):
    made = load_recipe(RECIPES / "llava.py", tiny=True)
    stages = tuple(replace(stage, train=replace(stage.train, threads=1, precision="fp32", save_every=2)) for stage in made.stages)
    return replace(made, model=replace(made.model, vision=tower), stages=stages)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("stages")
    train_stages(recipe, out, quiet=True)
    return out


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


# --- conversations


def test_questions_are_answered_by_the_facts_and_do_not_give_them_away():
    scenes = Scenes(SceneConfig(word_share=0.5))
    seen = {}
    for index in range(200):
        facts = scenes.scene(index).facts
        for question in questions(facts):
            seen.setdefault(question.kind, set()).add(question.answer)
            assert question.answer not in question.text
            if question.kind == "sign":
                assert question.answer == facts.word
    assert set(seen) == {"count", "where", "colour", "sign"}
    assert {"one", "two", "three", "four"} <= seen["count"]


def test_llava_records_become_messages():
    record = {
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?\n<image>"},
            {"from": "gpt", "value": "A cat and a dog."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    first, *rest = messages_of(record)
    assert first["content"] == [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "What is this?"},
        {"type": "image", "image": "b.png"},
    ]
    assert [message["role"] for message in rest] == ["assistant", "user", "assistant"]
    assert rest[1]["content"] == "Sure?"
    for broken, words in (
        ({**record, "image": "a.png"}, "more <image> than"),
        ({**record, "image": ["a", "b", "c"]}, "names more images"),
        ({"conversations": [{"from": "robot", "value": ""}]}, "robot"),
        ({"text": "x"}, "needs `messages`"),
    ):
        with pytest.raises(SampleError, match=words):
            messages_of(broken)


def test_a_file_of_conversations_rejects_bad_lines_by_number(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    good = {
        "id": "g",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>hi"}, {"from": "gpt", "value": "one"}],
    }
    (tmp_path / "t.jsonl").write_text("\n".join(["{broken", json.dumps(good), json.dumps(["x"])]))
    source = FileTalks(tmp_path / "t.jsonl")
    assert source[1].messages[0]["content"][0]["image"] == str(tmp_path / "a.png")
    with pytest.raises(SampleError, match="line 1 is not JSON"):
        source[0]
    with pytest.raises(SampleError, match="role"):
        source[2]
    (tmp_path / "u.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": ["hi"]}]}))
    with pytest.raises(SampleError, match="must be an object"):
        FileTalks(tmp_path / "u.jsonl")[0]
    with pytest.raises(SourceError, match=r"holds no conversations.*did you mean 'questions'"):
        open_talks("question:scenes:core")
    with pytest.raises(SourceError, match="made from facts"):
        open_talks("questions:sprites:core")


def test_bins_hold_everything_once_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 60, (40,), generator=generator).tolist()
        packed = bins(lengths, 64)
        assert sorted(i for chosen in packed for i in chosen) == list(range(40))
        sums = [sum(lengths[i] for i in chosen) for chosen in packed]
        assert max(sums) <= 64
        assert len(packed) <= 1.3 * sum(lengths) / 64 + 1
    with pytest.raises(ValueError, match="65 tokens"):
        bins([65], 64)


# --- the loss


def test_the_loss_is_the_plain_cross_entropy_of_each_conversation_alone():
    torch.manual_seed(0)
    parts = []
    for length in (5, 1, 9, 2):
        mask = torch.rand(length) < 0.6
        mask[0] = True  # a first token has nothing before it: never a target
        parts.append(TokenBatch(torch.randint(0, 11, (length,)), _segments(length), torch.arange(length), mask))
    hidden = [torch.randn(len(part.ids), 6, dtype=torch.float64, requires_grad=True) for part in parts]
    head = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    plain, count = torch.zeros((), dtype=torch.float64), 0
    for part, rows in zip(parts, hidden, strict=True):
        wanted = part.supervised[1:]
        logits = (rows @ head.T)[:-1][wanted]
        plain = plain + F.cross_entropy(logits, part.ids[1:][wanted], reduction="sum")
        count += int(wanted.sum())
    expected = torch.autograd.grad(plain, [*hidden, head])
    pack = TokenBatch.pack(parts)
    for chunk in (1, 3, 1000):
        total, found = next_token_loss(torch.cat(hidden), head, pack, chunk)
        assert found == count == len(targets(pack)[0])
        torch.testing.assert_close(total, plain, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(total, [*hidden, head]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def _segments(length):
    from intermodal.nn.attention import Segments

    return Segments([length])


# --- stages


def test_only_named_parts_move(recipe, trained, tmp_path):
    stages = (replace(recipe.stages[0], name="projector", learn=(("projector.*", 1.0), ("projector.linear_1.*", 0.0))),)
    run = train_stages(replace(recipe, stages=stages), tmp_path / "run", quiet=True)
    before, after = weights(tmp_path / "run" / "1-projector" / "initial"), weights(tmp_path / "run" / "model")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias"}
    assert run.family == "llava"
    whole_before, whole_after = weights(trained / "1-align" / "initial"), weights(trained / "model")
    still = {key for key in whole_before if torch.equal(whole_before[key], whole_after[key])}
    assert still == {key for key in whole_before if "post_layernorm" in key}  # behind the layer that is read: no gradient


def test_a_frozen_tower_keeps_nothing_for_the_backward(recipe, trained):
    from intermodal.train.optim import choose_learning

    model = intermodal.load(trained / "model").train()
    choose_learning(model, (("projector.*", 1.0),))
    talk = open_talks("captions:scenes:core", side=32)[0]
    batch = model.processor(talk.messages)
    assert not model.features(batch.visual.pixels).requires_grad
    next_token_loss(model.hidden(batch), model.head_weight, batch)[0].backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"projector"}
    with pytest.raises(IntermodalError, match=r"no parameter fits 'connector.\*'"):
        choose_learning(model, (("connector.*", 1.0),))
    with pytest.raises(IntermodalError, match="no parameter learns"):
        choose_learning(model, (("projector.*", 0.0),))


def test_an_interrupted_stage_resumes_bit_for_bit(recipe, trained, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "2-instruct" / "model")
    shutil.rmtree(run / "2-instruct" / "checkpoints" / "step-00000003")
    lines = (trained / "2-instruct" / "metrics.jsonl").read_text().splitlines()
    with pytest.raises(IntermodalError, match="already holds a run"):
        train_stages(recipe, trained, quiet=True)
    train_stages(recipe, run, resume=True, quiet=True)
    again, once = weights(run / "model"), weights(trained / "model")
    assert all(torch.equal(again[key], once[key]) for key in once)
    values = [json.loads(line)["loss"] for line in (run / "2-instruct" / "metrics.jsonl").read_text().splitlines()]
    assert values == [json.loads(line)["loss"] for line in lines]


def test_a_run_of_stages_keeps_its_model(recipe, trained, tmp_path):
    """Its settings are in no checkpoint of a stage, and would not be read any more."""
    import shutil

    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "model")
    kept = (run / "recipe.json").read_bytes()
    other = override(recipe, ["model.decoder.depth=7", "stages.align.train.steps=9"])
    with pytest.raises(IntermodalError, match=r"cannot go on with model\.decoder\.depth \d -> 7"):
        train_stages(other, run, resume=True, quiet=True)
    with pytest.raises(IntermodalError, match="already holds a run"):  # which would have replaced the recipe
        train_stages(other, run, quiet=True)
    assert (run / "recipe.json").read_bytes() == kept


def test_smaller_packs_do_not_change_a_step(recipe, trained, tmp_path):
    stages = tuple(replace(stage, data=replace(stage.data, tokens=160)) for stage in recipe.stages)
    train_stages(replace(recipe, stages=stages), tmp_path / "run", quiet=True)
    for stage in ("1-align", "2-instruct"):
        few, many = (
            [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
            for run in (trained, tmp_path / "run")
        )
        assert not any(line["rejects"] for line in [*few, *many])
        assert sum(line["packs"] for line in many) > sum(line["packs"] for line in few)
        for one, other in zip(few, many, strict=True):
            assert (one["supervised_tokens"], one["tokens"]) == (other["supervised_tokens"], other["tokens"])
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
            for name in ("entropy", "log_z", "score_norm", "highest_score"):
                assert other[name] == pytest.approx(one[name], rel=1e-3), name


def _on_rank(rank, size, recipe, out):
    train_stages(recipe, out, quiet=True)


def test_two_ranks_equal_one_with_pictures_on_one_of_them(recipe, trained, tmp_path):
    """Rank 0 takes the first half of each step. Text-only conversations there leave it without a picture: nobody waits for it."""
    rows = []
    for number in range(6):
        Image.fromarray(np.full((16, 16, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    for number in range(6):
        picture = {"image": f"{number}.png"} if number >= 3 else {}
        ask = "<image>how many dogs are there ?" if picture else "how many dogs are there ?"
        turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": "one" if number % 2 else "two"}]
        rows.append({**picture, "conversations": turns})
    (tmp_path / "mix.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:3]))
    for name in ("mix", "text"):
        data = replace(recipe.stages[0].data, train=(str(tmp_path / f"{name}.jsonl"),), batch=2)
        learn = (("projector.*", 1.0), ("model.layers.*", 1.0)) if name == "text" else recipe.stages[0].learn
        train_ = replace(recipe.stages[0].train, save_every=None, precision="fp64")
        stages = (replace(recipe.stages[0], data=data, learn=learn, train=train_),)
        one = replace(recipe, model=replace(recipe.model, start=str(trained / "model")), stages=stages)
        train_stages(one, tmp_path / f"{name}-one", quiet=True)
        on_ranks(2, _on_rank, one, tmp_path / f"{name}-two")
        alone, together = weights(tmp_path / f"{name}-one" / "model"), weights(tmp_path / f"{name}-two" / "model")
        start = weights(trained / "model")
        still = {key for key in start if "projector" in key and torch.equal(together[key], start[key])}
        assert len(still) == (4 if name == "text" else 0), (
            "without a picture anywhere nothing may move the projector, decay included"
        )
        assert_same_run(tmp_path / f"{name}-two", tmp_path / f"{name}-one", alone)


def assert_same_run(run, other, expected):
    """The stage's log and last weights are those of another run (both in float64): a step moves a weight by 2e-3."""
    logs = [[json.loads(line) for line in (one / "1-align" / "metrics.jsonl").read_text().splitlines()] for one in (other, run)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["supervised_tokens"] == theirs["supervised_tokens"]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-9)
        assert theirs["gradient_norm"] == pytest.approx(ours["gradient_norm"], rel=1e-9)
        for name in ("entropy", "log_z", "score_norm", "highest_score"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name
        assert ours["attention_score"] > 0
    got = weights(run / "model")
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-6)


def _held_on_rank(rank, size, recipe, out):
    """Train, and say which share of the weights this rank held."""
    held, shard = [], staged.shard_layers

    def measured(model, *arguments):
        shard(model, *arguments)
        parameters = list(model.parameters())
        held.append(sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters))

    staged.shard_layers = measured
    train_stages(recipe, out, quiet=True)
    return held[0]


def test_sharded_ranks_equal_one_whatever_media_they_hold(recipe, trained, tmp_path):
    """FSDP: one rank has three packs, the other one; pictures are on one of them; everything learns, the tower too."""
    rows = []
    for number in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * number, np.uint8)).save(tmp_path / f"{number}.png")
        picture = {"image": f"{number}.png"} if number % 4 == 3 else {}
        ask = f"{'<image>' if picture else ''}{'how many dogs are there ? ' * (1 if number % 4 > 1 else 9)}"
        rows.append({**picture, "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": "two"}]})
    (tmp_path / "mix.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    learn = (("*", 1.0), ("vision.*", 0.5))
    data = replace(recipe.stages[0].data, train=(str(tmp_path / "mix.jsonl"),), batch=4, tokens=130)
    for name, extra in (("all", {}), ("lora", {"lora": LoraConfig(("model.layers.*_proj",), rank=2)})):
        train = replace(recipe.stages[0].train, save_every=None, parallel="fsdp", precision="fp64")
        taught = (("*lora_*", 1.0), ("projector.*", 1.0)) if extra else learn
        stage = replace(recipe.stages[0], learn=taught, data=data, train=train, **extra)
        one = replace(recipe, model=replace(recipe.model, start=str(trained / "model")), stages=(stage,))
        train_stages(one, tmp_path / f"{name}-one", quiet=True)
        shares = on_ranks(2, _held_on_rank, one, tmp_path / f"{name}-two")
        assert sum(shares) == pytest.approx(1)
        assert max(shares) < 0.6
        alone, start = weights(tmp_path / f"{name}-one" / "model"), weights(trained / "model")
        moved = {key.split(".")[0] for key in alone if not torch.equal(alone[key], start[key])}
        assert {"multi_modal_projector", "language_model"} <= moved
        assert_same_run(tmp_path / f"{name}-two", tmp_path / f"{name}-one", alone)
    for broken, message in (
        ({"learn": (("projector.*", 1.0),), "cache_tower": True}, "cache_tower needs"),
        ({"learn": (("lm_head.*", 1.0),)}, "learns the output layer alone needs"),
    ):
        stage = replace(one.stages[0], lora=None, **broken)
        with pytest.raises(ProcessRaisedException, match=message):
            on_ranks(2, _on_rank, replace(one, stages=(stage,)), tmp_path / "refused")


def test_a_stage_of_the_projector_alone_passes_over_words(recipe, trained, tmp_path):
    """A pack without a picture meets nothing that learns: it has a loss and no backward."""
    turns = [{"from": "human", "value": "how many dogs are there ?"}, {"from": "gpt", "value": "two"}]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"conversations": turns}) for _ in range(4)))
    data = replace(recipe.stages[0].data, train=(str(tmp_path / "text.jsonl"), "captions:scenes:core"), weights=(3.0, 1.0), batch=2)
    train = replace(recipe.stages[0].train, save_every=None, steps=6)
    stage = replace(recipe.stages[0], learn=(("projector.*", 1.0),), data=data, train=train)
    begun = replace(recipe, model=replace(recipe.model, start=str(trained / "model")), stages=(stage,))
    assert told(begun, tmp_path / "run") == "", "a step without a picture is no reason to speak"
    before, after = weights(trained / "model"), weights(tmp_path / "run" / "model")
    assert {key for key in before if not torch.equal(before[key], after[key])} <= {key for key in before if "projector" in key}
    assert any(not torch.equal(before[key], after[key]) for key in before)


def told(recipe, out):
    """What a run says although it is quiet."""
    said = StringIO()
    train_stages(recipe, out, quiet=True, console=Console(file=said, width=200))
    return said.getvalue()


def _told_on_rank(rank, size, recipe, out):
    return told(recipe, out)


def staged_of(recipe, **changes):
    """One stage of the recipe, three steps of two conversations."""
    stage = recipe.stages[0]
    data = replace(stage.data, batch=2, **changes.pop("data", {}))
    train = replace(stage.train, steps=3, save_every=1, **changes.pop("train", {}))
    return replace(recipe, stages=(replace(stage, data=data, train=train, **changes),))


def test_what_should_learn_and_gets_no_gradient_is_named(recipe, tower, trained, tmp_path):
    """LLaVA reads a CLIP before its last block: adapters on that one would be trained for nothing."""
    blocks = intermodal.load(tower).config.vision.depth
    read = replace(recipe, model=replace(recipe.model, layer=-2))
    adapters = LoraConfig(("vision.encoder.layers.*.q_proj", "projector.linear_2"), rank=2)
    lora = dict(lora=adapters, learn=(("*lora_*", 1.0),))
    said = told(staged_of(read, **lora), tmp_path / "lora")
    assert (
        f"no gradient reached 2 parameters that should learn in step 1, which had pictures: vision.encoder.layers.{blocks - 1}.*\n"
        in said
    )
    assert said.count("\n") == 1
    for parallel in ("ddp", "fsdp"):
        ranks = on_ranks(2, _told_on_rank, staged_of(read, **lora, train={"parallel": parallel}), tmp_path / parallel)
        assert ranks == [said, ""]
    whole = told(staged_of(read, learn=(("*", 1.0),)), tmp_path / "whole")
    assert f": vision.encoder.layers.{blocks - 1}.*, vision.post_layernorm.*\n" in whole
    assert (
        told(
            staged_of(read, learn=(("*", 1.0), (f"vision.encoder.layers.{blocks - 1}.*", 0.0), ("vision.post*", 0.0))),
            tmp_path / "b",
        )
        == ""
    )


def test_a_stage_that_teaches_nothing_is_refused(recipe, trained, tmp_path):
    """At its first step where pictures do not help, at its last where there were none; two ranks say so as one does."""
    turns = [{"from": "human", "value": "how many dogs are there ?"}, {"from": "gpt", "value": "two"}]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"conversations": turns}) for _ in range(4)))
    begun, words = (
        replace(recipe, model=replace(recipe.model, start=str(trained / "model"))),
        {"train": (str(tmp_path / "text.jsonl"),)},
    )
    behind = staged_of(begun, learn=(("vision.post_layernorm.*", 1.0),))
    unshown = staged_of(begun, learn=(("projector.*", 1.0), ("vision.*", 1.0)), data=words)
    for name, run, message, steps in (
        ("behind", behind, r"align teaches nothing: .* in step 1, which had pictures: vision\.\*", 0),
        ("unshown", unshown, r"align teaches nothing: .* \(nothing was shown to the model\): projector\.\*, vision\.\*", 2),
    ):
        with pytest.raises(IntermodalError, match=message):
            train_stages(run, tmp_path / name, quiet=True)
        assert not (tmp_path / name / "1-align" / "model").exists()
        assert len(list((tmp_path / name / "1-align").glob("checkpoints/step-*"))) == steps
    with pytest.raises(ProcessRaisedException, match=message):
        on_ranks(2, _on_rank, run, tmp_path / "two")
    with pytest.raises(IntermodalError, match="nothing was shown"):
        train_stages(unshown, tmp_path / "unshown", resume=True, quiet=True)
    partly = told(staged_of(begun, learn=(("projector.*", 1.0), ("model.norm.*", 1.0)), data=words), tmp_path / "partly")
    assert "no gradient reached 4 parameters that should learn (nothing was shown to the model): projector.*\n" in partly


def test_patterns_fit_whole_modules():
    among = ["a.0.x.w", "a.0.x.b", "a.0.y.w", "a.1.x.w", "b.w", "c"]
    assert patterns(["a.0.x.w", "a.0.x.b"], among) == ["a.0.x.*"]
    assert patterns(["a.0.x.w", "a.0.x.b", "a.0.y.w", "c"], among) == ["a.0.*", "c"]
    assert patterns(["a.0.x.w"], among) == ["a.0.x.w"]
    assert patterns(among, among) == ["a.*", "b.*", "c"]


def test_training_refuses_what_teaches_nothing(recipe, trained, tmp_path):
    silent = [{"messages": [{"role": "user", "content": "hello"}]} for _ in range(3)]
    (tmp_path / "silent.jsonl").write_text("\n".join(json.dumps(row) for row in silent))
    data = replace(recipe.stages[0].data, train=(str(tmp_path / "silent.jsonl"),))
    run = replace(recipe, model=replace(recipe.model, start=str(trained / "model")), stages=(replace(recipe.stages[0], data=data),))
    with pytest.raises(
        DataError, match=r"of \d conversations of .*silent\.jsonl cannot be trained on; the last: .*no token is supervised"
    ):
        train_stages(run, tmp_path / "run", quiet=True)
    model = intermodal.load(trained / "model")
    good = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "one"}]}
    for share, refused in ((7, True), (1, False)):
        rows = [silent[0] if number % 8 < share else good for number in range(800)]
        (tmp_path / "mixed.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        fetcher = TalkFetcher([open_talks(str(tmp_path / "mixed.jsonl"))], model.processor, 0, 256, 512)
        if refused:
            with pytest.raises(DataError, match=r"[5-8] of \d conversations of .*mixed\.jsonl cannot be trained on"):
                fetcher.audit()
            fetcher.audit(1.0)  # as its owner says
        else:
            fetcher.audit()
    model.processor.end_ids = (0,)
    fetcher = TalkFetcher([open_talks("captions:scenes:core", side=32)], model.processor, 0, 256, 512)
    with pytest.raises(DataError, match="no end-of-turn token"):
        fetcher.audit()


def test_a_step_that_is_not_finite_names_its_samples(recipe, trained, tmp_path):
    model = intermodal.load(trained / "model")
    model.projector.linear_2.bias.data.fill_(3e38)  # finite itself: a file with inf is refused when it is read
    broken = intermodal.save(model, tmp_path / "broken")
    run = replace(recipe, model=replace(recipe.model, start=str(broken)), stages=recipe.stages[:1])
    with pytest.raises(
        NotFinite,
        match=r"the norm of the gradients is nan, with a finite loss, at step 1; this rank's samples: scenes-core-train-0/\d",
    ):
        train_stages(run, tmp_path / "run", quiet=True)


def test_overrides_reach_a_stage_by_its_name(recipe):
    made = override(recipe, ["stages.align.train.steps=9", "stages.instruct.optim.lr=0.5", "model.vocabulary=99"])
    assert (made.stages[0].train.steps, made.stages[1].optim.lr, made.model.vocabulary) == (9, 0.5, 99)
    with pytest.raises(SettingError, match="did you mean 'align'"):
        override(recipe, ["stages.aling.train.steps=9"])
    with pytest.raises(SettingError, match="did you mean"):
        override(recipe, ["stages.align.train.step=9"])


# --- stitching


def test_a_stitched_folder_is_transformers_llava(trained):
    import transformers

    ours = intermodal.load(trained / "model")
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(trained / "model", output_loading_info=True)
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(trained / "model")
    messages = open_talks("questions:scenes:core", side=32)[3].messages
    picture = messages[0]["content"][0]["image"]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    wanted = processor(text=text, images=[picture], return_tensors="pt")
    batch = ours.processor(messages)
    assert wanted["input_ids"][0].tolist() == batch.ids.tolist()
    torch.testing.assert_close(batch.visual.pixels, wanted["pixel_values"], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs.eval()(**wanted).logits[0], rtol=0, atol=1e-4)


def test_a_stitched_anyres_folder_is_transformers_llava_next(tower, tmp_path):
    import transformers

    from intermodal.weights.load import load_encoder

    parent = load_encoder(tower)
    shape = DecoderConfig(width=32, depth=2, heads=2, kv_heads=1, head_width=16, mlp_width=48, vocab_size=0, context=4000)
    made = stitch(parent, fresh_decoder(shape, ["how many dogs are there ?", "one"], 64), anyres=((1, 2), (2, 1), (2, 2)))
    intermodal.save(made, tmp_path)
    theirs, info = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    processor, ours = transformers.AutoProcessor.from_pretrained(tmp_path), intermodal.load(tmp_path)
    assert ours.family == "llava_next"
    rng = np.random.default_rng(0)
    for width, height in ((40, 90), (64, 64), (97, 31)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "how many dogs are there ?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "one"}]
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
        wanted = processor(text=text, images=[picture], return_tensors="pt")
        for model in (made, ours):
            batch = model.processor(messages)
            assert wanted["input_ids"][0].tolist() == batch.ids.tolist()
            torch.testing.assert_close(batch.visual.pixels, wanted["pixel_values"][0], rtol=0, atol=1e-6)
            with torch.no_grad():
                torch.testing.assert_close(model(batch), theirs.eval()(**wanted).logits[0], rtol=0, atol=1e-4)


def clip_of(frames: int, right: bool = True) -> np.ndarray:
    """A bright bar that moves over a grey ground, (F, 40, 64, 3)."""
    pixels = np.full((frames, 40, 64, 3), 90, np.uint8)
    for number, frame in enumerate(pixels):
        at = 6 + 44 * (number if right else frames - 1 - number) // max(1, frames - 1)
        frame[:, at : at + 8] = (250, 200, 40)
    return pixels


@pytest.mark.parametrize("anyres", [(), ((1, 2), (2, 1), (2, 2))])
def test_a_stitched_onevision_folder_is_transformers_llava_onevision(anyres, tower, tmp_path):
    """Tiles of one picture, several pictures, and a clip; ids and pixels of pictures too (transformers' clips need torchvision)."""
    import transformers

    from intermodal.weights.load import load_encoder

    shape = DecoderConfig(width=32, depth=2, heads=2, kv_heads=1, head_width=16, mlp_width=48, vocab_size=0, context=4000)
    language = fresh_decoder(shape, ["how many dogs are there ?", "one"], 64)
    made = stitch(load_encoder(tower), language, anyres=anyres, onevision=True)
    intermodal.save(made, tmp_path)
    theirs, info = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert len(theirs.config.image_grid_pinpoints) == (len(anyres) or 36)
    pictures = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    ours = intermodal.load(tmp_path)
    assert ours.family == "llava_onevision"
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in ((40, 90), (97, 31))]
    for media in ([noise[0]], [noise[1]], noise, [clip_of(5)]):
        kinds = ["video" if isinstance(item, np.ndarray) else "image" for item in media]
        content = [{"type": kind, kind: item} for kind, item in zip(kinds, media, strict=True)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "how many dogs are there ?"}]}]
        messages.append({"role": "assistant", "content": "one"})
        for model in (made, ours):
            batch = model.processor(messages)
            given = {"input_ids": batch.ids[None]}
            if kinds == ["video"]:
                given["pixel_values_videos"] = batch.visual.pixels[None]
                assert (batch.ids == theirs.config.video_token_id).sum() == 5 * 4 + 1  # 4 x 4 features pooled to 2 x 2, a newline
            else:
                wanted = pictures(media, return_tensors="pt")
                given |= {key: wanted[key] for key in ("pixel_values", "image_sizes")}
                given["batch_num_images"] = torch.tensor([len(media)])
                if len(media) == 1:
                    torch.testing.assert_close(batch.visual.pixels, wanted["pixel_values"][0], rtol=0, atol=1e-6)
                else:
                    given["pixel_values"] = batch.visual.pixels[:, None]
            with torch.no_grad():
                torch.testing.assert_close(model(batch), theirs.eval()(**given).logits[0], rtol=0, atol=1e-4)


def test_onevision_learns_from_clips_in_its_three_stages(tower, tmp_path):
    """`recipes/onevision.py` from parts, on clips, pictures and words: which way a bar moves, which no single frame tells."""
    rng, lines = random.Random(0), []
    for number in range(24):
        right = rng.random() < 0.5
        frames = [Image.fromarray(frame) for frame in clip_of(4, right)]
        for at, frame in enumerate(frames):
            frame.save(tmp_path / f"{number}-{at}.png")
        video = {"type": "video", "video": [f"{number}-{at}.png" for at in range(4)], "fps": 2.0}
        asked = [{"role": "user", "content": [video, {"type": "text", "text": "which way ?"}]}]
        lines.append({"messages": [*asked, {"role": "assistant", "content": "right" if right else "left"}]})
    lines.append({"messages": [{"role": "user", "content": "which way ?"}, {"role": "assistant", "content": "left"}]})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clips = f'["{tmp_path / "clips.jsonl"}"]'
    settings = [
        f"model.vision={tower}",
        "model.onevision=true",
        f"stages.onevision.data.train={clips}",
        "stages.onevision.data.batch=8",
    ]
    settings += ["stages.onevision.train.steps=40", "stages.onevision.optim.lr=3e-3", "stages.onevision.optim.warmup=0"]
    recipe = override(load_recipe(RECIPES / "onevision.py", tiny=True), settings)
    model = train_stages(recipe, tmp_path / "run", quiet=True)
    assert model.family == "llava_onevision"
    logged = [json.loads(line) for line in (tmp_path / "run" / "3-onevision" / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    for right, word in ((True, "right"), (False, "left")):
        question = {"type": "text", "text": "which way ?"}
        content = [{"type": "video", "video": clip_of(4, right)}, question]
        assert model.generate([{"role": "user", "content": content}], max_new_tokens=2).text.strip() == word


def test_another_template_is_trained_with_and_saved(recipe, trained, tmp_path):
    """A released LLaVA 1.5's template ends no reply: the audit refuses it, and `model.template` names another."""
    folder, file = tmp_path / "endless", tmp_path / "mine.jinja"
    shutil.copytree(trained / "model", folder)
    own = (folder / "chat_template.jinja").read_text()
    endless = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}{% endif %} {% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(endless)
    stage = replace(recipe.stages[1], train=replace(recipe.stages[1].train, steps=1))
    started = replace(recipe, model=replace(recipe.model, start=str(folder)), stages=(stage,))
    with pytest.raises(IntermodalError, match="replies would not end"):
        train_stages(started, tmp_path / "refused", quiet=True)
    file.write_text(own)
    train_stages(replace(started, model=replace(started.model, template=str(file))), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == own
    file.write_text("{% if %}")
    for name, message in (("mine.jinja", "does not compile"), ("none.jinja", "cannot be read")):
        with pytest.raises(IntermodalError, match=message):
            train_stages(replace(started, model=replace(started.model, template=str(tmp_path / name))), tmp_path / "no", quiet=True)


@pytest.mark.parametrize("layer", [99, -99])
def test_a_layer_that_the_tower_does_not_have_is_refused(layer, tower):
    vision = intermodal.load(tower)
    language = fresh_decoder(DecoderConfig(32, 1, 2, 1, 16, 64, 0), ["a cat"], 300)
    with pytest.raises(IntermodalError, match=f"layer {layer}: a tower of {vision.config.vision.depth} layers"):
        stitch(vision, language, layer=layer)


def test_the_stitch_verb_keeps_both_parents(tower, tmp_path):
    shape = DecoderConfig(width=32, depth=2, heads=2, kv_heads=1, head_width=16, mlp_width=48, vocab_size=0, context=128, tied=True)
    decoder = fresh_decoder(shape, ["how many dogs are there ?", "one"], 64)
    intermodal.save(decoder, tmp_path / "decoder")
    done = CliRunner().invoke(
        app, ["stitch", "--vision", tower, "--language", str(tmp_path / "decoder"), "--out", str(tmp_path / "made")]
    )
    assert done.exit_code == 0, done.output
    made = intermodal.load(tmp_path / "made")
    parent = intermodal.load(tower)
    for key, value in parent.vision.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(made.vision.state_dict()[key], value), key
    question = [{"role": "user", "content": "how many dogs are there ?"}]
    rows = decoder.config.vocab_size
    assert torch.equal(made.logits(question)[:, :rows], decoder.logits(question))
    arguments = ["stitch", "--vision", tower, "--language", str(tmp_path / "decoder"), "--out", str(tmp_path / "tiles")]
    done = CliRunner().invoke(app, [*arguments, "--anyres", "1x2,2x2"])
    assert done.exit_code == 0, done.output
    assert intermodal.load(tmp_path / "tiles").config.pinpoints == ((32, 64), (64, 64))
    done = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "clips"), "--onevision", "--anyres", "1x2"])
    assert done.exit_code == 0, done.output
    made = intermodal.load(tmp_path / "clips")
    assert (made.family, made.config.pinpoints, made.config.max_tiles) == ("llava_onevision", ((32, 64),), 9)
    assert torch.equal(made.logits(question)[:, :rows], decoder.logits(question))
    assert "--anyres takes grids" in str(CliRunner().invoke(app, [*arguments, "--anyres", "2by2"]).exception)
    with pytest.raises(IntermodalError, match="without a tokenizer or chat template"):
        stitch(parent, LanguageModel(replace(shape, vocab_size=9)))


# --- adapters


def test_adapters_train_alone_save_alone_and_merge_exactly(recipe, trained, tmp_path):
    from intermodal.train import lora

    targets = ("model.layers.*.self_attn.*_proj", "projector.linear_2", "vision.encoder.layers.0.*.q_proj", "lm_head")
    settings = LoraConfig(targets, rank=4, alpha=8.0)
    stage = replace(recipe.stages[1], name="adapt", lora=settings, learn=(("*lora_*", 1.0),))
    whole = replace(recipe, model=replace(recipe.model, start=str(trained / "model")), stages=(stage,))
    made = train_stages(whole, tmp_path / "run", quiet=True)
    before, after = weights(trained / "model"), weights(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    depth = recipe.model.decoder.depth
    assert len(moved) == 4 * depth + 3, moved
    adapted = intermodal.load(trained / "model")
    messages = open_talks("questions:scenes:core", side=32)[1].messages
    base = adapted.logits(messages)
    assert lora.load(adapted, tmp_path / "run" / "1-adapt" / "adapter") == settings
    assert not torch.equal(adapted.logits(messages), base)
    torch.testing.assert_close(adapted.logits(messages), made.logits(messages), rtol=0, atol=1e-5)
    sizes = [
        (tmp_path / "run" / "1-adapt" / name).stat().st_size
        for name in ("adapter/adapter_model.safetensors", "model/model.safetensors")
    ]
    assert sizes[0] < sizes[1] / 4


def test_a_stage_of_adapters_resumes_bit_for_bit(recipe, trained, tmp_path):
    import shutil

    from intermodal.train.recipe import LoraConfig

    stage = replace(recipe.stages[1], name="adapt", lora=LoraConfig(dropout=0.2), learn=(("*lora_*", 1.0),))
    whole = replace(recipe, model=replace(recipe.model, start=str(trained / "model")), stages=(stage,))
    train_stages(whole, tmp_path / "run", quiet=True)
    once = weights(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "1-adapt" / "model")
    shutil.rmtree(tmp_path / "run" / "1-adapt" / "checkpoints" / "step-00000003")
    train_stages(whole, tmp_path / "run", resume=True, quiet=True)
    again = weights(tmp_path / "run" / "model")
    assert all(torch.equal(again[key], once[key]) for key in once)


def test_adapters_on_nothing_are_refused(trained):
    from intermodal.train import lora
    from intermodal.train.recipe import LoraConfig

    model = intermodal.load(trained / "model")
    with pytest.raises(IntermodalError, match=r"no linear layer fits 'model\.layers\.\*qproj'; there are .*q_proj"):
        lora.add(model, LoraConfig(("model.layers.*qproj",)))
    with pytest.raises(IntermodalError, match="holds no adapters"):
        lora.load(model, trained)


# --- the tower's states on disk


def test_a_cached_tower_trains_the_same_and_is_not_asked_twice(recipe, tmp_path, monkeypatch):
    from intermodal.models.llava import Llava

    rng = np.random.default_rng(0)
    lines = []
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        talk = [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": f"it is a dog {index % 3}"}]
        lines.append(json.dumps({"id": str(index), "image": f"{index}.png", "conversations": talk}))
    (tmp_path / "t.jsonl").write_text("\n".join(lines))

    def staged(cached):
        stage = recipe.stages[0]
        data = replace(stage.data, train=(str(tmp_path / "t.jsonl"),), weights=None, batch=4)
        learn = (("projector.*", 1.0), ("model.*", 0.5))
        train_ = replace(stage.train, steps=3)
        first = replace(stage, data=data, learn=learn, train=train_, cache_tower=cached)
        return replace(recipe, stages=(first, replace(first, name="again")))

    looked, see = [], Llava.see
    monkeypatch.setattr(Llava, "see", lambda model, visual: looked.append(len(visual.rows())) or see(model, visual))
    plain = train_stages(staged(False), tmp_path / "plain", quiet=True)
    assert sum(looked) == 2 * 3 * 4
    looked.clear()
    cached = train_stages(staged(True), tmp_path / "cached", quiet=True)
    assert sum(looked) <= 8  # six pictures; the first step or two may meet one twice before it is on disk
    assert len(list((tmp_path / "cached" / "tower-cache").rglob("*.safetensors"))) == 6
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[key], value, atol=1e-5, rtol=1e-4, msg=key)
    learning = replace(staged(True).stages[0], learn=(("*", 1.0),))
    with pytest.raises(IntermodalError, match="cache_tower keeps what a frozen tower says, and vision"):
        train_stages(replace(recipe, stages=(learning,)), tmp_path / "no", quiet=True)


def hub_folder(folder, rows):
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


def test_streams_of_the_hub_are_conversations(recipe, tmp_path):
    """Captioned pictures and chat records, streamed: trained on, resumed bit for bit, the unusable counted."""
    pictures = []
    for number in range(8):
        pictures.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (20, 20), (30 * number, 90, 200 - 20 * number)).save(pictures[-1])
    captioned = hub_folder(tmp_path / "pairs", [{"image": p, "caption": f"picture {n}"} for n, p in enumerate(pictures)])
    shown = [{"type": "image", "text": None}, {"type": "text", "text": "what is it ?"}]
    chats = []
    for number, picture in enumerate(pictures):
        answer = [{"type": "text", "text": f"it is {number}"}]
        messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": answer}]
        chats.append({"messages": messages, "images": [picture]})
    chats[3]["images"] = pictures[:2]
    chatted = hub_folder(tmp_path / "chats", chats)
    talk = open_talks(f"captions:{captioned}").next()
    assert talk.messages[0]["content"][0]["image"].size == (20, 20)
    stream = open_talks(chatted)
    said = {stream.next().messages[1]["content"][0]["text"] for _ in range(7)}
    assert said == {f"it is {n}" for n in range(8) if n != 3}
    assert any("pictures more" in reject.reason for reject in stream.take_rejects())
    sources = (f"captions:{captioned}", chatted)
    stage = recipe.stages[1]
    stage = replace(stage, data=replace(stage.data, train=sources, weights=(1.0, 1.0), max_reject_share=1.0))
    made = replace(recipe, stages=(replace(stage, train=replace(stage.train, steps=4, keep=9)),))
    whole = train_stages(made, tmp_path / "run", quiet=True).state_dict()
    shutil.rmtree(tmp_path / "run" / "1-instruct" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "run" / "1-instruct" / "model")
    resumed = train_stages(made, tmp_path / "run", resume=True, quiet=True).state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert "pictures more" in (tmp_path / "run" / "1-instruct" / "rejects.jsonl").read_text()
