"""Stages that go on: after a killed save, with other settings, in another precision, past steps that hold nothing."""

# ruff: noqa: F811  # fixtures are imported by their names
import errno
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_llava import QUESTION, captioned_tar, made, recipe, small, stage, two_stages, weights  # noqa: F401

import intermodal
from intermodal.config import SettingError, override, validated
from intermodal.data.loader import DataError, Rejects
from intermodal.errors import CheckpointError, IntermodalError
from intermodal.inputs.chat import ChatProcessor
from intermodal.train.loop import Stopped
from intermodal.train.model_folder import copy_model, is_done, save_model
from intermodal.train.stages import train_stages

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from ranks import on_ranks

TOO_LONG = "a very long caption " * 60


def equal(ours, theirs):
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- steps that hold nothing


def streamed(small, captions, **settings):
    shard = captioned_tar(small, "shard.tar", captions)
    one = stage(small, steps=6)
    data = {"train": (f"captions:pipe:cat {shard}",), "batch": 1, "tokens": 200, "max_reject_share": 1.0, **settings}
    return recipe(small, replace(one, data=replace(one.data, **data)))


def test_a_step_of_rejects_alone_is_drawn_again(small, tmp_path):
    """A stream has no other conversation to take a reject's place. Resumed, the run draws the same."""
    whole = streamed(small, [TOO_LONG if number % 3 == 1 else f"a dog {number}" for number in range(12)])
    train_stages(whole, tmp_path, quiet=True)
    once, trained = losses(tmp_path / "1-a"), weights(tmp_path)
    assert len(once) == 6
    assert all(map(math.isfinite, once))
    assert len((tmp_path / "1-a" / "rejects.jsonl").read_text().splitlines()) >= 2  # each of them a whole step
    shutil.rmtree(tmp_path / "1-a" / "model")
    for step in range(2, 7):
        shutil.rmtree(tmp_path / "1-a" / "checkpoints" / f"step-{step:08d}")
    train_stages(whole, tmp_path, resume=True, quiet=True)
    assert losses(tmp_path / "1-a") == once
    assert equal(weights(tmp_path), trained)


def test_steps_of_rejects_alone_end_at_some_point(small, tmp_path):
    with pytest.raises(DataError, match=r"50 steps in a row had no conversation to train on, at step 1: .*rejects"):
        train_stages(streamed(small, [TOO_LONG] * 4), tmp_path, quiet=True)


@pytest.mark.parametrize(("rejected", "resumed"), [((2, 7), False), ((6,), False), ((6,), True)])
def test_a_run_that_stops_in_an_empty_step_goes_on_as_it_would_have(small, tmp_path, monkeypatch, rejected, resumed):
    """Where nothing was trained there is nothing to save: the optimizer has no moments yet, and saving would give it some. The stream's
    order is 2, 7, 10, 6."""
    whole = streamed(small, [TOO_LONG if number in rejected else f"a dog {number}" for number in range(12)])
    once, run, note = tmp_path / "once", tmp_path / "run", Rejects.note
    train_stages(whole, once, quiet=True)
    if resumed:
        shutil.copytree(once, run)
        shutil.rmtree(run / "1-a" / "model")
        for step in range(4, 7):
            shutil.rmtree(run / "1-a" / "checkpoints" / f"step-{step:08d}")

    def stopped(self, key, reason):
        os.kill(os.getpid(), signal.SIGINT)
        return note(self, key, reason)

    with monkeypatch.context() as patched:
        patched.setattr(Rejects, "note", stopped)
        with pytest.raises(Stopped, match="before it had anything new" if resumed or 2 in rejected else "at step 3 .*saved in"):
            train_stages(whole, run, resume=resumed, quiet=True)
    assert not (run / "1-a" / "checkpoints" / "step-00000000").exists()
    train_stages(whole, run, resume=True, quiet=True)
    assert losses(run / "1-a") == losses(once / "1-a")
    assert equal(weights(run), weights(once))
    assert (run / "1-a" / "rejects.jsonl").read_text() == (once / "1-a" / "rejects.jsonl").read_text()


