"""Overrides, recipes, the command line's manners, and the house rules that a test can check."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from intermodal.config import SettingError, from_dict, override, paths, to_dict
from intermodal.errors import InputError, IntermodalError
from intermodal.train.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]


def command(*arguments, entry=(sys.executable, "-m", "intermodal"), **environment):
    import os

    return subprocess.run(
        [*entry, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize(
    ("typed", "offered"), [("intermodal tr", {"train"}), ("intermodal data ", {"fetch", "pack", "preview", "stats"})]
)
def test_the_shell_completes_verbs(typed, offered):
    """What bash asks after `intermodal --install-completion`."""
    words = {"_INTERMODAL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    done = command(entry=[Path(sys.executable).with_name("intermodal")], **words)
    assert set(done.stdout.split()) == offered, done.stderr


def test_overrides_are_typed():
    recipe = Recipe("x")
    changed = override(
        recipe, ["data.batch=64", "train.loss=softmax", "optim.lr=3e-4", "data.crop_scale=[0.5, 1]", "train.micro_batch=null"]
    )
    assert (changed.data.batch, changed.train.loss, changed.optim.lr) == (64, "softmax", 3e-4)
    assert changed.data.crop_scale == (0.5, 1.0)
    assert override(recipe, ["model.vision.width=64"]).model.vision.width == 64
    assert from_dict(Recipe, to_dict(changed)) == changed


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("data.bach=3", "did you mean 'data.batch'"),
        ("dta.batch=3", "did you mean 'data.batch'"),
        ("data.batch=many", "data.batch wants int"),
        ("data.batch=true", "data.batch wants int"),
        ('data.batch="64"', "data.batch wants int"),
        ("data.batch=64.5", "data.batch wants int"),
        ("data.batch=0", r"data.batch wants int, got 0 \(Input should be greater than or equal to 1\)"),
        ("train.micro_batch=true", "train.micro_batch wants int or null, got True"),
        ("data.crop_scale=1", r"data.crop_scale wants \[float, float\] or null, got 1"),
        ("data.train=3", "data.train wants a list of str, got 3"),
        ('optim={"lrr": 1e-4}', "optim wants OptimConfig"),
        ("train.loss=sigmod", 'train.loss wants one of "sigmoid", "softmax", got \'sigmod\''),
        ("data.batch.size=3", "single value"),
        ("data.batch", "path=value"),
        ("=3", "path=value"),
        ("data..batch=3", "path=value"),
        (".data=3", "path=value"),
        ("data.crop_scale=[1.0, 0.5]", r"data.crop_scale wants .*got \[1.0, 0.5\] \(Input should be smallest first\)"),
        ("data.weights=[0, 0]", r"data.weights wants .*got \[0, 0\] \(Input should be not all zero\)"),
        ("optim.lr=Infinity", r"optim.lr wants float, got inf"),
        ("optim.lr=NaN", r"optim.lr wants float, got nan"),
        ("model.init_bias=-Infinity", r"model.init_bias wants float, got -inf"),
        ("model.text.dropout=1.5", r"model.text.dropout wants float, got 1.5"),
        ("model.vision.norm_eps=-1", r"model.vision.norm_eps wants float, got -1"),
    ],
)
def test_wrong_overrides_name_the_field(assignment, words):
    with pytest.raises(SettingError, match=words):
        override(Recipe("x"), [assignment])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("data.batch=1", "data.batch=1: a pair is told from the other pairs"),
        ("model.vision.channels=4", "model.vision: channels 4: pictures have 3"),
        ("model.text.heads=7", "model.text: width 32 is not a multiple of heads 7"),
    ],
)
def test_settings_that_do_not_go_together_stop_a_run_before_it_begins(tmp_path, assignment, words):
    from intermodal.train.contrastive import train

    recipe = override(load_recipe(ROOT / "recipes" / "siglip.py", tiny=True), [assignment])
    with pytest.raises(SettingError, match=words):
        train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Recipe('x', data=DataConfig(bach=3))", r"mine.py:3: DataConfig has no setting 'bach', did you mean 'batch'"),
        ("Recipe('x', data=DataConfig(batch='many'))", "mine.py: data.batch wants int, got 'many'"),
        ("Recipe('x', data=TrainConfig())", "mine.py: data wants DataConfig, got a TrainConfig"),
        ("Recipe('x', data=DataConfig(batch=1 / 0))", "mine.py:3: ZeroDivisionError"),
        ("Recipe('x', data=)", "mine.py:3: invalid syntax"),
        ("3", "returned a int"),
        ("Recipe('x', data={'bacth': 7})", "mine.py: data wants DataConfig, got {'bacth': 7}"),
        ("StagedRecipe('x', StitchConfig(), (Stage('a', ())))", "mine.py: stages wants a list of Stage, got a Stage"),
        ("StagedRecipe('x', StitchConfig(), (Recipe('a'),))", "mine.py: stages wants Stage, got a Recipe"),
        ("functools.partial(Recipe, 'x', foo=3)()", "mine.py:3: Recipe has no setting 'foo'"),
    ],
)
def test_a_wrong_recipe_file_names_its_line_or_its_field(tmp_path, line, words):
    head = "import functools; from intermodal.train.recipe import *\ndef recipe(tiny=False):\n"
    (tmp_path / "mine.py").write_text(f"{head}    return {line}\n")
    with pytest.raises(IntermodalError, match=words):
        load_recipe(tmp_path / "mine.py")


def test_a_recipe_that_is_no_function_of_the_file_is_refused_by_name(tmp_path):
    lines = ("import functools", "from intermodal.train.recipe import Recipe", "recipe = functools.partial(Recipe, 'x', foo=3)")
    (tmp_path / "mine.py").write_text("\n".join(lines))
    with pytest.raises(SettingError, match=r"mine.py: Recipe has no setting"):
        load_recipe(tmp_path / "mine.py")


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "recipes").glob("*.py")))
def test_every_recipe_trains_three_steps_tiny(file, tmp_path):
    from intermodal.train.contrastive import train
    from intermodal.train.recipe import NativeConfig, StagedRecipe, VQRecipe
    from intermodal.train.stages import train_stages
    from intermodal.train.vqvae import train_vqvae

    def tiny(name):
        made = load_recipe(ROOT / "recipes" / name, tiny=True)
        return made if isinstance(made, StagedRecipe) else replace(made, train=replace(made.train, threads=1))

    recipe, folders = tiny(file), [tmp_path]
    if isinstance(recipe, StagedRecipe):
        if isinstance(recipe.model, NativeConfig):
            train_vqvae(tiny("vqvae.py"), tmp_path / "vq", quiet=True)
            model = replace(tiny("native.py").model, vq=str(tmp_path / "vq" / "model"))
            if recipe.model.start is not None:
                train_stages(replace(tiny("native.py"), model=model), tmp_path / "start", quiet=True)
                model = replace(recipe.model, start=str(tmp_path / "start" / "model"))
        else:
            train(tiny("siglip.py"), tmp_path / "tower", quiet=True)
            model = replace(recipe.model, vision=str(tmp_path / "tower" / "model"))
        recipe = replace(recipe, model=model)
        train_stages(recipe, tmp_path / "run", quiet=True)
        folders = [tmp_path / "run" / f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages, 1)]
    elif isinstance(recipe, VQRecipe):
        train_vqvae(recipe, tmp_path, quiet=True)
    else:
        train(recipe, tmp_path, quiet=True)
    for folder in folders:
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]
    assert len(paths(load_recipe(ROOT / "recipes" / file))) > 40


HEAVY = ("torch", "numpy", "transformers", "datasets", "PIL", "tokenizers", "safetensors", "huggingface_hub", "av", "matplotlib")
ASK_FOR_HELP = f"""
import contextlib, io, json, sys
from typer.main import get_command
from intermodal.cli import app

