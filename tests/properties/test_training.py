"""Resumed == uninterrupted, one rank == two ranks, sharded == replicated, saved == loaded."""

import io
import json
import os
import re
import signal
import tarfile
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from rich.console import Console

import intermodal
from intermodal.errors import IntermodalError
from intermodal.inputs.image import ImageProcessor
from intermodal.parallel.setup import World
from intermodal.train.contrastive import PairTrainer, batch_accuracy, train
from intermodal.train.loop import NotFinite, Stopped
from intermodal.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def tiny(steps=6, **changes):
    recipe = load_recipe(RECIPES / "siglip.py", tiny=True)
    recipe = replace(recipe, train=replace(recipe.train, steps=steps, save_every=2, keep=9, precision="fp32", threads=1))
    for section, values in changes.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **values)})
    return recipe


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model" / "model.safetensors")


def forget_after(folder, step):
    """Leave a run as it was right after the checkpoint of `step`."""
    import shutil

    for checkpoint in (Path(folder) / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"micro_batch": 3, "loss": "sigmoid"}, "optim": {"ema": 0.9}},
        {"data": {"train": ("sprites:core", "scenes:core"), "weights": (1.0, 2.0), "crop_scale": (0.6, 1.0)}},
        {"data": {"workers": 1}},
        {"optim": {"name": "muon", "matrix_lr_factor": 2.0}},
        {"optim": {"name": "adamw"}, "train": {"precision": "bf16"}},
        {"train": {"rollback": 9.0}},
    ],
    ids=["plain", "cached-ema", "mixture-crops", "worker", "muon", "adamw-bf16", "rollback"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, changes):
    dropout = replace(tiny().model.vision, dropout=0.2)
    changes = {**changes, "model": {"vision": dropout}}
    recipe = tiny(**changes)
    train(recipe, tmp_path / "run", quiet=True)
    judged = rolls(tmp_path / "run")
    whole, lines = weights(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    forget_after(tmp_path / "run", 2)
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    resumed = weights(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), key
    again = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(line)["loss"] for line in text] for text in (lines, again)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6, "six steps on different batches"
    assert rolls(tmp_path / "run") == judged
    if "rollback" in changes.get("train", {}):
        assert len(judged["recent"]) == 6


def rolls(folder):
    """What the last checkpoint says of the losses that a roll-back judges by."""
    meta = json.loads((sorted((folder / "checkpoints").glob("step-*"))[-1] / "meta.json").read_text())
    return {key: meta[key] for key in ("recent", "rollbacks", "went_back_to")}


