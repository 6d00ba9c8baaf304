"""What the comparison's report says: of sides that were asked alike and of others, of one seed and of several, of what was not shown."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from intermodal.lab import report, words
from intermodal.lab.sides import Settings

NUMBERS = ("tokens_per_image", "seconds", "seconds_with_measuring", "steps", "peak_megabytes", "loss_spikes", "threads")
SCENES = {"side": 64, "most": 3, "styles": ["noto"]}


def run(questions=None, *, majority=0.25, **changed):
    """One run's results, of a stitched model unless `changed` says otherwise."""
    questions = questions or {"count": 0.5, "all": 0.5}
    curve = [{"step": 1, "loss": 2.0, "score_norm": 7.0}, {"step": 2, "loss": 1.0, "score_norm": 9.0}]
    row = {"questions": questions, "questions_majority": dict.fromkeys(questions, majority), "signs_guess": {"8": 0.125}}
    row |= {"signs_left_out": [], "rollbacks": 0, "highest_norm": 9.0, "vocabulary": 36}
    row |= {"captions": {"exact": 0.1, "things": 0.2}, "signs": {"8": 0.5}, "kept": {"linear": 10.0, "decoder": None}}
    row |= {
        "asked_about": {"scenes": SCENES, "signs": {"words": 8, "side": 64}},
        "native": False,
        "learns_to_draw": False,
        "began_with": [],
    }
    row |= {"eyes_steps": 2, "out_of_steps": False, "decoder_parameters": 1.3e6, "tokens_per_second": 5.0, "seed": 0}
    return row | dict.fromkeys(NUMBERS, 3.0) | {"highest_score": 4.0, "curve": curve, "drawn": None} | changed


def draws(**changed):
    shares = {"things": 0.3, "place": 0.0, "ranked": 0.5}
    columns = ("drawn", "drawn for another caption", "real", "codes", "noise")
    drawn = dict.fromkeys(columns, shares) | {"ranked_by": "SigLIP"}
    drawn |= {"drawn for another caption": shares | {"things": 0.1}, "real": shares | {"things": 0.9}}
    return run(**{"native": True, "learns_to_draw": True, "drawn": drawn, "kept": {"linear": 9.0, "decoder": 22.04}} | changed)


def measured(value, make=run):
    return make(questions={"all": value}, signs={"8": value}, kept={"linear": 10 * value, "decoder": None})


def test_findings_need_every_seed():
    said = words.findings({"a": [measured(0.5), measured(0.6)], "b": [measured(0.2, draws), measured(0.4, draws)]})
    assert "a is ahead with every seed: questions, all; signs of all heights; linear read-out of pixels." in said
    assert "The spreads of the seeds overlap: captions, exactly right." in said
    assert "a cannot draw." in said
    assert any("b draws: the judge finds 30 % of the named things, and 10 %" in line for line in said)
    overlapping = words.findings({"a": [measured(0.5), measured(0.3)], "b": [measured(0.2), measured(0.4)]})
    assert not any("ahead" in line for line in overlapping)


def test_one_seed_is_not_called_every_seed():
    said = words.findings({"a": [measured(0.5)], "b": [measured(0.2)]})
    assert said[0].startswith("a is ahead with the one seed there is, which may be chance: questions, all;")
    assert "Neither is ahead: captions, exactly right." in said


def test_questions_of_other_kinds_are_not_compared_together():
    """A kind that only one side was asked has a row, and no part in what is said of both; nor has the sum over all kinds."""
    results = {"first": [run({"count": 0.5, "sign": 0.4, "all": 0.9})], "second": [run({"count": 0.25, "where": 0.75, "all": 0.1})]}
    rows = dict(report.table(results))
    assert rows["questions, count (most common answer 25 %)"] == ["50 %", "25 %"]
    assert rows["questions, sign (most common answer 25 %)"] == ["40 %", "none"]
    assert rows["questions, where (most common answer 25 %)"] == ["none", "75 %"]
    assert rows["questions, all that a side is asked (most common answer 25 %)"] == ["90 %", "10 %"]
    assert rows["highest size of a token's scores (root mean square, mean of a step)"] == ["1.50", "1.50"]
    said = words.findings(results)
    assert said[0].endswith("not compared: first count, sign; second count, where.")
    assert said[1].endswith(": questions, count.")
    for draw in report.PLOTS.values():
        assert report._figure(results, draw).startswith(b"\x89PNG")


def test_scenes_that_differ_are_named():
    other = {"scenes": {**SCENES, "most": 1, "styles": ["noto", "mono"]}, "signs": {"words": 8, "side": 64}}
    said = words.findings({"a": [run()], "b": [run(asked_about=other)]})
    assert said[0] == (
        "Each side is asked about scenes and signs as its own recipe draws them, and those of a and b differ: scenes.most 3 and 1; "
        'scenes.styles ["noto"] and ["noto", "mono"].'
    )
    assert not any("its own recipe" in line for line in words.findings({"a": [run()], "b": [run()]}))