def ask(words, command):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        app.run([*words, "--help"])
    found[" ".join(words)] = "Usage" in said.getvalue(), [name for name in {HEAVY} if name in sys.modules]
    for name, inner in getattr(command, "commands", {{}}).items():
        ask([*words, name], inner)

found = {{}}
ask([], get_command(app.app))
print(json.dumps(found))
"""


def test_no_help_imports_what_is_slow_to_import():
    """`intermodal --help`, and that of every verb: what takes its time is imported when a verb runs."""
    done = command("-c", ASK_FOR_HELP, entry=[sys.executable])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"", "train", "stitch", "data", "data preview"} <= found.keys()
    assert all(value == [True, []] for value in found.values()), found


def test_errors_are_one_line_and_debug_shows_more():
    done = command("train", ROOT / "recipes" / "siglip.py", "data.bach=3")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "did you mean 'data.batch'" in done.stderr
    assert "Traceback" in command("--debug", "train", ROOT / "recipes" / "siglip.py", "data.bach=3").stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "{model}", "sprites:core", "--task", "zeroshot", "--template", "a {{x}}"], "has no {} where the name goes"),
        (["eval", "{model}", "--task", "zeroshot", "--classes", "nofile"], "'nofile' does not exist"),
        (["convert", "{model}", "{out}", "--dtype", "float23"], "did you mean 'float32'"),
        (["train", "recipes/siglip.py", "data.batch=0"], "data.batch wants int, got 0"),
        (["train", "recipes/siglip.py", "model.vision.depth=-1"], "model.vision.depth wants int, got -1"),
        (["train", "recipes/siglip.py", "--tiny", "model.vision.patch_size=100"], "patch_size 100 is larger than image_size"),
        (["train", "recipes/siglip.py", "data.crop_scale=[2,3]"], "data.crop_scale wants [float, float] or null"),
        (["train", "recipes/siglip.py", "data.weights=[-1,-2]"], "data.weights wants a list of float or null"),
        (["train", "recipes/siglip.py", "optim.ema=2"], "optim.ema wants float or null"),
        (["train", "recipes/siglip.py", "optim.betas=[2,3]"], "optim.betas wants [float, float], got [2, 3]"),
        (["train", "recipes/siglip.py", "model.init_scale=-1"], "model.init_scale wants float or null, got -1"),
        (["convert", "{model}", "{out}", "--image-size", "3"], "image_size 3 is smaller than a patch of 8"),
        (["search", "{model}", "nothing/", "a dog", "--top", "0"], "--top"),
        (["trian", "recipes/siglip.py"], "Did you mean 'train'?"),
        (["train"], "Missing argument 'recipe'"),
        (["data", "stats", "--count", "many"], "--count"),
        (["train", "recipes/clip.py", "data.train=a.tar"], "write 'data.train=[\"a.tar\"]'"),
        (["demo", "--step", "3"], "--steps"),
        (["train", "recipes/siglp.py"], "no recipe at recipes/siglp.py"),
        (["data", "stats", "nothing.tar"], "no such file"),
        (["embed", "{model}", "nothing.txt"], "nothing.txt"),
    ],
)
def test_what_people_get_wrong_is_said_without_a_traceback(words, said, tmp_path, tiny_run):
    done = command(*[word.format(model=tiny_run, out=tmp_path / "x") for word in words])
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    from intermodal.train.contrastive import train

    out = tmp_path_factory.mktemp("tiny")
    made = load_recipe(ROOT / "recipes" / "siglip.py", tiny=True)
    train(replace(made, train=replace(made.train, threads=1)), out, quiet=True)
    return out / "model"


@pytest.fixture
def said_of(monkeypatch, capsys):
    """said_of(error) -> what the command line says when a verb raises it, and the exit code."""
    from intermodal.cli import app

    def say(error):
        def broken(arguments, **settings):
            raise error

        monkeypatch.setattr(app, "app", broken)
        with pytest.raises(SystemExit) as ended:
            app.run(["train"])
        with pytest.raises(type(error)):
            app.run(["train", "--debug"])
        return capsys.readouterr().err, ended.value.code

    return say


FAULT = "(a fault of intermodal: please report it, with what --debug shows)"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("width"), f"internal error: KeyError: 'width' {FAULT}"),
        (
            ValueError("optimizer got an empty parameter list"),
            f"internal error: ValueError: optimizer got an empty parameter list {FAULT}",
        ),
        (
            RuntimeError("a size is invalid\nfor input"),
            f"internal error: RuntimeError: a size is invalid for input {FAULT}",
        ),
        (AssertionError(), f"internal error: AssertionError {FAULT}"),
        (IntermodalError("no such file"), "error: no such file"),
        (InputError("no picture"), "error: no picture"),
        (FileNotFoundError(2, "No such file or directory", "x.tar"), "error: [Errno 2] No such file or directory: 'x.tar'"),
        (MemoryError("4 GB"), "error: out of memory: 4 GB"),
    ],
)
def test_the_users_errors_are_told_from_the_programs_own(error, line, said_of):
    """ValueErrors of torch, numpy and Python are nothing that a user has said: they are faults, as all that nobody foresaw."""
    assert said_of(error) == (f"{line}\n", 1)


def test_torch_running_out_of_memory_is_the_users_to_mend(said_of):
    import torch

    assert said_of(torch.OutOfMemoryError("CUDA out of memory.\nTried"))[0] == "error: out of memory: CUDA out of memory. Tried\n"


def test_a_model_without_tokenizer_files_is_the_users_to_mend(tiny_run, tmp_path):
    import shutil

    model = shutil.copytree(tiny_run, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    for words in (
        ("eval", model, "scenes:core", "--count", "8"),
        ("train", "recipes/siglip.py", "--tiny", f'model.start="{model}"'),
    ):
        done = command(*words, "--json")
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "tokenizer" in done.stderr


def test_stats_of_scenes_are_printed_both_ways():
    text = command("data", "stats", "scenes:core", "--count", 12, "--side", 24)
    assert text.returncode == 0, text.stderr
    assert "baselines on held-out combinations" in text.stdout
    found = command("data", "stats", "scenes:core", "--count", 12, "--side", 24, "--json")
    assert json.loads(found.stdout)["facts"]["concepts"] == 60, found.stderr


def test_the_verbs_work_together(tmp_path):
    """train -> eval -> convert -> embed -> search, as a person would."""
    run = tmp_path / "run"
    trained = command("train", ROOT / "recipes" / "siglip.py", "train.threads=1", "--tiny", "--out", run, "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["step"] == 3
    assert json.loads(trained.stdout)["curves"] == [str(run / "curves.png")]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = run / "model"
    scores = command("eval", model, "scenes:core", "--count", 20, "--json")
    assert scores.returncode == 0, scores.stderr
    assert json.loads(scores.stdout)["samples"] == 20
    half = command("convert", model, tmp_path / "half", "--dtype", "bfloat16", "--json")
    assert json.loads(half.stdout)["layout"] == "hf", half.stderr
    pictures = tmp_path / "pictures"
    sheet = command("data", "preview", "scenes:all", "--out", pictures / "a.png", "--count", 4, "--json")
    assert json.loads(sheet.stdout) == {"out": str(pictures / "a.png"), "samples": 4, "unusable": 0}, sheet.stderr
    embedded = command("embed", model, pictures, "--out", tmp_path / "e.parquet", "--json")
    assert json.loads(embedded.stdout)["embeddings"] == 1, embedded.stderr
    found = command("search", model, pictures, "a dog", "--json")
    assert json.loads(found.stdout)["hits"][0]["key"].endswith("a.png")


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def test_house_rules_on_imports():
    source = ROOT / "src" / "intermodal"
    for file in source.rglob("*.py"):
        names = list(imports_of(file))
        assert not any(n.split(".")[0] == "transformers" for n in names), f"{file}: transformers is a development dependency"
        if file.relative_to(source).parts[0] in ("inputs", "nn", "models"):
            assert not any(n.startswith("torch.distributed") for n in names), f"{file}: collectives come from parallel/"