def assert_near(mine, wanted, what):
    assert mine.keys() == wanted.keys()
    for name, parameter in wanted.items():
        torch.testing.assert_close(mine[name], parameter, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{what} {n}: {m}")


def run_on_rank(rank, size, folder, mode, resume, steps, name="adamw"):
    # In float64, because Adam's first steps are the sign of a gradient: where that is all but zero (always for the keys' bias, which a
    # softmax does not see), float32 rounds it to either side, and the ranks' other order of a sum turns the step round.
    settings = {"parallel": mode, "micro_batch": 2 if mode == "fsdp" else None, "precision": "fp64"}
    recipe = tiny(steps, train=settings, optim={"name": name})
    model = train(recipe, folder, resume=resume, quiet=True)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_two_ranks_equal_one_and_resume_across(tmp_path):
    """DDP and FSDP on two gloo ranks against one process; a checkpoint of one rank goes on on two, and the other way."""
    alone = run_on_rank(0, 1, tmp_path / "one", "ddp", False, 4)
    for mode in ("ddp", "fsdp"):
        both = on_ranks(2, run_on_rank, tmp_path / mode, mode, False, 4)
        for rank in both:
            assert_near(rank, alone, mode)
    forget_after(tmp_path / "fsdp", 2)
    assert_near(run_on_rank(0, 1, tmp_path / "fsdp", "ddp", True, 4), alone, "from two ranks to one")
    forget_after(tmp_path / "one", 2)
    for rank in on_ranks(2, run_on_rank, tmp_path / "one", "fsdp", True, 4):
        assert_near(rank, alone, "from one rank to two")


def in_fp32_on_rank(rank, size, folder, resume):
    found = {}
    for name in FP32_BOUNDS:
        recipe = tiny(8, train={"save_every": 4}, optim={"name": name})
        model = train(recipe, folder / name, resume=resume, quiet=True)
        found[name] = {key: p.detach().clone() for key, p in model.named_parameters()}
    return found


FP32_BOUNDS = {"adamw": 2e-6, "muon": 2e-5}
"""Ten times the largest difference of a weight that three seeds gave in both modes, with the default eps: 2e-7 and 2e-6."""


def test_a_run_in_fp32_that_goes_on_on_two_ranks_stays_near(tmp_path):
    """Rounding is all that differs: four steps after the resume the weights still are all but the same."""
    alone = in_fp32_on_rank(0, 1, tmp_path, False)
    for name in FP32_BOUNDS:
        forget_after(tmp_path / name, 4)
    for rank in on_ranks(2, in_fp32_on_rank, tmp_path, True):
        for name, bound in FP32_BOUNDS.items():
            furthest = max((rank[name][key] - wanted).abs().max().item() for key, wanted in alone[name].items())
            assert 0 < furthest < bound, name


def averaged_on_rank(rank, size, folder, modes, resume=False):
    found = {}
    for mode in modes:
        model = train(averaged_recipe(mode), folder / mode, resume=resume, quiet=True)
        found[mode] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


def averaged_recipe(mode, ema=0.7):
    return tiny(4, train={"parallel": mode, "precision": "fp64"}, optim={"name": "adamw", "ema": ema})


def test_averaged_weights_on_two_ranks_equal_ones_and_resume_across(tmp_path):
    """What is saved is the average, of whole and of sharded weights."""
    alone = averaged_on_rank(0, 1, tmp_path / "one", ("ddp",))["ddp"]
    for rank in on_ranks(2, averaged_on_rank, tmp_path / "two", ("ddp", "fsdp")):
        for mode, found in rank.items():
            assert_near(found, alone, mode)
    forget_after(tmp_path / "two" / "fsdp", 2)
    assert_near(averaged_on_rank(0, 1, tmp_path / "two", ("fsdp",), True)["fsdp"], alone, "from two ranks to one")
    last = dict(train(averaged_recipe("ddp", None), tmp_path / "last", quiet=True).named_parameters())
    assert max((last[name] - p).abs().max() for name, p in alone.items()) > 1e-4, "the average is not the last step's weights"


def test_muon_on_two_ranks_equals_one_and_resumes_across(tmp_path):
    """Sharded matrices are gathered before they are made orthogonal."""
    alone = run_on_rank(0, 1, tmp_path / "one", "ddp", False, 3, "muon")
    for mode in ("ddp", "fsdp"):
        for rank in on_ranks(2, run_on_rank, tmp_path / mode, mode, False, 3, "muon"):
            assert_near(rank, alone, mode)
    forget_after(tmp_path / "fsdp", 2)
    assert_near(run_on_rank(0, 1, tmp_path / "fsdp", "ddp", True, 3, "muon"), alone, "from two ranks to one")
    forget_after(tmp_path / "one", 2)
    for rank in on_ranks(2, run_on_rank, tmp_path / "one", "fsdp", True, 3, "muon"):
        assert_near(rank, alone, "from one rank to two")


def softmax_on_rank(rank, size, folder):
    """A CLIP's weights after four steps: whole weights and the batch at once, then sharded weights and gradient caching."""
    found = {}
    for mode, part in (("ddp", None), ("fsdp", 2)):
        recipe = load_recipe(RECIPES / "clip.py", tiny=True)
        loop = replace(recipe.train, steps=4, parallel=mode, micro_batch=part, precision="fp64", threads=1)
        model = train(replace(recipe, train=loop), folder / mode, quiet=True)
        found[mode] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


# so small that a gradient is about Adam's eps: elsewhere its update does not depend on the gradient's length, and clipping would not show
CLIP = 1e-3


def clipped_recipe(mode, limit):
    return tiny(3, train={"parallel": mode, "precision": "fp64"}, optim={"name": "adamw", "clip_norm": limit})


def clipped_on_rank(rank, size, folder):
    models = {mode: train(clipped_recipe(mode, CLIP), folder / mode, quiet=True) for mode in ("ddp", "fsdp")}
    return {mode: {name: p.detach().clone() for name, p in model.named_parameters()} for mode, model in models.items()}


def both_on_rank(rank, size, folder):
    return {"softmax": softmax_on_rank(rank, size, folder / "softmax"), "clipped": clipped_on_rank(rank, size, folder / "clipped")}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder and what each of two ranks returned; started once, which takes longer than the training."""
    folder = tmp_path_factory.mktemp("two")
    return folder, on_ranks(2, both_on_rank, folder)


def logged(folder, name):
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_softmax_loss_on_two_ranks_trains_as_on_one(tmp_path, two):
    """Every picture competes with the texts of all ranks: the same losses and the same weights."""
    alone = softmax_on_rank(0, 1, tmp_path / "one")
    folder, ranks = two
    for mode in ("ddp", "fsdp"):
        for rank in ranks:
            assert_near(rank["softmax"][mode], alone["ddp"], mode)
        losses = logged(tmp_path / "one" / "ddp", "loss")
        assert logged(folder / "softmax" / mode, "loss") == pytest.approx(losses, abs=1e-9)
    assert_near(alone["fsdp"], alone["ddp"], "in parts")


def test_gradients_are_clipped_by_the_norm_of_the_whole_model(tmp_path, two):
    """As by torch's own `clip_grad_norm_` on the whole model in one process, on one rank, on two, and on shards."""
    plain = PairTrainer(clipped_recipe("ddp", None), tmp_path / "torch", World(), False, Console(quiet=True), True)
    norms = []
    plain.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.nn.utils.clip_grad_norm_(plain.model.parameters(), CLIP).item())
    )
    wanted = {name: p.detach() for name, p in plain.run().named_parameters()}
    alone = clipped_on_rank(0, 1, tmp_path / "one")
    folder, ranks = two
    for mode in ("ddp", "fsdp"):
        for found in (alone, *(rank["clipped"] for rank in ranks)):
            assert_near(found[mode], wanted, mode)
        for run in (tmp_path / "one", folder / "clipped"):
            assert logged(run / mode, "gradient_norm") == pytest.approx(norms, rel=1e-9)
    unclipped = dict(train(clipped_recipe("ddp", None), tmp_path / "unclipped", quiet=True).named_parameters())
    assert max((unclipped[name] - p).abs().max() for name, p in wanted.items()) > 1e-4, "clipping makes a difference here"


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_shortens_long_gradients_and_leaves_short_ones(tmp_path, limit):
    """What the optimizer gets: Adam's updates would be the same for gradients made longer."""
    trainer, seen = PairTrainer(clipped_recipe("ddp", limit), tmp_path, World(), False, Console(quiet=True), True), []

    def note(*_):
        seen.append(sum(p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None).sqrt().item())

    trainer.optimizer.register_step_pre_hook(note)
    trainer.run()
    before = logged(tmp_path, "gradient_norm")
    assert seen == pytest.approx([min(norm, limit) for norm in before], rel=1e-4)
    assert all(CLIP < norm < 1e3 for norm in before)


