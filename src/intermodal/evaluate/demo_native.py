"""`make demo-native`: train a VQ-VAE and a small Chameleon on scenes, let it draw held-out captions, and have a judge look."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from ..data.facts import Facts
from ..data.preview import sheet
from ..data.questions import KINDS
from ..data.readers import open_source
from ..data.scenes import SceneConfig, Scenes
from ..data.talks import asked_for_steps, user
from ..errors import IntermodalError
from ..generate.engine import Reply
from ..models.chameleon import Chameleon
from ..models.clip import SigLIP
from ..models.vit import SiglipVisionTower
from ..models.vqvae import VQVAE
from ..parallel import checkpoint
from ..train.contrastive import train
from ..train.fit import fit, fit_stages, with_stage_steps, with_steps
from ..train.recipe import StagedRecipe, load_recipe
from ..train.stages import train_stages
from ..train.vqvae import psnr, train_vqvae
from .curves import curves, logged
from .demo import RECIPE as SIGLIP_RECIPE
from .judge import Judge, Verdict, pixels_of, ranked, shares, train_judge, verdicts
from .plan import Plan, told_of_bf16
from .report import STYLE, inline
from .vqa import accuracy, ask, captions, held_out_questions, majority, source_of

RECIPES = SIGLIP_RECIPE.parent
VQ_SHARE, SIGLIP_SHARE = 0.15, 0.08
"""Of the time, for the VQ-VAE and for the SigLIP that judges."""
JUDGE_SEED, DRAW_SEED = 5, 11
SHOWN, STEPS_SHOWN, STEPS_CARDS = 24, 30, 8
COLUMNS = {
    "things": "named things found",
    "whole": "all of them",
    "place": "pairs found and placed right",
    "siglip": "caption among SigLIP's first five",
}


def run_native_demo(
    out: Path,
    seconds: float,
    steps: int | None = None,
    *,
    count: int = 120,
    guidance: float = 1.5,
    judge_steps: int = 700,
    console: Console | None = None,
    resume: bool = False,
) -> Path:
    """Train, draw, judge and report; returns the page's path.

    Args:
        seconds: time for training both models; the steps are set to fit by short trials.
        steps: of each, instead.
        count: held-out captions to draw.
        resume: go on where an earlier demo in `out` was stopped; else it is replaced.
    """
    console = console or Console()
    if not (RECIPES / "native.py").exists():
        raise IntermodalError("the demo's recipes are in the source tree: clone the project and run `make demo-native` there")
    plan = Plan.begin(out, resume)
    told_of_bf16(console, "docs/native.md", "--seconds 3000")
    vq_recipe, recipe, pairs = (load_recipe(RECIPES / name) for name in ("native_vqvae.py", "native.py", "siglip.py"))
    # the judge sees what is drawn: one thing or two on white
    pairs = replace(pairs, data=replace(pairs.data, train=(pairs.data.train[0], _scenes(recipe)), weights=(0.3, 0.7)))

    def settle(share: float):
        return lambda made: with_steps(made, steps) if steps else fit(made, out / "trial", seconds * share)

    vq_recipe = plan.settled("vqvae", vq_recipe, settle(VQ_SHARE))
    pairs = plan.settled("siglip", pairs, settle(SIGLIP_SHARE))
    with plan.clock("vqvae"):
        train_vqvae(vq_recipe, out / "vqvae", resume=checkpoint.latest(out / "vqvae") is not None, console=console)
    with plan.clock("siglip"):
        siglip = train(pairs, out / "siglip", resume=checkpoint.latest(out / "siglip") is not None, console=console)
    assert isinstance(siglip, SigLIP)
    recipe = replace(recipe, model=replace(recipe.model, vq=str(out / "vqvae" / "model")))
    left = seconds - sum(plan.seconds.values())
    recipe = plan.settled(
        "native",
        recipe,
        lambda made: with_stage_steps(made, [steps]) if steps else fit_stages(made, out / "trial", left),
    )
    with plan.clock("native"):
        model = train_stages(recipe, out / "native", resume=resume, console=console)
    assert isinstance(model, Chameleon)
    return report(
        model,
        recipe,
        out / "native",
        out,
        {"seconds": round(sum(plan.seconds.values()), 1)},
        siglip,
        count=count,
        guidance=guidance,
        judge_steps=judge_steps,
        console=console,
    )


def _scenes(recipe: StagedRecipe) -> str:
    """The source of scenes that a recipe draws."""
    return next(spec for spec in recipe.stages[-1].data.train if spec.startswith("draws:scenes")).removeprefix("draws:")


def report(
    model: Chameleon,
    recipe: StagedRecipe,
    run: Path,
    out: Path,
    training: dict[str, Any],
    siglip: SigLIP,
    *,
    count: int = 120,
    guidance: float = 1.5,
    judge_steps: int = 700,
    console: Console | None = None,
) -> Path:
    """Judge a trained model, and draw `report.html` and a sheet of what it drew, `drawn.png`, into `out`.

    Args:
        run: the folder it was trained into.
        siglip: the second judge, which ranks captions; its tower is what the first one, a classifier of real scenes, begins with.
    """
    console = console or Console()
    source = open_source(_scenes(recipe), side=model.config.side)
    assert isinstance(source, Scenes)
    assert isinstance(siglip.vision, SiglipVisionTower)
    config = source.config
    judge = train_judge(replace(config, seed=JUDGE_SEED), tower=siglip.vision, steps=judge_steps)
    held_out = Scenes(replace(config, split="test", seed=DRAW_SEED))
    scenes = [held_out.scene(index) for index in range(count)]
    facts = [scene.facts for scene in scenes]
    console.print(f"drawing {count} held-out captions ...")
    conversations = [[user(None, f"draw {fact.caption()}")] for fact in facts]
    settings: dict[str, Any] = dict(max_new_tokens=4, max_images=1, image_temperature=0.5, image_top_p=0.95, guidance=guidance)
    replies = model.generate_batch(conversations, slots=40, progress=True, **settings)
    grey = Image.new("RGB", (config.side, config.side), (128, 128, 128))
    drawn = [reply.images[0] if reply.images else grey for reply in replies]
    again = reconstructed(model.vqmodel, [scene.image for scene in scenes])
    noise = decoded(model.vqmodel, torch.randint(model.config.vq.codes, (count, model.config.grid, model.config.grid)))
    found = verdicts(judge, drawn, facts)
    columns = {
        "drawn": drawn,
        "real": [scene.image for scene in scenes],
        "real, through the codes": again,
        "drawn for another caption": drawn[1:] + drawn[:1],
        "random codes": noise,
    }
    shown = [scene.facts for scene in scenes if scene.facts.relation][:STEPS_SHOWN]
    steps = model.generate_batch(
        [[asked_for_steps(fact)] for fact in shown], slots=8, progress=True, **{**settings, "max_new_tokens": 48, "max_images": 2}
    )
    said = captions(model, config, count, seed=DRAW_SEED, progress=True)
    asked = held_out_questions(config, kinds=asked_kinds(recipe))
    answers = ask(model, asked, progress=True)
    error = (pixels_of(again) - pixels_of([scene.pixels for scene in scenes])).square().mean().item()
    results = {
        "training": {**training, "parameters": sum(p.numel() for p in model.parameters()), "steps": recipe.stages[-1].train.steps},
        "captions drawn": count,
        "began a picture": sum(bool(reply.images) for reply in replies),
        "judged": judged(judge, siglip, columns, facts),
        "psnr": psnr(error),
        "steps": steps_score(judge, steps, shown),
        "captions": said,
        "questions": {"model": accuracy(asked, answers), "most common answer": accuracy(asked, majority(config, asked))},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    page = out / "report.html"
    told = [
        (picture.resize((96, 96), Image.Resampling.NEAREST), fact.caption()) for picture, fact in zip(drawn, facts, strict=True)
    ]
    sheet(told[:SHOWN], 112).save(out / "drawn.png")
    cards = _page(results, facts, drawn, again, [scene.image for scene in scenes], found, steps)
    figure = curves({recipe.name: logged(run / f"1-{recipe.stages[0].name}")})
    page.write_text(f'{cards}<h2>The decoder\'s training</h2><img src="{inline(figure)}">\n', encoding="utf-8")
    console.print(summary(results))
    return page


def judged(
    judge: Judge, siglip: SigLIP, columns: dict[str, list[Image.Image]], facts: Sequence[Facts]
) -> dict[str, dict[str, float]]:
    """A row of shares for each list of pictures, and for what is drawn and what is real one more for each number of things named."""
    out: dict[str, dict[str, float]] = {}
    for name, pictures in columns.items():
        seen, first = verdicts(judge, pictures, facts), ranked(siglip, pictures, facts)
        out[name] = {**shares(seen), "siglip": sum(first) / len(facts)}
        for words, things in (("one thing", 1), ("two things", 2)) if name in ("drawn", "real") else ():
            chosen = [index for index, fact in enumerate(facts) if len(fact.groups) == things]
            if chosen:
                row = {**shares([seen[i] for i in chosen]), "siglip": sum(first[i] for i in chosen) / len(chosen)}
                if things == 1:
                    del row["place"]
                out[f"{name}: the {len(chosen)} of {words}"] = row
    return out


def steps_score(judge: Judge, replies: Sequence[Reply], facts: Sequence[Facts]) -> dict[str, float]:
    """Of replies in two steps: how many hold two pictures, whether the first shows the first thing, and the second both."""
    whole = [(reply.images, fact) for reply, fact in zip(replies, facts, strict=True) if len(reply.images) == 2]
    out = {"asked": float(len(replies)), "two pictures": len(whole) / max(1, len(replies))}
    if whole:
        alone = [replace(fact, groups=fact.groups[:1], relation=None) for _, fact in whole]
        out["first thing in the first"] = shares(verdicts(judge, [images[0] for images, _ in whole], alone))["things"]
        out["both things in the second"] = shares(verdicts(judge, [images[1] for images, _ in whole], [f for _, f in whole]))[
            "things"
        ]
    return out


def asked_kinds(recipe: StagedRecipe) -> tuple[str, ...]:
    """Kinds of questions that the recipe's scenes can ask and one answer does not always fit: no signs where no words are printed, no
    counts where there is one of everything."""
    specs = [spec.removeprefix("questions:") for spec in recipe.stages[-1].data.train if spec.startswith("questions:scenes")]
    configs = [source.config for spec in specs if isinstance(source := open_source(spec), Scenes)]
    if not configs:  # it is not taught to answer, and is asked about what it is shown
        shown = source_of(recipe, Scenes, SceneConfig().side)
        configs = [shown.config if shown else SceneConfig()]
    pointless = {"sign"} if not any(config.word_share for config in configs) else set()
    pointless |= {"count"} if all(config.most == 1 for config in configs) else set()
    return tuple(kind for kind in KINDS if kind not in pointless)


@torch.no_grad()
def reconstructed(vq: VQVAE, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures through their codes."""
    return decoded(vq, vq.encode(pixels_of(pictures)))


