"""The comparison's runs, with training replaced by what it would leave: seeds, time, logs, and what is refused before any of it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from intermodal.config import SettingError
from intermodal.data.scenes import SceneConfig, Scenes
from intermodal.errors import IntermodalError
from intermodal.evaluate.judge import pixels_of
from intermodal.lab import compare as lab
from intermodal.lab import logs, measure, sides
from intermodal.models.chameleon import Chameleon
from intermodal.models.clip import CLIP, DualConfig, SigLIP
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train import contrastive, fit, stages, vqvae
from intermodal.train.recipe import load_recipe
from intermodal.weights.load import save

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = lab.Settings(questions=2, signs=1, heights=(12,), read_out=(20, 8), drawn=1, judge_steps=1, steps=2, seeds=1)


def llava(**changed):
    """Two stages, of 4 and 8 conversations a step."""
    made = load_recipe(RECIPES / "llava.py", tiny=True)
    first, second = made.stages
    return replace(made, stages=(replace(first, data=replace(first.data, batch=4)), second), **changed)


def write_logs(recipe, run, losses):
    for number, (stage, values) in enumerate(zip(recipe.stages, losses, strict=True), 1):
        folder = run / f"{number}-{stage.name}"
        folder.mkdir(parents=True)
        rows = [
            {"step": step, "loss": loss, "samples_per_second": 100.0, "tokens": 40, "highest_score": loss + number}
            for step, loss in enumerate(values, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def trained(monkeypatch):
    """Training replaced: what was called, with which recipe, in order."""
    calls = []

    def train_stages(recipe, run, quiet):
        calls.append(("train_stages", recipe))
        write_logs(recipe, run, [[3.0, 2.0]] * len(recipe.stages))
        return SimpleNamespace(family="llava", parameters=lambda: [torch.ones(5)], model=nn.Linear(2, 1))

    def fit_stages(recipe, folder, seconds):
        calls.append(("fit_stages", recipe, seconds))
        return fit.with_stage_steps(recipe, [2] * len(recipe.stages))

    def fit_eyes(recipe, folder, seconds):
        calls.append(("fit", recipe, seconds))
        return fit.with_steps(recipe, 7)

    def eyes(recipe, run, quiet):
        calls.append(("eyes", recipe))
        clock.now += 50.0

    clock = SimpleNamespace(now=1000.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(stages, "train_stages", train_stages)
    monkeypatch.setattr(fit, "fit_stages", fit_stages)
    monkeypatch.setattr(fit, "fit", fit_eyes)
    monkeypatch.setattr(contrastive, "train", eyes)
    monkeypatch.setattr(vqvae, "train_vqvae", eyes)
    monkeypatch.setattr(measure, "reading", lambda *_: {"measured": True})
    monkeypatch.setattr(lab, "time", clock)
    return calls


@pytest.mark.parametrize(("side", "eyes"), [("stitched", "siglip"), ("native", "vqvae")])
def test_a_run_shares_its_time_between_eyes_and_decoder_and_draws_all_by_its_seed(side, eyes, trained, tmp_path):
    entry = lab.Entry(side, load_recipe(RECIPES / f"compare_{side}.py"), load_recipe(RECIPES / f"compare_{eyes}.py"))
    lab._run(entry, 5, tmp_path, replace(QUICK, seconds=300.0, steps=None))
    assert [call[0] for call in trained] == ["fit", "eyes", "fit_stages", "train_stages"]
    (_, fitted, share), (_, seen), (_, asked, left), (_, learned) = trained
    assert share == pytest.approx(0.35 * 300)
    assert left == pytest.approx(300 - 50)  # what the eyes took is not given again
    assert seen.train.steps == 7
    assert [(made.data.seed, made.train.seed) for made in (fitted, seen)] == [(5, 5)] * 2
    for recipe in (asked, learned):
        assert [(stage.data.seed, stage.train.seed) for stage in recipe.stages] == [(5, 5)] * len(recipe.stages)
        assert sides.eyes_setting(recipe.model)[1] == str(tmp_path / "eyes" / "model")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["seed"], result["eyes_steps"], result["steps"], result["seconds"]) == (5, 7, 2, 50.0)
    assert result["tokens_per_second"] == 100.0 * 40 / 32
    assert (result["parameters"], result["decoder_parameters"]) == (5, 3)
    assert result["measured"]
    assert result["began_with"] == []
    assert not result["out_of_steps"]


def test_a_run_of_so_many_steps_fits_nothing(trained, tmp_path):
    entry = lab.Entry("llava", llava(), None)
    lab._run(entry, 1, tmp_path, QUICK)
    ((_, recipe),) = trained
    assert [stage.train.steps for stage in recipe.stages] == [2, 2]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["began_with"] == ["model.vision=runs/demo/model"]
    assert (result["steps"], result["conversations"]) == (4, 2 * 4 + 2 * 8)


def test_a_recipe_that_ends_before_its_time_is_told_of(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(fit, "fit_stages", lambda recipe, folder, seconds: recipe)  # all its steps fit
    lab._run(lab.Entry("llava", llava(), None), 1, tmp_path, replace(QUICK, steps=None))
    assert json.loads((tmp_path / "result.json").read_text())["out_of_steps"]


def test_logs_of_stages_are_read_stage_by_stage(tmp_path):
    recipe = fit.with_stage_steps(llava(), [12, 12])
    calm = [1.0] * 12
    write_logs(recipe, tmp_path, [calm, [9.0, *calm[1:]]])  # the second stage begins with other data
    found = logs.logged(recipe, tmp_path)
    assert found["loss_spikes"] == 0
    assert [point["step"] for point in found["curve"]] == list(range(1, 25))
    assert found["tokens_per_second"] == pytest.approx((100 * 40 / 4 + 100 * 40 / 8) / 2)
    assert found["highest_score"] == 11.0
    assert found["curve"][0] == {"step": 1, "loss": 1.0, "score_norm": None, "highest_score": 2.0, "gradient_norm": None}
    other = tmp_path / "other"
    write_logs(recipe, other, [[*calm[:11], 9.0], [*calm[:11], 9.0]])
    assert logs.logged(recipe, other)["loss_spikes"] == 2


def test_what_the_codes_keep_is_read_from_the_models_own_decoder(monkeypatch):
    monkeypatch.setattr(measure, "features", lambda model, pictures: torch.zeros(len(pictures), 16, 3))
    shown = []

    def reconstructed(vq, pictures):
        shown.extend(pictures)
        return [Image.new("RGB", picture.size, (255, 255, 255)) for picture in pictures]

    monkeypatch.setattr(measure, "reconstructed", reconstructed)

    class Native(Chameleon):
        def __init__(self):
            nn.Module.__init__(self)
            self.vqmodel = SimpleNamespace(decoder=nn.Identity())

    config = SceneConfig(side=32)
    held_out = [Scenes(replace(config, seed=measure.DRAW_SEED)).scene(index).image for index in range(6, 9)]
    kept = measure.kept(Native(), config, (6, 3))
    assert [picture.tobytes() for picture in shown] == [picture.tobytes() for picture in held_out]
    assert kept["decoder"] == pytest.approx(vqvae.psnr((1 - pixels_of(held_out)).square().mean().item()))
    assert measure.kept("another", config, (6, 3))["decoder"] is None


RECIPE = """
from dataclasses import replace
from intermodal.train.recipe import load_recipe