def stream_on_rank(rank, size, folder, source, resume, split=True):
    settings = {} if split else {"train": {"precision": "fp64"}}
    recipe = tiny(
        4, data={"train": (f"hf:{source}",), "weights": None, "split_streams": split, "max_reject_share": 0.2}, **settings
    )
    model = train(recipe, folder, resume=resume, quiet=True)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def write_shards(folder, broken=None):
    """Two files of nine captioned pictures; the one of a number has no picture."""
    from PIL import Image

    (folder / "shards").mkdir()
    for shard in range(2):
        lines = []
        for number in range(9):
            picture = folder / f"{shard}-{number}.png"
            if number != broken:
                Image.new("RGB", (9, 9), (number * 25, shard * 200, 60)).save(picture)
            lines.append(json.dumps({"image": str(picture), "caption": f"{number} of {shard}"}) + "\n")
        (folder / "shards" / f"{shard}.jsonl").write_text("".join(lines))


def test_a_stream_resumes_on_two_ranks_bit_for_bit(tmp_path):
    """Each rank goes on in its own part of the stream; one rank alone is told why it cannot."""
    write_shards(tmp_path)
    whole = on_ranks(2, stream_on_rank, tmp_path / "run", tmp_path / "shards", False)
    forget_after(tmp_path / "run", 2)
    resumed = on_ranks(2, stream_on_rank, tmp_path / "run", tmp_path / "shards", True)
    for name, parameter in whole[0].items():
        assert torch.equal(parameter, resumed[0][name]), name
        assert torch.equal(resumed[0][name], resumed[1][name]), name
    with pytest.raises(IntermodalError, match=r"2 ranks.*split_streams=false"):
        stream_on_rank(0, 1, tmp_path / "run", tmp_path / "shards", True)