def _on_rank(rank, size, whole, out):
    """Each rank with its own part of the stream, then with its slice of every batch."""
    one = replace(whole.stages[0], train=replace(whole.stages[0].train, steps=3, save_every=None))
    for split in (True, False):
        data = replace(one.data, batch=2, split_streams=split)
        train_stages(replace(whole, stages=(replace(one, data=data),)), out / str(split), quiet=True)


def test_a_rank_without_conversations_waits_for_nobody(small, tmp_path):
    captions = [TOO_LONG if number % 4 < 2 else f"a dog {number}" for number in range(12)]
    on_ranks(2, _on_rank, streamed(small, captions), tmp_path)
    for split in (True, False):
        assert len(losses(tmp_path / str(split) / "1-a")) == 3
        assert all(map(math.isfinite, losses(tmp_path / str(split) / "1-a")))


# --- settings


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_a_rate_that_is_no_multiple_is_refused_by_name(small, tmp_path, rate):
    whole = recipe(small, stage(small, learn=(("*", 1.0), ("vision.*", rate))))
    with pytest.raises(SettingError, match=r"stages\.a\.learn wants"):
        validated(whole)
    with pytest.raises(IntermodalError, match=r"the rate of 'vision\.\*' in a stage's learn is (-1|nan|inf)"):
        train_stages(whole, tmp_path, quiet=True)


def test_a_stage_that_is_done_does_not_take_other_settings(two_stages, tmp_path):
    out, whole = two_stages
    run = shutil.copytree(out, tmp_path / "run")
    kept = (run / "recipe.json").read_bytes()
    for change, named in (
        ("stages.a.train.steps=9", r"stages\.a\.train\.steps 3 -> 9"),
        ('stages.b.learn=[["projector.*", 1.0]]', r"stages\.b\.learn .* -> \[\['projector\.\*', 1\.0\]\]"),
    ):
        with pytest.raises(IntermodalError, match=rf"stage [ab] is done, and .* was not made with {named}: .*another --out"):
            train_stages(override(whole, [change]), run, resume=True, quiet=True)
        assert (run / "recipe.json").read_bytes() == kept
    longer = replace(whole, stages=(*whole.stages, replace(whole.stages[0], name="c")))
    train_stages(override(longer, ["stages.a.data.workers=1", "stages.b.train.log_every=2"]), run, resume=True, quiet=True)
    said = json.loads((run / "recipe.json").read_text())
    assert [one["name"] for one in said["stages"]] == ["a", "b", "c"]
    assert said["stages"][:2] == json.loads(kept)["stages"], "of what is done it says how that was done"


def test_a_refused_resume_leaves_the_recipe_as_it_was(two_stages, tmp_path):
    out, whole = two_stages
    run = shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(run / "2-b" / "model")
    kept = (run / "recipe.json").read_bytes()
    with pytest.raises(IntermodalError, match=r"cannot go on with optim\.name adamw -> muon"):
        train_stages(override(whole, ["stages.b.optim.name=muon"]), run, resume=True, quiet=True)
    assert (run / "recipe.json").read_bytes() == kept


# --- a model's folder


