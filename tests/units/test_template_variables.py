"""What every conversation tells the chat template: set by a recipe, kept with the model, read again, and nothing to transformers."""

# ruff: noqa: F811  # fixtures are imported by their names
import io
import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from rich.console import Console
from small_llava import QUESTION, recipe, small, stage  # noqa: F401
from test_generate import folder  # noqa: F401
from test_thoughts import ASKED, EMPTY, THINKS, learned, said
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.config import SettingError, from_dict, override, paths, to_dict
from intermodal.errors import CheckpointError, IntermodalError
from intermodal.train.loop import Stopped, Trainer
from intermodal.train.recipe import TalksConfig, load_recipe
from intermodal.train.stages import train_stages

OFF = {"enable_thinking": False}
# A reply begins with words of the template's where it is told to be brief.
MARKED = """{% for m in messages %}{{ m.role }}: {% if brief and m.role == 'assistant' %}it is {% endif %}\
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}\
{% if add_generation_prompt %}assistant: {% if brief %}it is {% endif %}{% endif %}"""


def settings(where):
    return json.loads((where / "tokenizer_config.json").read_text())


@pytest.fixture
def thinker(folder, tmp_path):
    """A decoder whose template can be told not to think."""
    where = shutil.copytree(folder, tmp_path / "thinker")
    (where / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": THINKS, "kept": 1}))
    return where


def test_what_a_model_is_told_is_saved_with_it(thinker, tmp_path):
    model, before = intermodal.load(thinker), (thinker / "tokenizer_config.json").read_bytes()
    plain = model.generate([ASKED], max_new_tokens=4)
    intermodal.save(model, tmp_path / "plain")
    assert (tmp_path / "plain" / "tokenizer_config.json").read_bytes() == before  # untouched, to the byte
    model.processor.variables = {**OFF, "day": "Zürich, 3 May"}
    wanted = model.generate([ASKED], max_new_tokens=4)
    assert wanted.usage["prompt_tokens"] > plain.usage["prompt_tokens"]
    intermodal.save(model, tmp_path / "told")
    again = intermodal.load(tmp_path / "told")
    assert again.processor.variables == model.processor.variables
    assert again.generate([ASKED], max_new_tokens=4) == wanted
    assert learned(again.processor, [ASKED, said("r")]) == ("r<|end|>", again.processor.template.render([ASKED], reply=True, **OFF))
    intermodal.save(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "tokenizer_config.json").read_bytes() == (tmp_path / "told" / "tokenizer_config.json").read_bytes()
    again.processor.variables = {}
    intermodal.save(again, tmp_path / "told")
    assert settings(tmp_path / "told") == json.loads(before)
    assert intermodal.load(tmp_path / "told").generate([ASKED], max_new_tokens=4) == plain
    again.processor.variables = {"n": True}
    intermodal.save(again, tmp_path / "told")
    again.processor.variables = {"n": 1}  # which is equal to it in Python, and not to a template
    intermodal.save(again, tmp_path / "told")
    assert settings(tmp_path / "told")["intermodal"] == {"template_variables": {"n": 1}}
    again.processor.variables = {"when": object()}
    with pytest.raises(CheckpointError, match=r"processor.variables cannot be saved .*not JSON serializable.*take out"):
        intermodal.save(again, tmp_path / "never")


def test_a_model_without_settings_of_its_tokenizer_keeps_what_it_is_told(thinker, tmp_path):
    (thinker / "tokenizer_config.json").rename(tmp_path / "gone")
    (thinker / "chat_template.jinja").write_text(THINKS)
    model = intermodal.load(thinker)
    model.processor.variables = OFF
    intermodal.save(model, tmp_path / "told")
    assert intermodal.load(tmp_path / "told").processor.variables == OFF
    model.processor.variables = {}
    intermodal.save(model, tmp_path / "told")
    assert not (tmp_path / "told" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    "ours",
    [3, [], {"template_variables": ["enable_thinking"]}, {"template_variables": {"messages": []}}, {"template_variables": None}],
)
def test_variables_that_are_none_are_refused(thinker, ours):
    (thinker / "tokenizer_config.json").write_text(json.dumps({**settings(thinker), "intermodal": ours}))
    with pytest.raises(CheckpointError, match=r'tokenizer_config.json: intermodal is \{"template_variables": .* got '):
        intermodal.load(thinker)


def test_transformers_loads_it_silently_and_equal(small, tmp_path, caplog):
    """And takes it along where it saves the tokenizer again."""
    model = intermodal.load(small / "start")
    for name, told in (("plain", {}), ("told", {**OFF, "nested": {"a": [1]}})):
        model.processor.variables = told
        intermodal.save(model, tmp_path / name)
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, told = (transformers.AutoProcessor.from_pretrained(tmp_path / name) for name in ("plain", "told"))
        read = transformers.AutoTokenizer.from_pretrained(tmp_path / "told")
    transformers.utils.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records]
    picture = QUESTION[0]["content"][0]["image"]
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]}]
    batches = [
        each(images=picture, text=each.apply_chat_template(talk, add_generation_prompt=True), return_tensors="pt")
        for each in (plain, told)
    ]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    assert read("what is it ?").input_ids == plain.tokenizer("what is it ?").input_ids
    shutil.copytree(tmp_path / "told", tmp_path / "again")
    read.save_pretrained(tmp_path / "again")
    assert intermodal.load(tmp_path / "again").processor.variables == {**OFF, "nested": {"a": [1]}}