def test_a_stream_that_every_rank_reads_is_the_same_on_any_number(tmp_path):
    """One rank == two ranks, and a run goes on on the other number; what cannot be read is counted and named once."""
    write_shards(tmp_path, broken=4)
    source = tmp_path / "shards"
    alone = stream_on_rank(0, 1, tmp_path / "one", source, False, False)
    for rank in on_ranks(2, stream_on_rank, tmp_path / "two", source, False, False):
        assert_near(rank, alone, "two ranks")
    counted = [
        [json.loads(line)["rejects"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    assert counted[0] == counted[1]
    assert counted[0][-1] > 0
    named = [(tmp_path / run / "rejects.jsonl").read_text() for run in ("one", "two")]
    assert named[0] == named[1]
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    stream_on_rank(0, 1, tmp_path / "split", source, False, True)
    split = [json.loads(line) for line in (tmp_path / "split" / "metrics.jsonl").read_text().splitlines()]
    # the tokenizer's captions were read from the stream before: the run begins at its beginning all the same
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in split], rel=1e-3)
    forget_after(tmp_path / "two", 2)
    assert_near(stream_on_rank(0, 1, tmp_path / "two", source, True, False), alone, "from two ranks to one")
    forget_after(tmp_path / "one", 2)
    for rank in on_ranks(2, stream_on_rank, tmp_path / "one", source, True, False):
        assert_near(rank, alone, "from one rank to two")


def write_part(folder, shard, count, missing):
    """A file of captioned pictures; those that `missing` says are not there."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        picture = folder.parent / f"{shard}-{number}.png"
        if not missing(number):
            Image.new("RGB", (9, 9), (number * 3, shard * 200, 60)).save(picture)
        lines.append(json.dumps({"image": str(picture), "caption": f"{number} of {shard}"}) + "\n")
    (folder / f"{shard}.jsonl").write_text("".join(lines))


def rejecting_on_rank(rank, size, folder, cases):
    """For each (shards, share): what the run ended with."""
    ends = []
    for number, (shards, share) in enumerate(cases):
        recipe = tiny(5, data={"train": (f"hf:{shards}",), "weights": None, "batch": 64, "max_reject_share": share})
        try:
            train(recipe, folder / str(number), quiet=True)
            ends.append("finished")
        except IntermodalError as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends


def test_ranks_stop_together_when_the_data_of_one_are_unusable(tmp_path):
    """One rank's part has unusable pictures, or nothing else: all ranks end with the same error, and the share is of all ranks."""
    some, all_of_it = tmp_path / "some", tmp_path / "all"
    for folder, missing in ((some, lambda number: number % 3 == 0), (all_of_it, lambda number: True)):
        (tmp_path / folder.name).mkdir()
        write_part(folder / "shards", 0, 60, lambda number: False)
        write_part(folder / "shards", 1, 60, missing)
    # a third of one of two parts is a sixth of all, or a little more: a rank of which more is missing has to read more
    cases = [(some / "shards", 0.05), (some / "shards", 0.25), (all_of_it / "shards", 0.25)]
    first, second = on_ranks(2, rejecting_on_rank, tmp_path / "runs", cases)
    assert first == second
    assert re.search(
        r"DataError: \d+ of \d+ samples were unusable, more than data.max_reject_share=0.05; the last: .*1-\d+.png", first[0]
    )
    assert "rejects*.jsonl" in first[0]
    assert first[1] == "finished"
    assert "a whole pass over the stream gave no usable sample" in first[2]
    counted = logged(tmp_path / "runs" / "1", "rejects")
    named = (tmp_path / "runs" / "1" / "rejects-1.jsonl").read_text().splitlines()
    assert counted[-1] >= len(named) > 0


def test_a_source_of_cut_shards_is_refused(tmp_path):
    """They are told of one by one, and past the share they stop the run before it begins."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(40):
                for name, data in ((f"{number}.png", png_bytes(number)), (f"{number}.txt", b"words")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 3])
    for share, ends in ((0.05, pytest.raises(IntermodalError, match=r"1 of 4 files .*max_reject_share=0.05.*0.tar")), (0.3, None)):
        recipe = tiny(2, data={"train": (f"{tmp_path}/*.tar",), "weights": None, "max_reject_share": share})
        said = Console(record=True, width=300)
        with ends or nullcontext():
            train(recipe, tmp_path / f"run-{share}", console=said, quiet=True)
        assert "0.tar: cut short" in said.export_text()
        rejects = (tmp_path / f"run-{share}" / "rejects.jsonl").read_text().splitlines()
        assert [Path(json.loads(line)["key"]).name for line in rejects] == ["0.tar"]
    train(recipe, tmp_path / "run-0.3", resume=True, quiet=True)
    assert len((tmp_path / "run-0.3" / "rejects.jsonl").read_text().splitlines()) == 1


def png_bytes(number):
    out = io.BytesIO()
    Image.new("RGB", (9, 9), (number, 90, 60)).save(out, "png")
    return out.getvalue()


@pytest.mark.parametrize(
    ("train_on", "told"),
    [
        (("sprites:core",), False),
        (("scenes:core",), False),
        (('sprites:core?styles=["noto","twemoji"]',), True),
        (('scenes:core?styles=["twemoji"]',), True),
    ],
)
def test_training_on_the_style_that_evaluation_holds_out_is_told(tmp_path, train_on, told):
    said = Console(record=True, width=300)
    recipe = tiny(1, data={"train": train_on, "weights": None})
    PairTrainer(recipe, tmp_path, World(), False, said, True)
    assert ("twemoji drawings, the style that the evaluation holds out" in said.export_text()) == told


def test_floats_are_made_of_a_part_of_the_batch_at_a_time(tmp_path, monkeypatch):
    """Workers hand over bytes; where a step goes in parts, so does what is made of them."""
    sizes, before = [], ImageProcessor.normalised

    def normalised(self, levels):
        assert levels.pixels.dtype == torch.uint8
        sizes.append(len(levels))
        return before(self, levels)

    monkeypatch.setattr(ImageProcessor, "normalised", normalised)
    train(tiny(1, train={"micro_batch": 3}), tmp_path / "parts", quiet=True)
    assert sizes == [3, 3, 2] * 2
    sizes.clear()
    train(tiny(1), tmp_path / "whole", quiet=True)
    assert sizes == [8]


def test_exported_equals_loaded(tmp_path):
    model = train(tiny(3), tmp_path / "run", quiet=True)
    loaded = intermodal.load(tmp_path / "run" / "model")
    texts = ["a dog", "two cats left of a red bus"]
    assert torch.equal(model.embed_texts(texts), loaded.embed_texts(texts))


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_what_was_trained_loads_in_transformers(tmp_path, family):
    import transformers

    recipe = load_recipe(RECIPES / f"{family}.py", tiny=True)
    recipe = replace(recipe, train=replace(recipe.train, steps=2, precision="fp32", threads=1))
    model = train(recipe, tmp_path / "run", quiet=True)
    kind = {"siglip": transformers.SiglipModel, "clip": transformers.CLIPModel}[family]
    theirs = kind.from_pretrained(tmp_path / "run" / "model").eval()
    texts, picture = ["a dog", "two cats"], np.zeros((20, 30, 3), np.uint8) + np.arange(30, dtype=np.uint8)[:, None]
    # all that the processor returns goes in: an attention mask would hide SigLIP's padding, which is part of its texts
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "run" / "model").tokenizer
    read = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert read["input_ids"].shape[1] == recipe.model.text.context
    pixels = model.processor.images([Image.fromarray(picture)]).pixels
    with torch.no_grad():
        found = theirs(**read, pixel_values=pixels)
    torch.testing.assert_close(found.text_embeds, model.embed_texts(texts), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.image_embeds, model.embed_images([Image.fromarray(picture)]), rtol=0, atol=1e-5)


def test_a_trained_naflex_says_which_of_transformers_classes_reads_its_texts(tmp_path):
    """The Auto classes build Gemma's tokenizer for every siglip2 folder; the plain class gives the ids that were trained on."""
    import transformers

    recipe = load_recipe(RECIPES / "siglip2_naflex.py", tiny=True)
    recipe = replace(recipe, train=replace(recipe.train, steps=2, precision="fp32", threads=1))
    with pytest.warns(UserWarning, match=r"siglip2 folder.*PreTrainedTokenizerFast.from_pretrained"):
        model = train(recipe, tmp_path / "run", quiet=True)
    folder, texts = tmp_path / "run" / "model", ["a dog", "two cats"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    read = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert read["input_ids"].tolist() == model.processor.texts.ids(texts)
    with torch.no_grad():
        found = transformers.Siglip2Model.from_pretrained(folder).eval().get_text_features(**read).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(found), model.embed_texts(texts), rtol=0, atol=1e-5)


def test_a_borrowed_tokenizer_says_what_the_new_tower_wants(tmp_path):
    """CLIP's own files pad to another length, and with a mask: a SigLIP that takes them has its context, and reads its padding."""
    import transformers

    clip = load_recipe(RECIPES / "clip.py", tiny=True)
    train(replace(clip, train=replace(clip.train, steps=1, threads=1)), tmp_path / "clip", quiet=True)
    model = train(tiny(1, model={"tokenizer": str(tmp_path / "clip" / "model")}), tmp_path / "run", quiet=True)
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "run" / "model").tokenizer
    read = tokenizer(["a dog"], padding="max_length", truncation=True)
    assert {name: [*values] for name, values in read.items()} == {"input_ids": model.processor.texts.ids(["a dog"])}