def test_a_save_that_is_killed_leaves_no_model_that_would_count_as_done(two_stages, small, tmp_path, monkeypatch):
    out, whole = two_stages

    def killed(processor, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ChatProcessor, "save", killed)  # config.json and the weights are there by then
        with pytest.raises(KeyboardInterrupt):
            train_stages(whole, tmp_path, quiet=True)
    assert not (tmp_path / "1-a" / "model").exists()
    train_stages(whole, tmp_path, resume=True, quiet=True)
    assert equal(weights(tmp_path), weights(out))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_model_takes_an_earlier_ones_place_whole(small, tmp_path, monkeypatch):
    model, folder = intermodal.load(small / "start"), tmp_path / "model"
    save_model(model, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"an earlier model's")
    before = weights(tmp_path)
    with torch.no_grad():
        model.projector.linear_1.bias.add_(1)

    def killed(processor, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ChatProcessor, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            save_model(model, folder)
    assert equal(weights(tmp_path), before)
    save_model(model, folder)
    assert not equal(weights(tmp_path), before)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    copy_model(small / "start", folder)
    assert equal(weights(tmp_path), before)
    assert (folder / "notes.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_model_folder_that_is_a_link_stays_one(small, tmp_path):
    (tmp_path / "disk").mkdir()
    folder = tmp_path / "model"
    folder.symlink_to(tmp_path / "disk")
    (tmp_path / "disk.old").symlink_to(small)  # left by a process that was killed: what a link leads to is not to be removed
    (tmp_path / "disk.partial").symlink_to(small)
    for _ in range(2):
        copy_model(small / "start", folder)
        assert folder.is_symlink()
        assert (tmp_path / "disk" / "model.safetensors").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "model"]
    assert (small / "start").exists()


def test_a_model_folder_that_cannot_be_renamed_says_what_to_do(small, tmp_path, monkeypatch):
    copy_model(small / "start", tmp_path / "model")

    def busy(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy", str(self))

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(CheckpointError, match=r"model cannot be saved: .* busy.*mount point.*make it a link to a folder within"):
        copy_model(small / "start", tmp_path / "model")


def test_what_was_kept_in_a_models_folder_outlives_a_kill_between_the_renames(small, tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", Path.rename
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")

    def killed(self, target):
        if self.name == "model.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        for _ in range(2):  # and once more, while it makes good for the first
            with pytest.raises(KeyboardInterrupt):
                copy_model(small / "start", folder)
            assert not is_done(tmp_path), "an earlier model would count as this one"
    copy_model(small / "start", folder)
    assert is_done(tmp_path)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "config.json").read_text() == (small / "start" / "config.json").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


# --- the tower's states on disk


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cached_tower_resumes_bit_for_bit(small, tmp_path, precision):
    """A bf16 product of states from disk rounds as one of new ones, which LLaVA takes as a view without the class token, only where both
    lie alike in memory."""
    whole = recipe(small, stage(small, steps=4, precision=precision, cache_tower=True))
    train_stages(whole, tmp_path, quiet=True)
    once, model = weights(tmp_path), intermodal.load(small / "start")
    two = model.processor([{**QUESTION[0], "content": QUESTION[0]["content"] * 2}]).visual
    assert not model.see(two)[0].is_contiguous()
    assert model.states(two)[0].is_contiguous()  # what the rounding hangs on, in some shapes and on some processors
    shutil.rmtree(tmp_path / "1-a" / "model")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "1-a" / "checkpoints" / f"step-{step:08d}")
    train_stages(whole, tmp_path, resume=True, quiet=True)
    assert equal(weights(tmp_path), once)


def test_a_towers_states_are_kept_by_precision(small, tmp_path):
    """From one stage to the next, and where a stage goes on in another."""
    both = [stage(small, name, steps=2, precision=precision) for name, precision in (("a", "bf16"), ("b", "fp32"))]
    for order in (both, both[::-1]):
        runs = []
        for cached in (True, False):
            runs.append(tmp_path / f"{order[0].name}-{cached}")
            train_stages(recipe(small, *(replace(one, cache_tower=cached) for one in order)), runs[-1], quiet=True)
        ours, theirs = map(weights, runs)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-6, rtol=1e-5, msg=key)
    run, begun = tmp_path / "on", stage(small, steps=2, precision="bf16", cache_tower=True)
    train_stages(recipe(small, begun), run, quiet=True)
    shutil.rmtree(run / "1-a" / "model")
    train_stages(recipe(small, replace(begun, train=replace(begun.train, steps=4, precision="fp32"))), run, resume=True, quiet=True)
    assert len(list((run / "tower-cache").iterdir())) == 2