@torch.no_grad()
def decoded(vq: VQVAE, codes_NHW: torch.Tensor) -> list[Image.Image]:
    values = ((vq.decode(codes_NHW).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in values]


def summary(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['captions drawn']} held-out captions, as a judge sees them", box=box.SIMPLE)
    for column in ("", *COLUMNS.values()):
        table.add_column(column, justify="right" if column else "left")
    for name, row in results["judged"].items():
        table.add_row(name, *_cells(row))
    steps = ", ".join(f"{name} {value:.0%}" for name, value in results["steps"].items() if name != "asked")
    guess = results["questions"]["most common answer"]
    answered = ", ".join(f"{kind} {value:.0%} (a guess {guess[kind]:.0%})" for kind, value in results["questions"]["model"].items())
    said = f"captions of held-out scenes exactly right {results['captions']['exact']:.0%}, their things {results['captions']['things']:.0%}"
    table.caption = f"in two steps: {steps}\n{said}\nquestions: {answered}; reconstruction {results['psnr']:.1f} dB"
    return table


def _cells(row: dict[str, float]) -> list[str]:
    """A row's shares in the order of the columns; nothing where there are no pairs to place."""
    return [f"{row[key]:.0%}" if key in row else "" for key in COLUMNS]


def _page(
    results: dict[str, Any],
    facts: Sequence[Any],
    drawn: Sequence[Image.Image],
    again: Sequence[Image.Image],
    real: Sequence[Image.Image],
    found: Sequence[Verdict],
    steps: Sequence[Reply],
) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in _cells(row))}</tr>"
        for name, row in results["judged"].items()
    )
    model, common = results["questions"]["model"], results["questions"]["most common answer"]
    asked = "".join(f"<tr><td>{kind}</td><td>{model[kind]:.0%}</td><td>{common[kind]:.0%}</td></tr>" for kind in model)
    cards = []
    for fact, picture, verdict in list(zip(facts, drawn, found, strict=True))[:SHOWN]:
        tone = "right" if all(verdict.things) and verdict.place is not False else "lose"
        said = f"{sum(verdict.things)} of {len(verdict.things)} things"
        if verdict.place is not None and all(verdict.things):
            said += f", placed {'right' if verdict.place else 'wrong'}"
        about = f"{html.escape(fact.caption())}<br><span class={tone}>{said}</span>"
        cards.append(f'<div class=card><img src="{inline(picture)}"><br>{about}</div>')
    both = list(zip(real, again, strict=True))[:8]
    pairs = "".join(f'<div class=card><img src="{inline(a)}"> <img src="{inline(b)}"></div>' for a, b in both)
    training = results["training"]
    return (
        f"<!doctype html><meta charset='utf-8'><title>intermodal demo-native</title><style>{STYLE}</style>"
        "<h1>One model that reads and draws</h1>"
        f"<p>{training['parameters']:,} parameters, VQ-VAE and decoder trained in {training['seconds']:.0f} s. The captions hold "
        f"combinations never trained on; {results['began a picture']} of {results['captions drawn']} replies began a picture. The judge "
        "is a classifier of real scenes: a thing counts when it is among the likeliest, as many as the caption names. The last column is "
        f"the project's own SigLIP, which ranks all {results['captions drawn']} captions for each picture.</p>"
        f"<table><tr><th></th>{''.join(f'<th>{column}</th>' for column in COLUMNS.values())}</tr>{rows}</table>"
        f"<h2>Drawn for held-out captions</h2><div class=grid>{''.join(cards)}</div>"
        f"<h2>In two steps, words and pictures in turn</h2><div class=grid>{''.join(map(_step_card, steps[:STEPS_CARDS]))}</div>"
        "<h2>Reading: captions of held-out scenes, and questions about them</h2>"
        f"<p>{results['captions']['exact']:.0%} of the captions are exactly right; {results['captions']['things']:.0%} of the things are "
        "named.</p>"
        f"<table><tr><th>questions, exactly right</th><th>model</th><th>most common answer</th></tr>{asked}</table>"
        f"<h2>Real scenes and what their codes keep ({results['psnr']:.1f} dB)</h2><div class=grid>{pairs}</div>\n"
    )


def _step_card(reply: Reply) -> str:
    parts = [
        f'<img src="{inline(value)}">' if kind == "image" else f"<p>{html.escape(value)}</p>" for kind, value in reply.segments
    ]
    return f"<div class=card>{''.join(parts)}</div>"
