"""The demo's report: one self-contained HTML page with tables, curves, confusions and pictures."""

from __future__ import annotations

import base64
import html
import io
import random
from pathlib import Path
from typing import Any

from PIL import Image

from ..data import sprites
from ..data.scenes import SceneConfig, Scenes
from ..models.clip import DualEncoder
from ..train.recipe import Recipe
from .curves import curves, logged
from .scenes import BASELINES

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1d2330; }
table { border-collapse: collapse; margin: .6em 0 1.4em; } th, td { padding: .25em .8em; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr:nth-child(even) { background: #f3f5f9; } th { border-bottom: 1px solid #99a; }
.win { color: #14713a; font-weight: 600; } .lose { color: #a8321e; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px; }
.card { border: 1px solid #d6dae3; border-radius: 8px; padding: 10px; font-size: 13px; }
.card img { image-rendering: pixelated; width: 128px; }
.right { color: #14713a; } .bar { background: #cfe0f7; height: 4px; } img { max-width: 100%; }
"""


def write(out: Path, model: DualEncoder, recipe: Recipe, results: dict[str, Any]) -> Path:
    """Draw `report.html` into a run folder; returns its path."""
    training = results["training"]
    parts = [
        "<h1>SigLIP on composed scenes</h1>",
        f"<p>{training['parameters']:,} parameters, {training['images seen']:,} pictures (scenes, single sprites), "
        f"{training['seconds']:.0f} s on "
        f"{training['cores']} threads with {training['products']} products. The scenes below hold combinations never trained on "
        f"(split by their hash); the "
        f"{sprites.HELD_OUT_STYLE} drawings were never trained on at all. Green is above every baseline, red is not; "
        "the bag of words is none, for it is told every true word, but not who is what or where.</p>",
        _scene_tables(results),
        _sprite_table(results),
        "<h2>Training</h2>",
        f'<img src="{inline(curves({recipe.name: logged(out)}))}" alt="loss, accuracy and rate over the steps">',
        "<h2>Confusions on the unseen style, core sixty</h2>",
        _confusions(results["confusions"], recipe.model.vision.image_size),
        "<h2>Held-out scenes and the captions the model prefers</h2>",
        "<p>Candidates are the true caption, its hard negatives and captions of other scenes; the true one is green.</p>",
        _pictures(model, recipe),
    ]
    page = f"<!doctype html><meta charset='utf-8'><title>intermodal demo</title><style>{STYLE}</style>{''.join(parts)}\n"
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def _scene_tables(results: dict[str, Any]) -> str:
    out = []
    for name, rows in results["scenes"].items():
        head = "".join(f"<th>{c.replace('_', ' ')}</th>" for c in ("model", *BASELINES))
        lines = []
        for key, row in rows.items():
            # the bag of words is an oracle that is told every true word: a ceiling for models without order, not a rival
            best = max(row[c] for c in BASELINES if c != "bag_of_words")
            kind = "win" if row["model"] > best else "lose"
            cells = "".join(f"<td>{row[c]:.1%}</td>" for c in BASELINES)
            lines.append(f"<tr><td>{html.escape(key)}</td><td class={kind}>{row['model']:.1%}</td>{cells}</tr>")
        out.append(
            f"<h2>Scenes, held-out combinations, {html.escape(name)}</h2><table><tr><th></th>{head}</tr>{''.join(lines)}</table>"
        )
    return "".join(out)


def _sprite_table(results: dict[str, Any]) -> str:
    names = list(next(iter(results["sprites"].values())))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for which, row in results["sprites"].items():
        kind = "win" if row["unseen style top-1"] > row["nearest raw pixels top-1"] else "lose"
        cells = "".join(
            f"<td class={kind if name == 'unseen style top-1' else 'other'}>{value:.1%}</td>"
            if isinstance(value, float)
            else f"<td>{value}</td>"
            for name, value in row.items()
        )
        rows.append(f"<tr><td>{which}</td>{cells}</tr>")
    return f"<h2>Naming single sprites</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _confusions(pairs: list[list[str]], side: int, most: int = 18) -> str:
    by_noun = {c.noun: c for c in sprites.core()}
    cards = []
    for true, guess in pairs[:most]:
        one = sprites.on_background(by_noun[true].index, sprites.HELD_OUT_STYLE, side)
        other = sprites.on_background(by_noun[guess].index, "noto", side)
        both = Image.new("RGB", (2 * side, side))
        both.paste(one, (0, 0))
        both.paste(other, (side, 0))
        cards.append(f'<div class=card><img src="{inline(both)}"><br>{html.escape(true)} taken for {html.escape(guess)}</div>')
    return f"<p>{len(pairs)} of {len(by_noun)} are wrong.</p><div class=grid>{''.join(cards)}</div>"


def _pictures(model: DualEncoder, recipe: Recipe, count: int = 18) -> str:
    side = recipe.model.vision.image_size
    source = Scenes(SceneConfig(side=side, split="test", seed=99))
    scenes = [source.scene(index) for index in range(count)]
    image = model.embed_images([scene.pixels for scene in scenes])
    cards = []
    for row, scene in enumerate(scenes):
        rng = random.Random(row)
        true = scene.facts.caption()
        wrong = [facts.caption() for facts in scene.facts.wrong(rng, source.pool).values()]
        others = [s.facts.caption() for s in rng.sample(scenes, 4) if s is not scene]
        candidates = list(dict.fromkeys([true, *wrong, *others]))
        scores = (image[row] @ model.embed_texts(candidates).T).tolist()
        ranked = sorted(zip(scores, candidates, strict=True), reverse=True)[:5]
        low = min(score for score, _ in ranked)
        lines = "".join(
            f"<div class={'right' if text == true else 'other'}>{score:.2f} {html.escape(text)}"
            f"<div class=bar style='width:{100 * (score - low) / max(1e-6, ranked[0][0] - low):.0f}%'></div></div>"
            for score, text in ranked
        )
        cards.append(f'<div class=card><img src="{inline(scene.image)}">{lines}</div>')
    return f"<div class=grid>{''.join(cards)}</div>"


def inline(picture: Image.Image | bytes) -> str:
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        picture = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()
