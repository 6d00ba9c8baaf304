"""Which settings a run of stages may go on with: what came or went, what does not matter, and in which order stages are done."""

# ruff: noqa: F811  # fixtures are imported by their names
import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from small_llava import recipe, small, stage, two_stages, weights  # noqa: F401

import intermodal
from intermodal.config import override, to_dict
from intermodal.errors import IntermodalError
from intermodal.train.recipe import LoraConfig, NativeConfig, StitchConfig
from intermodal.train.resume import changes
from intermodal.train.stages import train_stages

ADAPTERS = LoraConfig(("model.layers.*_proj",), rank=2)


def test_settings_that_come_or_go_are_changes(small):
    plain, adapted = stage(small), stage(small, lora=ADAPTERS)
    assert not changes(to_dict(adapted), adapted)
    assert list(changes(to_dict(plain), adapted)) == ["lora"]
    assert list(changes(to_dict(adapted), plain)) == ["lora"]
    assert list(changes(to_dict(adapted), replace(adapted, lora=replace(ADAPTERS, rank=4)))) == ["lora.rank"]
    assert {"vision", "onevision"} <= changes(to_dict(StitchConfig()), NativeConfig()).keys()


def test_a_setting_that_an_older_run_did_not_have_had_its_default(small):
    older = to_dict(stage(small))
    del older["lora"], older["cache_tower"], older["optim"]["ema"], older["data"]["weights"]
    del older["optim"]["betas"]
    assert not changes(older, stage(small))
    newer = stage(small, cache_tower=True, lora=ADAPTERS)
    assert list(changes(older, newer)) == ["cache_tower", "lora"]
    assert changes(older, newer)["cache_tower"] == "cache_tower False -> True"


@pytest.mark.parametrize("begun", [None, ADAPTERS])
def test_adapters_that_come_or_go_in_a_stage_that_is_done_are_refused(small, tmp_path, begun):
    other = None if begun else ADAPTERS
    learn = (("projector.*", 1.0), *([("*lora_*", 1.0)] if begun else []))
    whole = recipe(small, stage(small, learn=learn, steps=1, lora=begun))
    train_stages(whole, tmp_path, quiet=True)
    changed = replace(whole, stages=(replace(whole.stages[0], lora=other),))
    with pytest.raises(IntermodalError, match=r"stage a is done, and .* was not made with stages\.a\.lora .* -> "):
        train_stages(changed, tmp_path, resume=True, quiet=True)
    train_stages(whole, tmp_path, resume=True, quiet=True)


def test_a_run_of_an_older_version_goes_on(two_stages, tmp_path):
    out, whole = two_stages
    run = shutil.copytree(out, tmp_path / "run")
    for file in (run / "recipe.json", *run.glob("?-*/recipe.json")):
        said = json.loads(file.read_text())
        for one in said.get("stages", [said]):
            del one["lora"], one["cache_tower"], one["train"]["rollback"]
        if "model" in said:
            del said["model"]["template"]
        file.write_text(json.dumps(said))
    train_stages(whole, run, resume=True, quiet=True)
    with pytest.raises(IntermodalError, match=r"cannot go on with model\.template None -> other\.jinja"):
        train_stages(override(whole, ["model.template=other.jinja"]), run, resume=True, quiet=True)


def test_what_cannot_change_a_trained_stage_may_be_another_setting(two_stages, tmp_path):
    out, whole = two_stages
    run = shutil.copytree(out, tmp_path / "run")
    others = (
        "data.max_reject_share=0.5",
        "train.checkpoint_activations=true",
        "train.parallel=fsdp",
        "cache_tower=true",
        "train.rollback=3",
    )
    kept = json.loads((run / "recipe.json").read_text())
    train_stages(override(whole, [f"stages.a.{one}" for one in others]), run, resume=True, quiet=True)
    assert json.loads((run / "recipe.json").read_text()) == kept


def test_data_of_a_trained_stage_may_move_but_not_be_others(two_stages, small, tmp_path):
    out, whole = two_stages
    run = shutil.copytree(out, tmp_path / "run")
    moved = override(whole, [f'stages.a.data.train=["{tmp_path}/elsewhere/talks.jsonl"]'])
    said = io.StringIO()
    train_stages(moved, run, resume=True, console=Console(file=said, width=1000))
    assert "stage a is done; its data have moved: data.train" in said.getvalue()
    for other in (f"{small}/others.jsonl", f"captions:{small}/talks.jsonl"):
        with pytest.raises(IntermodalError, match=r"was not made with stages\.a\.data\.train .* -> "):
            train_stages(override(whole, [f'stages.a.data.train=["{other}"]']), run, resume=True, quiet=True)


def test_a_stage_is_not_trained_again_under_those_after_it(two_stages, tmp_path):
    """They would stay made of what it was before."""
    out, whole = two_stages
    run = shutil.copytree(out, tmp_path / "run")
    kept = (run / "recipe.json").read_bytes()
    (run / "1-a" / "model").rename(tmp_path / "a")
    refused = rf"{run}/1-a has no model, .*put its model/ back, or remove {run}/2-b and resume"
    longer = override(whole, ["stages.a.train.steps=4"])
    with pytest.raises(IntermodalError, match=refused):
        train_stages(longer, run, resume=True, quiet=True)
    shutil.rmtree(run / "2-b" / "model")  # its checkpoints are of another model still
    with pytest.raises(IntermodalError, match=refused):
        train_stages(longer, run, resume=True, quiet=True)
    assert (run / "recipe.json").read_bytes() == kept
    shutil.rmtree(run / "2-b")
    train_stages(longer, run, resume=True, quiet=True)
    ours, theirs = weights(run), weights(out)
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [one["train"]["steps"] for one in json.loads((run / "recipe.json").read_text())["stages"]] == [4, 3]


def test_a_tower_is_found_in_one_walk(small, monkeypatch):
    """A server asks before every reply."""
    model = intermodal.load(small / "start")
    wanted = {name: parameter for name, parameter in model.named_parameters() if name.startswith("vision.")}
    walks, walk = [], torch.nn.Module.named_modules
    monkeypatch.setattr(
        torch.nn.Module, "named_modules", lambda self, *a, **k: (walks.append(1) if not a else None, walk(self, *a, **k))[1]
    )
    tower = model.tower_parameters()
    assert list(tower) == list(wanted)
    assert all(tower[name] is parameter for name, parameter in wanted.items())
    assert len(walks) == 1