def test_the_scale_stays_in_its_range(tmp_path):
    recipe = load_recipe(RECIPES / "clip.py", tiny=True)
    loop = replace(recipe.train, steps=3, log_every=1, precision="fp32", threads=1)
    recipe = replace(recipe, train=loop, optim=replace(recipe.optim, lr=3.0, scalar_lr_factor=10.0, warmup=0, clip_norm=1e-6))
    model = train(recipe, tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(1 <= row["scale"] <= 100.001 for row in rows)
    assert 0 <= model.logit_scale.item() <= 4.6053


def bias_on_rank(rank, size, folder):
    recipe = tiny(2, train={"loss": "softmax", "precision": "fp64"})
    return dict(train(recipe, folder, quiet=True).named_parameters())


def test_a_siglip_trains_by_softmax_on_two_ranks_too(tmp_path):
    """Its bias has no gradient then, on any rank."""
    alone = bias_on_rank(0, 1, tmp_path / "one")
    for rank in on_ranks(2, bias_on_rank, tmp_path / "two"):
        assert_near(rank, alone, "softmax with a bias")


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are(tmp_path, monkeypatch):
    backward = PairTrainer._forward
    monkeypatch.setattr(PairTrainer, "_forward", lambda self, batch: broken_gradient(self, backward(self, batch)))
    with pytest.raises(
        NotFinite,
        match=r"norm of the gradients is (nan|inf), with a finite loss, at step 3; this rank.s samples: .*Nothing was saved",
    ):
        train(tiny(4, train={"save_every": None}), tmp_path, quiet=True)


def broken_gradient(trainer, embeddings):
    if trainer.step == 2:
        embeddings.image.register_hook(lambda gradient: gradient * float("inf"))
    return embeddings


def test_other_data_are_refused_on_resume_and_other_settings_told(tmp_path):
    recipe = tiny(4, train={"save_every": 2})
    train(recipe, tmp_path, quiet=True)
    forget_after(tmp_path, 2)
    shorter = replace(recipe, data=replace(recipe.data, train=("sprites:all", *recipe.data.train[1:])))
    with pytest.raises(IntermodalError, match=r"sprites-core.*now they are.*sprites-all"):
        train(shorter, tmp_path, resume=True, quiet=True)
    said = io.StringIO()
    changed = replace(recipe, optim=replace(recipe.optim, lr=0.5))
    train(changed, tmp_path, resume=True, console=Console(file=said, width=200))
    assert f"optim.lr {recipe.optim.lr} -> 0.5" in said.getvalue()


def test_chance_counts_captions_that_come_several_times(tmp_path):
    e = SimpleNamespace(image=torch.eye(4), text=torch.eye(4))
    right, chance = batch_accuracy(e, SimpleNamespace(groups=torch.tensor([1, 1, 2, 3])))
    assert (float(right), float(chance)) == (1.0, (2 + 2 + 1 + 1) / 16)
    assert float(batch_accuracy(e, SimpleNamespace(groups=None))[1]) == 0.25


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    recipe = tiny(10_000)
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped, match=r"SIGTERM.*--resume"):
        train(recipe, tmp_path / "run", quiet=True)
    done = json.loads((sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "meta.json").read_text())["step"]
    assert done >= 1
    stopped_at = replace(recipe, train=replace(recipe.train, steps=done))
    assert train(stopped_at, tmp_path / "run", resume=True, quiet=True) is not None