def test_the_verbs_add_to_what_the_model_is_told(thinker, tmp_path):
    model = intermodal.load(thinker)
    model.processor.variables = OFF
    intermodal.save(model, tmp_path / "told")

    def asked(*more):
        line = ["generate", str(tmp_path / "told"), "q", "--max-new-tokens", "3", "--json", *more]
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["usage"]["prompt_tokens"]

    plain = len(intermodal.load(thinker).processor.conversation([ASKED], reply=True).ids)
    assert asked() == asked("--variable", "name=x") == plain + len(EMPTY)
    assert asked("--variable", "enable_thinking=true") == plain
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [ASKED, said("r")]}))
    for more, count in (([], 2), (["--variable", "enable_thinking=true"], 2 + len(EMPTY))):  # the reply, and the end of the turn
        shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "told"), str(tmp_path / "t.jsonl"), *more]).output
        assert f", {count} learned, " in " ".join(shown.split())


def test_a_recipe_sets_them_by_path():
    recipe = load_recipe("recipes/llava.py", tiny=True)
    path = f"stages.{recipe.stages[0].name}.data.variables"
    assert recipe.stages[0].data.variables is None
    assert paths(recipe)[path] is None
    for given, wanted in (
        ([f"{path}.enable_thinking=false"], OFF),
        ([f"{path}.enable_thinking=False"], OFF),  # Python's spelling, which as a text would be true
        ([f'{path}={{"enable_thinking": false}}'], OFF),
        ([f"{path}.enable_thinking=false", f"{path}.day=3 May", f"{path}.nothing=null"], {**OFF, "day": "3 May", "nothing": None}),
        ([f'{path}={{"a": 1}}', f"{path}.enable_thinking=false"], {"a": 1, **OFF}),
        ([f"{path}.enable_thinking=false", f"{path}={{}}"], {}),
        ([f"{path}.enable_thinking=false", f"{path}=null"], None),
    ):
        made = override(recipe, given)
        assert made.stages[0].data.variables == wanted
        assert made.stages[1].data.variables is None
        data = to_dict(made)["stages"][0]["data"]
        assert from_dict(TalksConfig, data).variables == wanted
    for wrong, told in (
        (f"{path}=thinking", f"{path} wants an object or null, got 'thinking'"),
        (f"{path}.messages=[]", "beside messages tools reply and add generation prompt"),
        (f'{path}={{"tools": []}}', "beside messages tools reply and add generation prompt"),
        (f"stages.{recipe.stages[0].name}.data.batch.size=3", "batch is a single value, it has no parts"),
    ):
        with pytest.raises(SettingError, match=told):
            override(recipe, [wrong])


@pytest.fixture
def marked(small, tmp_path):
    """A recipe of one stage for a model whose replies begin with what the template writes, or which say that themselves."""
    model = intermodal.load(small / "start")
    model.processor.set_template(MARKED)
    intermodal.save(model, tmp_path / "start")
    whole = recipe(small, stage(small, learn=(("*", 1.0),)))
    return replace(whole, model=replace(whole.model, start=str(tmp_path / "start")))


def supervised(run):
    lines = (run / "1-a" / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line)["supervised_tokens"] for line in lines)


def test_a_stage_trains_and_answers_with_what_its_data_say(marked, tmp_path):
    """The prefix of every reply is then given, not learned; the stage after goes on so unless it says otherwise."""
    brief = override(marked, ["stages.a.data.variables.brief=true"])
    plain = train_stages(marked, tmp_path / "plain", quiet=True)
    told = train_stages(brief, tmp_path / "told", quiet=True)
    extra = told.processor.encode("it is ")
    assert supervised(tmp_path / "told") == supervised(tmp_path / "plain")  # the same words are learned
    assert plain.processor.variables == {}
    assert told.processor.variables == {"brief": True}
    for where in (tmp_path / "told" / "1-a" / "model", tmp_path / "told" / "model"):
        assert intermodal.load(where).processor.variables == {"brief": True}
    usage = [model.generate(QUESTION, max_new_tokens=2).usage["prompt_tokens"] for model in (plain, told)]
    assert usage[1] == usage[0] + len(extra)
    first = [
        json.loads((tmp_path / run / "1-a" / "metrics.jsonl").read_text().splitlines()[0])["loss"] for run in ("plain", "told")
    ]
    assert first[0] != first[1]  # of words that come after others
    later = replace(marked.stages[0], name="b")
    for own, wanted in ((None, {"brief": True}), ({}, {}), ({"brief": False}, {"brief": False})):
        both = replace(brief, stages=(brief.stages[0], replace(later, data=replace(later.data, variables=own))))
        out = shutil.copytree(tmp_path / "told", tmp_path / f"two-{own}")
        assert train_stages(both, out, resume=True, quiet=True).processor.variables == wanted


def test_a_run_goes_on_with_what_it_was_told(marked, tmp_path, monkeypatch):
    brief = override(marked, ["stages.a.data.variables.brief=true"])
    whole = train_stages(brief, tmp_path / "whole", quiet=True)
    step = Trainer._save

    def stop(self):
        step(self)
        if self.step == 1:
            raise Stopped("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", stop)
        with pytest.raises(Stopped):
            train_stages(brief, tmp_path / "cut", quiet=True)
    other = shutil.copytree(tmp_path / "cut", tmp_path / "other")
    again = train_stages(brief, tmp_path / "cut", resume=True, quiet=True)
    assert again.processor.variables == {"brief": True}
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    heard = io.StringIO()
    train_stages(marked, other, resume=True, console=Console(file=heard, width=1000))
    assert "resumed with other settings: data.variables {'brief': True} -> None" in heard.getvalue()
    with pytest.raises(IntermodalError, match=r"stage a is done, .* was not made with stages\.a\.data\.variables .*True.* -> None"):
        train_stages(marked, tmp_path / "whole", resume=True, quiet=True)
    train_stages(brief, tmp_path / "whole", resume=True, quiet=True)
