"""The demo's second part: the SigLIP tower becomes the eyes of a LLaVA, which answers questions about scenes it has never seen."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..data.questions import KINDS
from ..data.talks import SceneTalks, SignTalks
from ..errors import IntermodalError
from ..train.fit import fit_stages, with_stage_steps
from ..train.recipe import StagedRecipe, load_recipe
from ..train.stages import train_stages
from .demo import RECIPE as SIGLIP_RECIPE
from .plan import Plan
from .report import inline
from .vqa import Asked, accuracy, ask, asked_of, held_out_questions, majority

RECIPE = SIGLIP_RECIPE.with_name("llava.py")
ALIGN_SHARE, BLIND_COST = 0.2, 0.9
"""The first stage's share of the steps; what a step of the blind model costs beside one that sees (measured: no pictures, but no short
captions either)."""
SHOWN_EACH = 6


def run_llava_demo(
    out: Path, tower: Path, seconds: float, steps: int | None = None, console: Console | None = None, *, resume: bool = False
) -> dict[str, Any]:
    """Train LLaVA in two stages and a blind twin, ask both, and add the result to `out`/report.html.

    Args:
        out: the demo's folder; what is trained goes under `out`/llava.
        seconds: time for all training; the steps are set to fit by a short trial.
        steps: of both stages together, instead.
        resume: go on where an earlier call was stopped.
    """
    console = console or Console()
    if not RECIPE.exists():
        raise IntermodalError("the demo's recipe is in the source tree: clone the project and run `make demo` there")
    recipe = load_recipe(RECIPE)
    recipe = replace(recipe, model=replace(recipe.model, vision=str(tower)))
    folder = out / "llava"
    plan = Plan.begin(folder, resume)

    def settle(made: StagedRecipe) -> StagedRecipe:
        if steps is None:
            return fit_stages(made, folder / "trial", seconds, costs=(1.0, 1 + BLIND_COST))
        align = max(2, round(steps * ALIGN_SHARE))
        return with_stage_steps(made, (align, max(2, steps - align)))

    recipe = plan.settled("llava", recipe, settle)
    counts = ", ".join(f"{stage.name} {stage.train.steps}" for stage in recipe.stages)
    console.print(f"steps of {recipe.stages[-1].data.batch} conversations: {counts}")
    with plan.clock("llava"):
        model = train_stages(recipe, folder, resume=resume, console=console)
    console.print("the same decoder without pictures, for comparison:")
    with plan.clock("blind"):
        blind = train_stages(blind_twin(recipe, folder / "1-align" / "model"), folder / "blind", resume=resume, console=console)
    side = model.picture_side
    scenes, signs = asked_of(recipe, SceneTalks, side), asked_of(recipe, SignTalks, side)
    assert isinstance(scenes, SceneTalks)
    assert isinstance(signs, SignTalks)
    config, words = scenes.scenes.config, signs.signs.config
    asked = held_out_questions(config, signs=words)
    answers = ask(model, asked)
    results = {
        "training": {
            "seconds": round(sum(plan.seconds.values()), 1),
            "steps": [stage.train.steps for stage in recipe.stages],
            "conversations a step": recipe.stages[-1].data.batch,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "questions": len(asked),
        "accuracy": {
            "model": accuracy(asked, answers),
            "blind model": accuracy(asked, ask(blind, asked, blind=True)),
            "most common answer": accuracy(asked, majority(config, asked, signs=words)),
        },
    }
    (out / "llava.json").write_text(json.dumps(results, indent=2) + "\n")
    _add_to_page(out / "report.html", results, asked, answers)
    console.print(summary(results))
    return results


def summary(results: dict[str, Any]) -> Table:
    table = Table(title="questions about scenes it has never seen: exactly right", box=box.SIMPLE)
    columns = list(results["accuracy"])
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for kind in (*KINDS, "all"):
        table.add_row(kind, *(f"{results['accuracy'][column][kind]:.1%}" for column in columns))
    return table


def blind_twin(recipe: StagedRecipe, start: Path) -> StagedRecipe:
    """The last stage's questions without their pictures, from the same weights."""
    last = recipe.stages[-1]
    chosen = [number for number, spec in enumerate(last.data.train) if spec.startswith("questions:")]
    sources = tuple(last.data.train[number].replace("questions:", "blind:", 1) for number in chosen)
    weights = None if last.data.weights is None else tuple(last.data.weights[number] for number in chosen)
    learn = (*last.learn, ("vision.*", 0.0), ("projector.*", 0.0))  # nothing is shown: no gradient would reach them
    stage = replace(last, name="blind", data=replace(last.data, train=sources, weights=weights), learn=learn)
    return replace(recipe, name="blind", model=replace(recipe.model, start=str(start)), stages=(stage,))


def _add_to_page(page: Path, results: dict[str, Any], asked: Sequence[Asked], answers: Sequence[str]) -> None:
    columns = list(results["accuracy"])
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    rows = []
    for kind in (*KINDS, "all"):
        values = [results["accuracy"][column][kind] for column in columns]
        tone = "win" if values[0] > max(values[1:]) else "lose"
        cells = "".join(f"<td{f' class={tone}' if not at else ''}>{value:.1%}</td>" for at, value in enumerate(values))
        rows.append(f"<tr><td>{kind}</td>{cells}</tr>")
    cards = []
    for kind in KINDS:
        chosen = [(one, answer) for one, answer in zip(asked, answers, strict=True) if one.question.kind == kind][:SHOWN_EACH]
        for one, answer in chosen:
            right = answer == one.question.answer
            truth = "" if right else f"<br>truth: {html.escape(one.question.answer)}"
            cards.append(
                f'<div class=card><img src="{inline(one.shown.image)}"><br>{html.escape(one.question.text)}<br>'
                f"<span class={'right' if right else 'lose'}>{html.escape(answer) or '(nothing)'}</span>{truth}</div>"
            )
    training = results["training"]
    section = (
        "<h1>LLaVA on the same tower</h1>"
        f"<p>{training['parameters']:,} parameters, {sum(training['steps'])} steps in two stages, with the blind twin "
        f"{training['seconds']:.0f} s. {results['questions']} questions about held-out combinations, and signs in a font never "
        "trained on; an answer counts when it is exactly right. The blind model is the same decoder, trained for as many steps on "
        f"the same questions without their pictures.</p><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
        f"<div class=grid>{''.join(cards)}</div>\n"
    )
    before = page.read_text(encoding="utf-8") if page.exists() else "<!doctype html><meta charset='utf-8'>"
    page.write_text(before + section, encoding="utf-8")