def test_nan_names_the_samples(tmp_path):
    recipe = tiny(4, optim={"lr": 1e30, "warmup": 0, "clip_norm": None})
    with pytest.raises(NotFinite, match=r"step \d.*(scenes|sprites)-core"):
        train(recipe, tmp_path / "run", quiet=True)


def test_tensorboard_and_a_terminal_see_what_the_metrics_hold(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=160)
    train(tiny(4, train={"save_every": None}), tmp_path / "run", console=console)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "samples_per_second", "rejects"):
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] == [(row["step"], row[name]) for row in rows]
    shown = terminal.getvalue()
    assert "4/4" in shown
    assert "img/s" in shown
    assert "chance" in shown


def test_a_run_is_not_overwritten(tmp_path):
    train(tiny(2), tmp_path / "run", quiet=True)
    with pytest.raises(IntermodalError, match="--resume"):
        train(tiny(2), tmp_path / "run", quiet=True)
    with pytest.raises(IntermodalError, match="no checkpoint"):
        train(tiny(2), tmp_path / "other", resume=True, quiet=True)


def test_the_tokenizer_is_counted_from_every_source_and_cuts_are_told(tmp_path):
    """Words that only a later source says are words too: counted from the first alone, "left" was four letters, and long captions lost
    their ends without a word."""
    sources = {"train": ("sprites:core?article=true", "scenes:core?forms=1&pair_share=1"), "weights": (1.0, 1.0)}
    for context, words in ((16, ""), (5, r"\d+% of the captions are longer than the text tower's context of 5 tokens")):
        text = replace(tiny().model.text, context=context)
        recipe = tiny(2, data=sources, model={"text": text, "tokenizer_samples": 1000, "vocabulary": 400})
        console = Console(record=True, width=200)
        model = train(recipe, tmp_path / str(context), console=console, quiet=True)
        said = console.export_text()
        assert bool(re.search("longer than the text tower", said)) == bool(words)
        assert re.search(words, said)
    pieces = model.processor.texts.files["tokenizer.json"].decode()
    assert all(f'"{word}":' in pieces for word in ("left", "above", "three", "blue", "dogs", "apple"))