def test_what_a_guess_reaches_is_each_sides_own():
    results = {"a": [run()], "b": [run(majority=0.5, signs_guess={"8": 0.25})]}
    rows = dict(report.table(results))
    assert "questions, count (most common answer: a 25 %, b 50 %)" in rows
    assert "signs of 8 px read exactly (a guess: a 12 %, b 25 %)" in rows
    assert "questions, count (most common answer 25 %)" in dict(report.table({"a": [run()], "b": [run()]}))


def test_the_decoders_likeness_has_a_row():
    rows = dict(report.table({"a": [run()], "b": [draws()]}))
    assert rows["kept by the eyes: own decoder, dB"] == ["none", "22.0"]
    assert rows["kept by the eyes: linear read-out, dB"] == ["10.0", "9.0"]
    assert rows["named things found, drawn for its caption"] == ["none", "30 %"]


def test_rows_that_neither_side_has_are_left_out():
    labels = [label for label, _ in report.table({"a": [run()], "b": [run()]})]
    assert "kept by the eyes: linear read-out, dB" in labels
    assert not any("own decoder" in label or "found" in label or "own caption" in label for label in labels)


def test_captions_are_ranked_by_who_ranked_them():
    assert "own caption among SigLIP's first five, drawn" in dict(report.table({"a": [run()], "b": [draws()]}))
    by_clip = draws()
    by_clip["drawn"] = by_clip["drawn"] | {"ranked_by": "CLIP"}
    assert dict(report.table({"a": [run()], "b": [by_clip]}))["own caption among CLIP's first five, drawn"] == ["none", "50 %"]


def test_limits_are_those_of_the_models_compared():
    settings = Settings()
    mixed = words.limits({"a": [run()], "b": [draws()]}, settings)
    assert "A part of what b spends goes into drawing, which a cannot do at all." in mixed
    assert "taught by captions and the codebook by pixels" in mixed
    assert "equal seconds" in mixed
    assert "1.3 million parameters, where released models have thousands of millions, and" in mixed
    alike = words.limits({"a": [run()], "b": [run(decoder_parameters=2e6)]}, settings)
    assert "drawing" not in alike
    assert "codebook" not in alike
    assert "1.3 and 2 million" in alike
    large = words.limits({"a": [run(decoder_parameters=7e9)], "b": [run(decoder_parameters=2e4)]}, settings)
    assert "7,000 and 0.02 million parameters and" in large
    both = words.limits({"a": [draws()], "b": [draws()]}, settings)
    assert "drawing" not in both
    assert "codebook" not in both
    reads = words.limits({"a": [draws()], "b": [draws(learns_to_draw=False)]}, settings)
    assert "A part of what a spends goes into drawing, which b is not taught." in reads
    given = words.limits({"a": [run(began_with=["model.vision=runs/a/model"])], "b": [run()]}, replace(settings, steps=3))
    assert "a begins with weights that were trained before, which its time leaves out: model.vision=runs/a/model." in given
    assert "equal seconds" not in given
    assert "same number of steps" in given


def test_a_side_that_ran_out_of_steps_is_named():
    said = words.findings({"a": [run(out_of_steps=True, seconds=120.0)], "b": [run()]})
    assert any(line.startswith("a came to the end of its recipe's steps, after 120 s") for line in said)
    assert not any(line.startswith("b came") for line in said)


def test_the_first_line_says_how_much_was_trained():
    one, two = {"a": [run()], "b": [run()]}, {"a": [run(), run()], "b": [run(), run()]}
    none = ((), ())
    assert words.head(two, Settings(), none) == "Means over 2 seeds (lowest to highest); 300 s of training a run."
    assert words.head(one, Settings(), none) == "One seed; 300 s of training a run."
    stepped = words.head(one, Settings(steps=1), ((), ("model.vq=eyes",)))
    assert stepped == "One seed; 1 training step of every stage and of eyes that are trained first. b with model.vq=eyes."
    without = {name: [run(eyes_steps=0)] for name in ("a", "b")}
    assert words.head(without, Settings(steps=2), none) == "One seed; 2 training steps of every stage."


