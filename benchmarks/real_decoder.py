"""SmolLM2-135M-Instruct gets eyes: `recipes/llava_smollm2.py` trained, asked about held-out scenes and signs after each stage and beside a
blind twin, shown Tux Paint's held-out stamps, and asked in words alone what it was asked before.

    intermodal data fetch tuxpaint
    python benchmarks/real_decoder.py --tower runs/demo/model --out runs/smollm2
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

import intermodal
from intermodal.config import override, to_dict
from intermodal.data.questions import KINDS
from intermodal.data.readers import open_source
from intermodal.data.talks import SceneTalks, SignTalks, user
from intermodal.errors import SampleError
from intermodal.evaluate.demo_llava import blind_twin
from intermodal.evaluate.vqa import Asked, accuracy, ask, asked_of, held_out_questions, majority
from intermodal.models.generative import Generative
from intermodal.train.recipe import load_recipe
from intermodal.train.stages import build_model, train_stages

RECIPE = Path(__file__).parents[1] / "recipes" / "llava_smollm2.py"
WORDS = "What is the capital of France?"


def sheet(asked: list[Asked], answers: list[str], out: Path, each: int = 4, side: int = 144) -> None:
    """A picture of scenes with question, answer and, where it is another, the truth."""
    shown = [
        pair
        for kind in KINDS
        for pair in [(one, a) for one, a in zip(asked, answers, strict=True) if one.question.kind == kind][:each]
    ]
    page = Image.new("RGB", (each * (side + 96), len(KINDS) * (side + 58)), "white")
    pen = ImageDraw.Draw(page)
    for number, (one, answer) in enumerate(shown):
        x, y = (number % each) * (side + 96) + 6, (number // each) * (side + 58) + 6
        page.paste(one.shown.image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        right = answer == one.question.answer
        pen.text((x, y + side + 3), one.question.text, fill="black")
        pen.text((x, y + side + 17), answer[:38], fill="#1b7a34" if right else "#b3261e")
        if not right:
            pen.text((x, y + side + 31), f"truth: {one.question.answer}", fill="#555555")
    page.save(out)


def stamps(model: Generative, side: int, count: int) -> list[tuple[str, str]]:
    """(what the model says, what is written) of Tux Paint's stamps that were not trained on."""
    source = open_source("tuxpaint?languages=en&split=test", side=side, seed=0)
    samples = []
    for index in range(len(source)):  # pyright: ignore[reportArgumentType]
        try:
            samples.append(source[index])  # pyright: ignore[reportIndexIssue]
        except SampleError as error:
            print(f"passed over: {error}")
        if len(samples) == count:
            break
    replies = model.generate_batch([[user(sample.image, "")] for sample in samples], slots=16, max_new_tokens=24)
    return [(reply.text.strip(), sample.texts[0]) for reply, sample in zip(replies, samples, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="runs/demo/model", help="a CLIP or SigLIP directory")
    parser.add_argument("--each", type=int, default=60, help="questions of each kind")
    parser.add_argument("--stamps", type=int, default=24)
    parser.add_argument("--set", nargs="*", default=[], help="settings of the recipe, stages.instruct.train.steps=300")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    given = parser.parse_args()
    torch.set_num_threads(2)
    recipe = override(load_recipe(RECIPE), given.set)
    recipe = replace(recipe, model=replace(recipe.model, vision=given.tower))
    start = build_model(recipe.model, [])
    side = start.config.vision.image_size
    scenes, words = asked_of(recipe, SceneTalks, side), asked_of(recipe, SignTalks, side)
    assert isinstance(scenes, SceneTalks)
    assert isinstance(words, SignTalks)
    config, signs = scenes.scenes.config, words.signs.config
    asked = held_out_questions(config, given.each, signs=signs)
    told = given.out / "asked.json"
    wanted = json.dumps(to_dict(recipe), indent=2)
    if told.exists() and told.read_text() != wanted:
        raise SystemExit(f"{given.out} holds a run of another tower or other settings; give another --out")
    given.out.mkdir(parents=True, exist_ok=True)
    again = told.exists()
    told.write_text(wanted)
    if not (given.out / "model").exists():
        train_stages(recipe, given.out, resume=again)
    align = given.out / f"1-{recipe.stages[0].name}" / "model"
    if not (given.out / "blind" / "model").exists():
        train_stages(blind_twin(recipe, align), given.out / "blind", resume=again and (given.out / "blind").exists())
    results, answers = {"most common answer": accuracy(asked, majority(config, asked, signs=signs))}, []
    results["blind"] = accuracy(asked, ask(intermodal.load(given.out / "blind" / "model"), asked, blind=True, slots=16))
    models = {"stitched": start, **{s.name: given.out / f"{n}-{s.name}" / "model" for n, s in enumerate(recipe.stages, 1)}}
    for name, model in models.items():
        model = intermodal.load(model) if isinstance(model, Path) else model
        answers = ask(model, asked, slots=16, progress=True)
        results[name] = accuracy(asked, answers)
        said = model.generate([{"role": "user", "content": WORDS}], max_new_tokens=24).text.strip()
        print(f"{name}: {WORDS} {said}", flush=True)
    told = stamps(model, side, given.stamps)  # of the last model
    table = Table(title=f"{len(asked)} questions about held-out scenes, exactly right")
    for column in ("", *KINDS, "all"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in results.items():
        table.add_row(name, *(f"{row[kind]:.0%}" for kind in (*KINDS, "all")))
    Console().print(table)
    for mine, theirs in told:
        print(f"  {mine!r:50}  written: {theirs!r}")
    (given.out / "answers.json").write_text(json.dumps({"accuracy": results, "stamps": told}, indent=2) + "\n")
    sheet(asked, answers, given.out / "answers.png")
    print(f"drew {given.out / 'answers.png'}")


if __name__ == "__main__":
    main()