def recipe(tiny=False):
    made = load_recipe({base!r}, tiny=tiny)
    return {changed}
"""


def edited(path, base, changed="made"):
    path.write_text(RECIPE.format(base=str(RECIPES / base), changed=changed))
    return path


@pytest.fixture
def runs(monkeypatch):
    """Runs replaced by their results: which were made, and the entry of each."""
    made = []

    def alone(function, *arguments):
        if function is lab._run:
            entry, seed, folder, _ = arguments
            made.append((entry.name, seed, entry))
            folder.mkdir(parents=True)
            result = {"measures": sides.MEASURES, "seed": seed, "steps": 1, "questions": {"all": 0.5}, "captions": {"exact": 0.0}}
            (folder / "result.json").write_text(json.dumps(result))

    written = []
    monkeypatch.setattr(lab, "_alone", alone)
    monkeypatch.setattr("intermodal.lab.report.write", lambda out, results, *_: written.append(results) or out / "report.html")
    return SimpleNamespace(made=made, written=written)


def test_more_seeds_go_on_and_fewer_report_the_first(runs, tmp_path):
    pair = [lab.Side(RECIPES / f"compare_{name}.py") for name in ("stitched", "native")]
    lab.compare(*pair, tmp_path, replace(QUICK, seeds=2), tiny=True)
    lab.compare(*pair, tmp_path, replace(QUICK, seeds=3), tiny=True)
    assert [(name, seed) for name, seed, _ in runs.made] == [(name, seed) for seed in range(3) for name in ("stitched", "native")]
    lab.compare(*pair, tmp_path, replace(QUICK, seeds=1), tiny=True)
    assert [{name: [row["seed"] for row in rows] for name, rows in results.items()} for results in runs.written] == [
        {name: list(range(count)) for name in ("stitched", "native")} for count in (2, 3, 1)
    ]


def test_a_recipe_that_was_edited_is_another_comparison(runs, tmp_path):
    out = tmp_path / "out"
    first = edited(tmp_path / "first.py", "compare_stitched.py")
    eyes = edited(tmp_path / "eyes.py", "compare_vqvae.py")
    pair = lab.Side(first), lab.Side(RECIPES / "compare_native.py")

    def again(settings=QUICK):
        lab.compare(*pair, out, settings, native_eyes=eyes, tiny=True)

    again()
    again()
    assert len(runs.made) == 2
    slower = "replace(made, stages=tuple(replace(s, optim=replace(s.optim, lr=0.5)) for s in made.stages))"
    edited(first, "compare_stitched.py", slower)
    with pytest.raises(IntermodalError, match=r"another comparison: first\.stages\.learn\.optim\.lr was 0\.002, and is 0\.5\."):
        again()
    edited(first, "compare_stitched.py")
    edited(eyes, "compare_vqvae.py", "replace(made, data=replace(made.data, batch=5))")
    with pytest.raises(IntermodalError, match=r"eyes\.second\.data\.batch was 8, and is 5\."):
        again()
    edited(eyes, "compare_vqvae.py")
    with pytest.raises(IntermodalError, match=r"questions was 2, and is 3\."):
        again(replace(QUICK, questions=3))
    again()
    assert len(runs.made) == 2
    assert "seeds" not in json.loads((out / "settings.json").read_text())


def test_a_folder_without_a_result_is_free_and_a_stopped_run_begins_anew(runs, tmp_path):
    pair = [lab.Side(RECIPES / f"compare_{name}.py") for name in ("stitched", "native")]
    (tmp_path / "stitched-seed0" / "model").mkdir(parents=True)  # the run would refuse to go over it
    (tmp_path / "settings.json").write_text('{"seconds": 1}')
    lab.compare(*pair, tmp_path, QUICK, tiny=True)
    assert not (tmp_path / "stitched-seed0" / "model").exists()
    assert len(runs.made) == 2


def test_what_is_wrong_with_the_second_side_is_found_before_the_first_runs(runs, monkeypatch, tmp_path):
    alone = lab._alone

    def with_checks(function, *arguments):
        function(*arguments) if function is lab._check else alone(function, *arguments)

    monkeypatch.setattr(lab, "_alone", with_checks)
    native, stitched = (lab.Side(RECIPES / f"compare_{name}.py") for name in ("native", "stitched"))

    def refused(match, second, error=IntermodalError, **eyes):
        with pytest.raises(error, match=match):
            lab.compare(native, second, tmp_path, QUICK, tiny=True, **eyes)

    def set_to(*settings):
        return lab.Side(stitched.recipe, settings)

    refused(r"stitched: gone/x/y .*model\.vision=gone/x/y; --set-second model\.vision=eyes", set_to("model.vision=gone/x/y"))
    refused(r"llava: runs/demo/model-not-there .*--set-second model\.vision=eyes",
            lab.Side(RECIPES / "llava.py", ("model.vision=runs/demo/model-not-there",)))  # fmt: skip
    refused("stages.learn.optim.lr wants", set_to("stages.learn.optim.lr=fast"), SettingError)
    refused("no parameter fits 'projektor", set_to('stages.learn.learn=[["projektor.*", 1.0]]'))
    refused("holds no conversations", set_to('stages.learn.data.train=["scenes:core"]'))
    refused("is a VQRecipe; the eyes of a stitched side want", stitched, stitched_eyes=RECIPES / "vqvae.py")
    refused("no recipe at", stitched, stitched_eyes=tmp_path / "gone.py")
    refused("--stitched-eyes is given, and neither side asks for it", native, stitched_eyes=RECIPES / "siglip.py")
    weighed = edited(tmp_path / "eyes.py", "compare_vqvae.py", "replace(made, data=replace(made.data, weights=(1.0,) * 9))")
    refused("native: 9 weights for", stitched, native_eyes=weighed)
    few = 'stages.learn.data.train=["questions:scenes:core?pair_share=0"]'
    refused("4 weights for 1 sources", set_to(few))
    refused("too few answer the question 'where'", set_to(few, "stages.learn.data.weights=null"))
    refused("conversations of .* cannot be trained on", set_to("stages.learn.data.tokens=4"))
    assert runs.made == []
    lab.compare(native, stitched, tmp_path, QUICK, tiny=True)  # nothing that was refused has taken the folder
    assert [name for name, *_ in runs.made] == ["native", "stitched"]


def dual(family, side=32):
    vision = VisionConfig(16, 1, 2, 32, image_size=side, patch_size=8)
    return family(DualConfig(vision, TextConfig(16, 1, 2, 32, vocab_size=30, context=8, eos_id=1), 16))


def test_eyes_are_found_in_either_layout_and_none_of_other_comparisons(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(lab, "_alone", lambda function, *arguments: asked.append(arguments))
    with_bias = dual(CLIP)
    with_bias.add_bias(10.0, -10.0)
    for name, model in (("clip", with_bias), ("siglip", dual(SigLIP)), ("other", dual(SigLIP))):
        save(contrastive.initialise(model, 0) or model, tmp_path / f"{name}-seed0" / "eyes" / "model")
    assert not (tmp_path / "clip-seed0" / "eyes" / "model" / "config.json").exists()
    (tmp_path / "siglip-seed0" / "drawn").mkdir()
    lab._judge_drawings({"clip": [{"seed": 0}], "siglip": [{"seed": 0}]}, tmp_path, QUICK, SimpleNamespace(print=print))
    ((drew, models, _),) = asked
    assert drew == [tmp_path / "siglip-seed0" / "drawn"]
    assert models == [str(tmp_path / f"{name}-seed0" / "eyes" / "model") for name in ("clip", "siglip")]


def test_a_clip_ranks_drawings_and_leaves_the_classifier_a_tower_of_its_own(monkeypatch):
    given = []
    lengths = []
    monkeypatch.setattr(measure, "train_judge", lambda config, tower, steps, **_: given.append(tower) or lengths.append(steps))
    clip, small, siglip = dual(CLIP), dual(SigLIP, side=16), dual(SigLIP)
    assert measure._judges(SceneConfig(side=32), [small, clip], 1)[1] is clip
    assert given[-1] is None
    assert measure._judges(SceneConfig(side=32), [small, siglip], 1)[1] is siglip
    assert given[-1] is siglip.vision
    assert measure._judges(SceneConfig(side=32), [small], 1)[1] is None
    assert given[-1] is None
    assert lengths == [3, 1, 3]  # random weights want three times the steps


def test_a_run_whose_process_is_killed_is_told_of():
    with pytest.raises(IntermodalError, match=r"killed.*goes on with the runs that are missing"):
        lab._alone(_die)


def _die():
    os._exit(9)


def test_a_runs_memory_is_its_own(tmp_path):
    """What the comparison itself holds when a run begins is not the run's."""
    ballast = b"1" * 1_000_000_000
    lab._alone(_note_peak, tmp_path / "peak")
    assert 10 < float((tmp_path / "peak").read_text()) < lab._peak_megabytes() - 300
    del ballast


def _note_peak(file):
    file.write_text(str(lab._peak_megabytes()))
