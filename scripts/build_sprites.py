"""Build `src/intermodal/data/assets/sprites.zip`: emoji concepts drawn in six permissively licensed styles.

    mkdir -p build/sprites && cd build/sprites
    npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 \
        @lobehub/fluent-emoji-flat@1.1.0 @iconify-json/noto-v1@1.2.5 @iconify-json/emojione@1.2.3 emojibase-data@17.0.0
    cd ../.. && pip install resvg-py pillow numpy
    python scripts/build_sprites.py build/sprites/node_modules src/intermodal/data/assets/sprites.zip

A concept is kept when all six styles draw it. Skin tones, flags, letter and arrow signs, clock faces and the gendered
variants of a person who also exists
without a gender are left out: they share their caption's nouns with the plain concept and would make "right" ambiguous.
The archive holds one WebP sheet a style (row-major cells of 64 px, RGBA) and `sprites.json` with the names, in cell order.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

CELL = 64
COLUMNS = 32
QUALITY = 72  # lossy WebP; the largest round value that keeps the archive under 5 MB
SKIP_GROUPS = (2, 9)  # components (skin tones), flags
SYMBOLS = 8  # of the signs only those that are pictures of something stay; letters, arrows and buttons are text, not drawings
KEEP_SYMBOLS = ("shapes & colors", "warning symbols")
CLOCK_FACE = re.compile(r"o’clock$|-thirty$")  # 24 drawings that differ by the angle of a hand
GENDERED = re.compile(r"^(man|woman|men|women)\b|\b(man|woman)$|: (man|woman)")

# Sixty concepts that a person tells apart at a glance at 24 px, with the short noun the captions use.
CORE = {
    "dog face": "dog", "cat face": "cat", "pig face": "pig", "frog": "frog", "panda": "panda", "fox": "fox", "tiger face": "tiger",
    "penguin": "penguin", "chicken": "chicken", "owl": "owl", "fish": "fish", "octopus": "octopus", "butterfly": "butterfly",
    "lady beetle": "ladybird", "turtle": "turtle", "elephant": "elephant", "snail": "snail", "spouting whale": "whale",
    "red apple": "apple", "banana": "banana", "grapes": "bunch of grapes", "strawberry": "strawberry", "watermelon": "watermelon",
    "pineapple": "pineapple", "cherries": "pair of cherries", "carrot": "carrot", "mushroom": "mushroom", "hamburger": "hamburger",
    "pizza": "pizza", "doughnut": "doughnut", "birthday cake": "cake", "ice cream": "ice cream", "automobile": "car", "bus": "bus",
    "bicycle": "bicycle", "airplane": "airplane", "rocket": "rocket", "sailboat": "sailboat", "locomotive": "locomotive",
    "house": "house", "deciduous tree": "tree", "cactus": "cactus", "sunflower": "sunflower", "rose": "rose", "star": "star",
    "crescent moon": "moon", "sun": "sun", "rainbow": "rainbow", "cloud": "cloud", "snowman without snow": "snowman",
    "umbrella": "umbrella", "soccer ball": "football", "guitar": "guitar", "balloon": "balloon", "wrapped gift": "gift",
    "key": "key", "bell": "bell", "light bulb": "light bulb", "glasses": "pair of glasses", "crown": "crown",
}  # fmt: skip


def normal_key(hexcode: str) -> str:
    """Code points in lower case without the variation selector, the one spelling all six packages can be brought to."""
    return "-".join(part.zfill(4) for part in hexcode.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    label = re.sub(r"[’'.“”]", "", label.lower().replace("&", "and"))
    return re.sub(r"[^a-z0-9]+", "-", label).strip("-")


class Folder:
    """A style stored as one picture file a concept, named by code points."""

    def __init__(self, folder: Path):
        self.files = {normal_key(path.stem): path for path in folder.iterdir()}

    def draw(self, emoji: dict) -> Image.Image | None:
        path = self.files.get(normal_key(emoji["hexcode"]))
        if path is None:
            return None
        if path.suffix == ".svg":
            return render(path.read_text())
        return Image.open(path).convert("RGBA")


class Iconify:
    """A style stored as an Iconify JSON set, named by label; some names carry a "-face" that the label lacks, or the reverse."""

    def __init__(self, package: Path):
        self.set = json.loads((package / "icons.json").read_text())

    def draw(self, emoji: dict) -> Image.Image | None:
        name = slug(emoji["label"])
        for candidate in (name, name + "-face", name.removesuffix("-face")):
            candidate = self.set["aliases"].get(candidate, {}).get("parent", candidate)
            icon = self.set["icons"].get(candidate)
            if icon:
                width, height = icon.get("width", self.set.get("width", 16)), icon.get("height", self.set.get("height", 16))
                xlink = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
                return render(
                    f'<svg xmlns="http://www.w3.org/2000/svg" {xlink} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
                )
        return None


def render(svg: str) -> Image.Image:
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * CELL, height=4 * CELL)))).convert("RGBA")


def to_cell(picture: Image.Image) -> Image.Image:
    """Crop to what is drawn, scale the longer side to the cell and centre: no style is told from its margins."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    picture = picture.crop(box)
    scale = (CELL - 2) / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    # premultiplied resampling ("RGBa") keeps the invisible colour under transparent pixels out of the edges
    picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    cell = Image.new("RGBA", (CELL, CELL), (0, 0, 0, 0))
    cell.paste(picture, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def plain_concepts(emojis: list[dict], subgroups: dict[int, str]) -> list[dict]:
    """Drop components, flags, signs, clock faces and gendered variants whose neutral form exists."""
    kept = [e for e in emojis if e.get("group") is not None and e["group"] not in SKIP_GROUPS and not CLOCK_FACE.search(e["label"])]
    kept = [e for e in kept if e["group"] != SYMBOLS or subgroups[e["subgroup"]] in KEEP_SYMBOLS]
    neutral = {e["hexcode"].split("-")[0] for e in kept if "200D" not in e["hexcode"]}
    return [
        e for e in kept if not ("200D" in e["hexcode"] and GENDERED.search(e["label"]) and e["hexcode"].split("-")[0] in neutral)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    modules = arguments.node_modules
    styles = {
        "noto": Folder(modules / "emoji-datasource-google/img/google/64"),
        "noto-v1": Iconify(modules / "@iconify-json/noto-v1"),
        "fluent-3d": Folder(modules / "@lobehub/fluent-emoji-3d/assets"),
        "fluent-flat": Folder(modules / "@lobehub/fluent-emoji-flat/assets"),
        "twemoji": Folder(modules / "emoji-datasource-twitter/img/twitter/64"),
        "emojione": Iconify(modules / "@iconify-json/emojione"),
    }
    english = modules / "emojibase-data/en"
    messages = json.loads((english / "messages.json").read_text())
    subgroups = {s["order"]: s["message"] for s in messages["subgroups"]}
    groups = {g["order"]: g["message"] for g in messages["groups"]}
    concepts, cells = [], {style: [] for style in styles}
    for emoji in sorted(plain_concepts(json.loads((english / "data.json").read_text()), subgroups), key=lambda e: e["order"]):
        drawn = {style: source.draw(emoji) for style, source in styles.items()}
        if any(picture is None or picture.getchannel("A").getextrema()[1] < 16 for picture in drawn.values()):
            continue
        for style, picture in drawn.items():
            cells[style].append(to_cell(picture))
        concepts.append(
            {
                "name": emoji["label"].replace("“", "").replace("”", "").replace("’", "'"),
                "noun": CORE.get(emoji["label"], emoji["label"].replace("“", "").replace("”", "").replace("’", "'").lower()),
                "core": emoji["label"] in CORE,
                "emoji": emoji["emoji"],
                "keywords": emoji.get("tags", []),
                "group": groups[emoji["group"]],
                "subgroup": subgroups[emoji["subgroup"]],
            }
        )
    missing = set(CORE) - {c["name"] for c in concepts}
    if missing:
        raise SystemExit(f"core concepts that some style lacks: {sorted(missing)}")
    with zipfile.ZipFile(arguments.output, "w", zipfile.ZIP_STORED) as archive:
        for style, pictures in cells.items():
            rows = -(-len(pictures) // COLUMNS)
            sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
            for index, picture in enumerate(pictures):
                sheet.paste(picture, (index % COLUMNS * CELL, index // COLUMNS * CELL))
            pixels = np.array(sheet)
            pixels[pixels[..., 3] == 0] = 0
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "WEBP", quality=QUALITY, alpha_quality=70, method=6)
            archive.writestr(zipfile.ZipInfo(f"{style}.webp", (2026, 1, 1, 0, 0, 0)), buffer.getvalue())
            print(f"{style:12s} {len(pictures)} sprites {len(buffer.getvalue()) / 1e6:.2f} MB")
        index = {"cell": CELL, "columns": COLUMNS, "styles": list(styles), "concepts": concepts}
        text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
        archive.writestr(zipfile.ZipInfo("sprites.json", (2026, 1, 1, 0, 0, 0)), text, compress_type=zipfile.ZIP_DEFLATED)
    print(
        f"{len(concepts)} concepts, {sum(c['core'] for c in concepts)} in the core, {arguments.output.stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