def test_letters_that_do_not_fit_are_told_of():
    wide = run(signs={"8": 0.5, "17": 0.6}, signs_guess={"8": 0.125, "17": 0.25})
    results = {"a": [wide], "b": [run(signs_left_out=[17, 20])]}
    assert dict(report.table(results))["signs of 17 px read exactly (a guess 25 %)"] == ["60 %", "none"]
    said = words.findings(results)
    assert "b is shown no signs of 17 and 20 px: too few of the recipe's words fit into 64 pixels in letters of that size." in said
    both = words.findings({name: [run(signs_left_out=[20])] for name in ("a", "b")})
    assert any(line.startswith("a and b are shown no signs of 20 px: ") for line in both)
    assert "Neither is ahead: questions, count; questions, all; captions, exactly right; signs of all heights; linear" in " ".join(
        said
    )
    none = {"a": [run(signs={}, signs_guess={})], "b": [run()]}
    assert not any("signs of all heights" in line for line in words.findings(none))
    assert report._figure(none, report.PLOTS["signs"]).startswith(b"\x89PNG")


def test_a_side_without_a_measure_is_not_compared_by_it():
    results = {"a": [run(kept={"linear": None, "decoder": None})], "b": [run()]}
    assert not any("linear read-out" in line for line in words.findings(results))
    assert dict(report.table(results))["kept by the eyes: linear read-out, dB"] == ["none", "10.0"]


def test_more_tokens_a_second_are_no_lead():
    said = words.findings({"a": [run()], "b": [run(tokens_per_second=9.0, tokens_per_image=38)]})
    assert "b trains on more tokens a second, which is no lead: a picture takes 3 and 38 tokens of a and b." in said
    assert not any("ahead" in line and "tokens" in line for line in said)


def test_times_that_training_went_back_have_a_row_where_it_did():
    label = "times that training went back to a checkpoint"
    assert label not in dict(report.table({"a": [run()], "b": [run()]}))
    assert dict(report.table({"a": [run(rollbacks=2)], "b": [run()]}))[label] == ["2.0", "0.0"]


def test_what_a_spike_is_and_who_had_more_threads_is_said():
    told = words.limits({"a": [run(threads=1)], "b": [run(threads=2)]}, Settings())
    assert "The sides had different shares of the machine: a with 1 thread and b with 2 threads (train.threads)." in told
    assert "same cores" not in told
    assert "A loss spike is a logged loss, or several in a row, more than 6 spreads" in told
    assert "on the same cores" in words.limits({"a": [run()], "b": [run()]}, Settings())


def test_a_judge_that_does_not_know_real_scenes_is_told_of():
    blind = draws()
    blind["drawn"] = blind["drawn"] | {"real": blind["drawn"]["real"] | {"things": 0.6}}
    assert any(
        "does not know real scenes well enough (it finds 60 %" in line for line in words.findings({"a": [run()], "b": [blind]})
    )
    assert not any("well enough" in line for line in words.findings({"a": [run()], "b": [draws()]}))


def test_a_title_keeps_the_names_as_they_are():
    assert words.title({"first": [], "second": []}) == "First against second"
    assert words.title({"LLaVA": [], "native-2": []}) == "LLaVA against native-2"


@pytest.mark.parametrize("points", [1, 2])
def test_a_curve_of_a_single_point_is_seen(points, monkeypatch):
    """A line through one point is nothing: it is marked."""
    drawn = []
    rows = [run(curve=run()["curve"][:points])]

    class Axis:
        def plot(self, *values, **style):
            drawn.append(style["marker"])

        def set_xlabel(self, *_, **__): ...

        def set_title(self, *_, **__): ...

        def locator_params(self, **_): ...

    report.PLOTS["losses"](Axis(), {"a": rows, "b": rows})
    assert drawn == ["o" if points == 1 else None] * 2


def test_cards_say_who_drew_and_when_nothing_was_drawn(tmp_path):
    folder = tmp_path / "b-seed0" / "drawn"
    folder.mkdir(parents=True)
    Image.new("RGB", (16, 8)).save(folder / "drawn.png")
    (folder / "said.json").write_text(json.dumps({"side": 8, "captions": ["a cat", "a <dog>"], "drew": [True, False]}))
    page = report._drawings(tmp_path, {"a": [run()], "b": [draws()]})
    assert page.count("<h2>") == 1
    assert "What b drew for captions never trained on" in page
    assert "<br>a cat</div>" in page
    assert "<br>a &lt;dog&gt; (drew nothing)</div>" in page


def test_the_report_is_written_as_page_markdown_and_json(tmp_path):
    results = {"<a>": [run(), run()], "b": [draws(), draws()]}
    page = report.write(tmp_path, results, Settings(), ((), ("train.steps=<3>",))).read_text()
    assert "<h1>&lt;a&gt; against b</h1>" in page
    assert "train.steps=&lt;3&gt;" in page
    assert page.count("data:image/png") == len(report.PLOTS)
    text = (tmp_path / "report.md").read_text()
    saved = json.loads((tmp_path / "report.json").read_text())
    assert all(f"- {line}" in text for line in saved["findings"])
    assert all(f"| {label} | {' | '.join(values)} |" in text for label, values in saved["table"])
